"""Analyze the spectra of timm models: the strength and frequencies of each block's features, and blocks to pair.

    python analyze.py --model cait_s24_224 --data-path ILSVRC2012 --output_dir Output/analysis/cait
    python analyze.py --compare teacher=cait_s24_224 student=Output/DeiT-Tiny --data-path ILSVRC2012 --output_dir ...

    python analyze.py --milestones Output/DeiT-Tiny --entropy --data-path ILSVRC2012 --output_dir Output/analysis/epochs
    python analyze.py --preset mismatch --model cait_s24_224 --data-path ILSVRC2012 --output_dir ...

The measures are those of section 3 of arXiv 2412.19055 and, with --entropy and --ranks, of the authors' later papers
(analyses.py), each with controls. `KEYS` documents the output.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import analyses
import datasets
import models
import plots
import samplers
import spectral
import utils
from builders import forward_errors
from checkpoint import CheckpointFolder
from faults import exit_codes, init_distributed
from flags import DATA_SETS
from parsing import KeyValues, Parser, number, stored_kwargs
from utils import UserError, as_user_error
from weights import extract_weights, load_checkpoint, stored_args

KEYS = {
    "NAME/intensity": "(blocks,) mean over the C bins of the layer-wise spectrum; unit of the features",
    "NAME/intensity_shuffled": "(blocks,) the same after one random permutation of the channels",
    "NAME/intensity_corrected": "(blocks,) intensity x sqrt(C), for comparing widths",
    "NAME/rms": "(blocks,) root mean square of the features; intensity_corrected is at most this",
    "NAME/entropy": "(blocks,) with --entropy: bits; of a token's C values, in 100 bins over the values of all blocks",
    "NAME/entropy_own_range": "(blocks,) with --entropy: bits; the same with bins over the block's own values",
    "NAME/magnitude": "(blocks,) with --entropy: mean magnitude of the features",
    "NAME/shape": "(blocks, 3) channels C, height H and width W of the block's map",
    "NAME/spectrum/BLOCK": "(C,) layer-wise spectrum S; bin k is k / C cycles per channel; unit of the features",
    "NAME/radial_frequency/BLOCK": "(R,) radius of each ring of the 2-D spectrum over the grid, cycles per token",
    "NAME/radial_power/BLOCK": "(R,) mean power in that ring, squared unit of the features",
}
CURVES = ("intensity", "intensity_shuffled", "intensity_corrected", "rms")
PROFILES = ("spectrum", "radial_frequency", "radial_power")
# The settings of each paper, as defaults of other flags.
PRESETS: dict[str, dict[str, Any]] = {
    "spectralkd": {"num_images": 32, "order": "first", "eval_crop_ratio": 0.875},  # arXiv 2412.19055
    "dynamics": {"num_images": 32, "order": "first", "eval_crop_ratio": 0.875, "entropy": True},  # arXiv 2511.06848
    "mismatch": {"num_images": 1000, "order": "classes", "eval_crop_ratio": "own", "ranks": True},  # arXiv 2511.15572
}
ORDERS = {"drawn": "drawn by seed {}", "first": "the first", "classes": "the first by name of each class"}
PUBLISHED = Path(__file__).parent / "recipes" / "published.json"


def crop_ratio(text: str) -> float | str:
    """Read a crop ratio, or `own`."""
    return text if text == "own" else number(float, 0.01, 1)(text)


def get_args_parser() -> Parser:
    parser = Parser("Spectral analysis of the blocks of timm models.")
    kwargs: dict[str, Any] = {"nargs": "*", "action": KeyValues, "default": {}, "metavar": "KEY=VALUE"}
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--model", help="timm model, with timm's own weights unless --checkpoint or --random is given")
    add("--model-kwargs", **kwargs, help="timm model arguments, unless a checkpoint has them")
    add("--ema", action="store_true", help="use the moving average of the weights in checkpoints")
    add = group.add_mutually_exclusive_group().add_argument
    add("--checkpoint", help="run folder of main.py, or file or URL of weights")
    add("--random", action="store_true", help="use random weights instead of timm's")
    add("--milestones", metavar="FOLDER", help="run folder; compare the checkpoints that --save-every kept")
    named = kwargs | {"metavar": "NAME=SOURCE"}
    add("--compare", **named, help="models on the same images; SOURCE: a --checkpoint, MODEL:CHECKPOINT or timm model")
    add = parser.add_argument_group("data").add_argument
    add("--data-set", choices=DATA_SETS, help="data set; default: the first run's, or IMNET")
    add("--data-path", help="folder of the data set, val/ is enough; default: the first run's")
    add("--input-size", type=number(int, 1), help="image size in pixels; default: each model's own")
    ratio = "center crop ratio, or own: each model's crop and interpolation; default: the first run's, or 0.875"
    add("--eval-crop-ratio", type=crop_ratio, help=ratio)
    add("--num-images", type=number(int, 1), help="number of validation images; default: 32, with --ranks 1,000")
    order = {"dest": "order", "action": "store_const"}
    add("--first", **order, const="first", help="use the first images (for ImageNet all of one class)")
    add("--per-class", **order, const="classes", help="use the first image of each class, then the second, and so on")
    add("--batch-size", type=number(int, 1), default=64, help="images per batch")
    add("--num_workers", "--num-workers", type=number(int, 0), default=10, help="data loading workers")
    add = parser.add_argument_group("analyses").add_argument
    add("--preset", choices=PRESETS, help="images, transform and analysis of a paper; other flags override it")
    add("--entropy", action="store_true", help="add entropy and magnitude over depth")
    add("--ranks", action="store_true", help="count the dimensions that the last block fills; implies --per-class")
    add = parser.add_argument_group("pairs of blocks").add_argument
    pairs = "print N pairs as --s-id and --t-id; the teacher is the first model"
    add("--suggest", type=number(int, 1), metavar="N", help=pairs)
    add("--student", help="timm model to suggest pairs for")
    add("--student-kwargs", **kwargs, help="timm model arguments")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", "--output-dir", default="", help="folder for numbers and figures; default: print only")
    add("--import", dest="import_module", metavar="MODULE", help="module that registers models with timm")
    add("--pdf", action="store_true", help="write the figures as PDF as well")
    add("--device", default="auto", help="cuda, cuda:N or cpu; auto: cuda if there is a GPU")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of images, shuffled channels and random weights")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags and check their combinations."""
    parser = get_args_parser()
    parser.set_defaults(**PRESETS.get(parser.parse_args(argv).preset, {}))
    args = parser.parse_args(argv)
    if not (args.model or args.checkpoint or args.compare or args.milestones):
        raise UserError("nothing to analyze: give --model, --checkpoint, --milestones or --compare NAME=SOURCE")
    if (args.suggest is None) != (args.student is None):
        raise UserError("--suggest N and --student MODEL need each other: give both")
    return args


@dataclasses.dataclass
class Subject:
    """A model to analyze. `analyze` adds the measurements and drops the network."""

    name: str
    model: str  # its name in timm
    weights: str  # a file or URL, "timm" or "random"
    input_size: int
    run: dict  # flags of the training run that the weights come from
    network: torch.nn.Module
    blocks: list[dict]  # "module", "reduction" and "shape" of each
    curves: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # one number per block
    profiles: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)  # one array per block
    ranks: dict = dataclasses.field(default_factory=dict)  # from `analyses.rank_analysis`, with published ones


def sources_of(args: argparse.Namespace) -> list[tuple[str | None, str | None, str | None]]:
    """Return (name, timm model, checkpoint) of each model to analyze, with None for what is not given."""
    if args.milestones:
        files = sorted(Path(args.milestones).glob("checkpoint_[0-9][0-9][0-9][0-9].pth"))
        if not files:
            raise UserError(f"--milestones {args.milestones} has no checkpoint_0009.pth etc.: train with --save-every")
        return [(f"epoch {int(file.stem[-4:]) + 1}", None, str(file)) for file in files]
    if args.compare:
        return [(name, *split_source(str(source))) for name, source in args.compare.items()]
    return [(None, args.model, args.checkpoint)]


def split_source(source: str) -> tuple[str | None, str]:
    """Return (timm model, checkpoint) of a run folder, a file, a URL, MODEL:CHECKPOINT or a timm model."""
    model, _, path = source.partition(":")
    if Path(source).exists() or path.startswith("//"):
        return None, source
    if model in ("hf-hub", "local-dir"):
        model, path = source, ""
    with as_user_error(f"{model} is neither a file nor a folder, and ", UserError):
        models.check_name(model)
    return model, path


def read_subject(name: str | None, model: str | None, path: str | None, args: argparse.Namespace) -> Subject:
    """Build a model and load its weights: those of a checkpoint, timm's own, or random ones.

    Raises:
        UserError: there is no such file or model, or the two do not fit.
    """
    run: dict[str, Any] = {}
    if path:
        path = str(Path(path) / CheckpointFolder.LATEST) if Path(path).is_dir() else path
        checkpoint = load_checkpoint(path)
        with as_user_error(f"{path}: ", UserError):
            weights = extract_weights(checkpoint, ema=args.ema)
        run = stored_args(checkpoint)
        model = model or run.get("model") or args.model
        if not model:
            raise UserError(f"{path} does not name its model: give --model, or MODEL:{path}")
    kwargs = stored_kwargs(run.get("model_kwargs", {})) if model == run.get("model") else args.model_kwargs
    size = args.input_size or run.get("input_size")
    utils.seed_everything(args.seed)
    with as_user_error(f"{name or model}: ", UserError, ValueError):
        pretrained = not (path or args.random)
        network = models.build_model(model, None, input_size=size, kwargs=kwargs, pretrained=pretrained).eval()
        if path:  # the head may have any number of classes, because blocks do not depend on it
            models.load_weights(network, weights, head="fresh")
        blocks = spectral.describe_blocks(network)
    size = size or network.pretrained_cfg["input_size"][-1]
    source = path or ("random" if args.random else "timm")
    return Subject(name or model, model, source, size, run, network, blocks)


def build_data(args: argparse.Namespace, subjects: list[Subject]) -> tuple[torch.utils.data.Dataset, dict]:
    """Return the validation set, without a transform, and {"data_set", "crop_ratio", "order", "images": indices}.

    What the flags do not set is that of the first training run among the subjects. The crop ratio is "own" for each
    model's own transform.
    """
    run = next((subject.run for subject in subjects if subject.run.get("data_set")), {})
    name = args.data_set or run.get("data_set", "IMNET")
    crop = args.eval_crop_ratio or run.get("eval_crop_ratio", 0.875)
    run = run if name == run.get("data_set") else {}
    path = args.data_path or run.get("data_path")
    if name != "GRATINGS" and not path:
        raise UserError(f"--data-set {name} needs --data-path, the folder of its images")
    category = run.get("inat_category", "name")
    _, size = run.get("gratings_sizes") or (None, None)
    with as_user_error("", ValueError, OSError, RuntimeError):
        dataset = datasets.build_dataset(name, "val", path, inat_category=category, num_images=size)
    order = args.order or ("classes" if args.ranks else "drawn")
    count = min(args.num_images or (1000 if args.ranks else 32), len(dataset))
    if order == "classes":
        images = analyses.one_of_each_class(datasets.labels(dataset), count)
    else:
        images = list(range(count)) if order == "first" else samplers.random_subset(len(dataset), count, args.seed)
    return dataset, {"data_set": name, "crop_ratio": crop, "order": order, "images": images}


@torch.no_grad()
def feature_maps(subject: Subject, dataset, data: dict, device, args) -> Iterator[list[torch.Tensor]]:
    """Run a model on the images, and yield the maps (B, C, H, W) of its blocks for each batch."""
    network = subject.network.to(device)
    with as_user_error(f"{subject.name}: ", ValueError):
        hooks = spectral.FeatureHooks(network, range(len(subject.blocks)))
    if data["crop_ratio"] == "own":
        dataset.transform = datasets.own_eval_transform(network, subject.input_size)
    else:
        dataset.transform = datasets.eval_transform(subject.input_size, data["crop_ratio"])
    prepare = datasets.Prepare(*models.normalization(network), device=device)
    workers = min(args.num_workers, math.ceil(len(data["images"]) / args.batch_size))
    loader = datasets.build_loader(dataset, data["images"], args.batch_size, workers, drop_last=False)
    with as_user_error("", datasets.BadImageError):
        for images, _ in tqdm(loader, desc=subject.name, unit="batch", disable=None):
            with forward_errors(subject.name, subject.input_size):
                network(prepare(images.to(device)))
                maps = hooks.pop()
            yield maps
    hooks.remove()


def analyze(subject: Subject, dataset, data: dict, device: torch.device, args: argparse.Namespace) -> Subject:
    """Run a model on the images and add its measurements. Memory does not grow with the number of images."""
    batches = functools.partial(feature_maps, subject, dataset, data, device, args)
    profiles = [spectral.SpectralProfile(args.seed) for _ in subject.blocks]
    for maps in batches():
        for profile, block_maps in zip(profiles, maps, strict=True):
            profile.add(block_maps)
    measured = [profile.result() for profile in profiles]
    subject.curves = {key: np.array([block[key].item() for block in measured]) for key in CURVES}
    subject.profiles = {key: [block[key].numpy() for block in measured] for key in PROFILES}
    if not np.isfinite(subject.curves["rms"]).all():
        raise UserError(f"{subject.name}: the features are not finite: use other weights")
    if args.entropy:
        subject.curves |= {key: curve.numpy() for key, curve in analyses.entropy_over_depth(batches).items()}
    if args.ranks:
        subject.ranks = analyses.rank_analysis(lambda: (maps[-1] for maps in batches()), args.seed)
        subject.ranks["published"] = published_ranks(subject.model) if data["data_set"] == "IMNET" else {}
    subject.blocks = [
        {"module": block["module"], "reduction": block["reduction"], "shape": profile.shape}
        for block, profile in zip(subject.blocks, profiles, strict=True)
    ]
    subject.network = None  # there may be many milestones
    return subject


def published_ranks(model: str) -> dict[str, list[int]]:
    """Return the published ranks of a timm model on ImageNet, {"svd": [...], "pca": [...]}, or {}."""
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["ranks"]
    config = models.pretrained_config(model)
    return next((ranks for name, ranks in published.items() if models.pretrained_config(name) == config), {})


def log_curves(subject: Subject) -> None:
    """Print one line per block."""
    model = "" if subject.name == subject.model else f"{subject.model}, "
    utils.log(f"\n{subject.name}: {model}weights {subject.weights}, {subject.input_size} pixels")
    columns = "".join(f"{name:>11}" for name in ("intensity", "shuffled", "x sqrt(C)", "RMS"))
    utils.log(f"{'block':>5}  {'module':<16}{'C x H x W':>15}{columns}")
    for i, block in enumerate(subject.blocks):
        numbers = "".join(f"{subject.curves[key][i]:>11.4g}" for key in CURVES)
        utils.log(f"{i:>5}  {block['module']:<16}{' x '.join(map(str, block['shape'])):>15}{numbers}")


def log_ranks(subject: Subject) -> None:
    """Print the dimensions of the last block next to the published ones."""
    images, cap, width = (subject.ranks[key] for key in ("images", "cap", "width"))
    utils.log(f"\n{subject.name}: dimensions with a given share of the energy of the last block's tokens")
    utils.log(f"99th percentile over {images} images; at most {cap} for SVD and {width} for PCA")
    utils.log("\n".join(analyses.rank_table(subject.ranks, subject.ranks["published"])))


def log_milestones(subjects: list[Subject]) -> None:
    """Print the intensity of each block, one line per epoch."""
    utils.log(f"\nintensity of blocks 0 to {len(subjects[0].blocks) - 1}")
    for subject in subjects:
        utils.log(f"{subject.name:<11}{''.join(f'{value:>8.3g}' for value in subject.curves['intensity'])}")


def pair_chooser(args: argparse.Namespace, teacher: Subject) -> Callable[[list[float]], tuple[list, list]]:
    """Return a function: intensity of the teacher's blocks -> (student ids, teacher ids)."""
    student = models.build_model(args.student, None, input_size=None, kwargs=args.student_kwargs)
    with as_user_error("--student: ", ValueError):
        described = spectral.describe_blocks(student), teacher.blocks
    reductions = ([block["reduction"] for block in blocks] for blocks in described)
    options = dict(zip(("student", "teacher"), reductions, strict=True))
    choose = functools.partial(analyses.suggest_pairs, **options, num_pairs=args.suggest)
    with as_user_error("--suggest: ", ValueError):
        choose([0.0] * len(teacher.blocks))  # are there enough blocks?
    return choose


def suggest(args: argparse.Namespace, choose: Callable[[list[float]], tuple[list, list]], teacher: Subject) -> dict:
    """Choose pairs, and print them with the curve on which they are based."""
    intensity = teacher.curves["intensity_corrected"].tolist()
    s_id, t_id = choose(intensity)
    utils.log(f"\n{teacher.name} teaches {args.student}: intensity x sqrt(C) of the teacher's blocks, and pairs")
    for i, value in enumerate(intensity):
        partner = f"  <- student {s_id[t_id.index(i)]}" if i in t_id else ""
        utils.log(f"{i:>5} {value:>10.4g}  {'#' * round(40 * value / max(intensity)):<40}{partner}".rstrip())
    share = sum(intensity[i] for i in t_id) / sum(intensity)
    utils.log(f"Of all ways to take {len(t_id)} blocks from the two ends, these have the largest sum ({share:.1%}).")
    utils.log(f"--s-id {' '.join(map(str, s_id))} --t-id {' '.join(map(str, t_id))}")
    return {"student": args.student, "teacher": teacher.name, "s_id": s_id, "t_id": t_id}


def write_numbers(folder: Path, subjects: list[Subject], about: dict) -> None:
    """Write spectra.npz (see KEYS), spectra.json with `about`, the models and one number per block, and ranks.json."""
    arrays: dict[str, np.ndarray] = {}
    plain: list[dict[str, Any]] = []
    for subject in subjects:
        arrays[f"{subject.name}/shape"] = np.array([block["shape"] for block in subject.blocks])
        arrays |= {f"{subject.name}/{key}": curve for key, curve in subject.curves.items()}
        for key, profile in subject.profiles.items():
            arrays |= {f"{subject.name}/{key}/{i}": values for i, values in enumerate(profile)}
        facts = {key: getattr(subject, key) for key in ("name", "model", "weights", "input_size")}
        columns = zip(*subject.curves.values(), strict=True)
        numbers = [dict(zip(subject.curves, column, strict=True)) for column in columns]
        plain.append({**facts, "blocks": [block | own for block, own in zip(subject.blocks, numbers, strict=True)]})
    np.savez_compressed(folder / "spectra.npz", **arrays)
    documents = {"spectra": {**about, "models": plain, "keys_of_spectra_npz": KEYS}}
    if subjects[0].ranks:
        ranks = {subject.name: {"model": subject.model, **subject.ranks} for subject in subjects}
        documents["ranks"] = {**about, "shares": analyses.SHARES, "percentile": 99, "models": ranks}
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def write_tensorboard(folder: Path, subjects: list[Subject], figures: dict[str, Figure]) -> None:
    """Write the figures, and the curves over blocks as a run per model, so that models share charts."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    shutil.rmtree(folder, ignore_errors=True)  # or charts of an earlier analysis would be mixed in
    for subject in subjects:
        with SummaryWriter(str(folder / subject.name)) as writer:
            for key, curve in subject.curves.items():
                for i, value in enumerate(curve):
                    writer.add_scalar(f"block/{key}", value, i)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure)


def main(args: argparse.Namespace) -> None:
    device = init_distributed(args.device)
    if args.import_module:
        models.import_models(args.import_module)
    sources = sources_of(args)
    ahead = 1 if args.milestones else len(sources)  # milestones are loaded one at a time, other models checked first
    subjects = [read_subject(*source, args) for source in sources[:ahead]]
    choose = pair_chooser(args, subjects[0]) if args.suggest else None
    dataset, data = build_data(args, subjects)
    folder = Path(args.output_dir)
    with as_user_error(f"--output_dir {folder} cannot be written: ", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    which = ORDERS[data["order"]].format(args.seed)
    utils.log(f"{len(data['images'])} validation images of {data['data_set']}, {which}")
    later = (read_subject(*source, args) for source in sources[ahead:])
    subjects = [analyze(subject, dataset, data, device, args) for subject in itertools.chain(subjects, later)]
    if args.milestones:
        log_milestones(subjects)
    for subject in subjects:
        if not args.milestones:
            log_curves(subject)
        if args.ranks:
            log_ranks(subject)
    pairs = suggest(args, choose, subjects[0]) if choose else None
    if not args.output_dir:
        return
    with as_user_error(f"--output_dir {folder}: ", OSError):
        write_numbers(folder, subjects, {**data, "seed": args.seed, "suggestion": pairs})
        figures = plots.draw_milestones(subjects) if args.milestones else plots.draw(subjects)
        for name, kind in itertools.product(figures, ("png", "pdf")[: 1 + args.pdf]):
            figures[name].savefig(folder / f"{name}.{kind}")
        write_tensorboard(folder / "tensorboard", subjects, figures)
    utils.log(f"wrote the numbers and figures to {folder}")


if __name__ == "__main__":
    with exit_codes():
        main(parse_args())
