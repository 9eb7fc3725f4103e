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

import matplotlib
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
from flags import DATA_SETS, INAT_CATEGORIES
from parsing import KeyValues, Parser, number, stored_kwargs
from utils import UserError, as_user_error
from weights import extract_weights, load_checkpoint, model_config, stored_args

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
ENTROPY = ("entropy", "entropy_own_range", "magnitude")
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
    add = parser.add_argument_group("models").add_argument
    add("--model", help="timm model, with timm's own weights unless --checkpoint or --random is given")
    add("--model-kwargs", **kwargs, help="timm model arguments, unless a checkpoint has them")
    add("--checkpoint", help="run folder of main.py, or file or URL of weights")
    add("--ema", action="store_true", help="use the moving average of the weights in checkpoints")
    add("--random", action="store_true", help="use random weights instead of timm's")
    named = kwargs | {"metavar": "NAME=SOURCE"}
    add("--milestones", metavar="FOLDER", help="run folder; compare the checkpoints that --save-every kept")
    add("--compare", **named, help="models on the same images; SOURCE: a --checkpoint, MODEL:CHECKPOINT or timm model")
    add = parser.add_argument_group("data").add_argument
    add("--data-set", choices=DATA_SETS, help="data set; default: the first run's, or IMNET")
    add("--data-path", help="folder of the data set, val/ is enough; default: the first run's")
    add("--inat-category", choices=INAT_CATEGORIES, help="taxonomic level of the classes (INAT*); default: name")
    add("--input-size", type=number(int, 1), help="image size in pixels; default: each model's own")
    ratio = (
        "center crop ratio, or own: crop and interpolation of each model's config; default: the first run's, or 0.875"
    )
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
    add(
        "--suggest",
        type=number(int, 1),
        metavar="N",
        help="print N pairs as --s-id and --t-id; the teacher is the first model",
    )
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
    if args.checkpoint and (args.compare or args.random):
        raise UserError("--checkpoint cannot be combined with --compare or --random: use --compare NAME=CHECKPOINT")
    if args.milestones and (args.checkpoint or args.compare or args.random or args.suggest):
        raise UserError("--milestones cannot be combined with --checkpoint, --compare, --random or --suggest")
    if (args.suggest is None) != (args.student is None):
        raise UserError("--suggest N and --student MODEL need each other: give both")
    return args


@dataclasses.dataclass
class Subject:
    """A model to analyze. `analyze` adds the measurements and drops the network."""

    name: str
    model: str
    weights: str
    input_size: int
    blocks: list[dict]
    network: torch.nn.Module
    run: dict = dataclasses.field(default_factory=dict)  # flags of the training run that the weights come from
    ranks: dict = dataclasses.field(default_factory=dict)  # from `analyses.rank_analysis`, with published ones

    def curve(self, key: str) -> np.ndarray:
        """Return one number per block."""
        return np.array([float(block[key]) for block in self.blocks])


def sources_of(args: argparse.Namespace) -> list[tuple[str | None, str]]:
    """Return the name and source of each model to analyze."""
    if args.milestones:
        files = sorted(Path(args.milestones).glob("checkpoint_[0-9][0-9][0-9][0-9].pth"))
        if not files:
            raise UserError(f"--milestones {args.milestones} has no checkpoint_0009.pth etc.: train with --save-every")
        return [(f"epoch {int(file.stem[-4:]) + 1}", str(file)) for file in files]
    one = f"{args.model}:{args.checkpoint or ''}" if args.model else args.checkpoint
    return [(name, str(source)) for name, source in args.compare.items()] or [(None, one)]


def read_subject(name: str | None, source: str, args: argparse.Namespace) -> Subject:
    """Build a model from a run folder, a file, a URL, MODEL:CHECKPOINT or the name of a timm model.

    Raises:
        UserError: there is no such file or model, or the two do not fit.
    """
    model, _, path = source.partition(":")
    if Path(source).exists() or path.startswith("//"):
        model, path = "", source
    else:
        with as_user_error(f"{model} is neither a file nor a folder, and ", UserError):
            models.check_name(model)
    kwargs, weights, run = args.model_kwargs, None, {}
    if path:
        path = str(Path(path) / CheckpointFolder.LATEST) if Path(path).is_dir() else path
        checkpoint = load_checkpoint(path)
        with as_user_error(f"{path}: ", UserError):
            weights = extract_weights(checkpoint, ema=args.ema)
        run = stored_args(checkpoint)
        model = model or run.get("model") or args.model
        if not model:
            raise UserError(f"{path} does not name its model: give --model, or MODEL:{path}")
        kwargs = stored_kwargs(run.get("model_kwargs", {})) if model == run.get("model") else kwargs
    size = args.input_size or run.get("input_size")
    utils.seed_everything(args.seed)
    with as_user_error(f"{name or model}: ", UserError, ValueError):
        timms = not (path or args.random)
        network = models.build_model(model, None, input_size=size, kwargs=kwargs, pretrained=timms).eval()
        if weights is not None:  # the head may have any number of classes, because blocks do not depend on it
            models.load_weights(network, weights, head="fresh")
        blocks = spectral.describe_blocks(network)
    size = size or network.pretrained_cfg["input_size"][-1]
    return Subject(name or model, model, path or ("timm" if timms else "random"), size, blocks, network, run)


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
    category = args.inat_category or run.get("inat_category", "name")
    _, size = run.get("gratings_sizes") or (None, None)
    with as_user_error("", ValueError, OSError, RuntimeError):
        dataset = datasets.build_dataset(name, "val", path, inat_category=category, num_images=size)
    order = args.order or ("classes" if args.ranks else "drawn")
    number = min(args.num_images or (1000 if args.ranks else 32), len(dataset))
    if order == "classes":
        images = analyses.one_of_each_class(datasets.labels(dataset), number)
    else:
        images = list(range(number)) if order == "first" else samplers.random_subset(len(dataset), number, args.seed)
    return dataset, {"data_set": name, "crop_ratio": crop, "order": order, "images": images}


def map_reader(subject: Subject, dataset, data: dict, device, args) -> Callable[[], Iterator[list[torch.Tensor]]]:
    """Return a function that runs a model on the images and yields the maps of all blocks for each batch."""
    with as_user_error(f"{subject.name}: ", ValueError):
        hooks = spectral.FeatureHooks(subject.network.to(device), range(len(subject.blocks)))
    if data["crop_ratio"] == "own":
        dataset.transform = datasets.own_eval_transform(subject.network, subject.input_size)
    else:
        dataset.transform = datasets.eval_transform(subject.input_size, data["crop_ratio"])
    mean, std = models.normalization(subject.network)
    prepare = datasets.Prepare(mean, std, device=device)
    workers = min(args.num_workers, math.ceil(len(data["images"]) / args.batch_size))
    pin = device.type == "cuda"
    loader = datasets.build_loader(dataset, data["images"], args.batch_size, workers, drop_last=False, pin_memory=pin)

    def batches():
        with as_user_error("", datasets.BadImageError):
            for images, _ in tqdm(loader, desc=subject.name, unit="batch", disable=None):
                with forward_errors(subject.name, subject.input_size):
                    subject.network(prepare(images.to(device)))
                    maps = hooks.pop()
                yield maps

    return batches


@torch.no_grad()
def analyze(subject: Subject, dataset, data: dict, device: torch.device, args: argparse.Namespace) -> None:
    """Run a model on the images and add its measurements. Memory does not grow with the number of images."""
    batches = map_reader(subject, dataset, data, device, args)
    profiles = [spectral.SpectralProfile(args.seed) for _ in subject.blocks]
    for maps in batches():
        for profile, block_maps in zip(profiles, maps, strict=True):
            profile.add(block_maps)
    subject.blocks = [
        {"module": block["module"], "reduction": block["reduction"], "shape": profile.shape, **profile.result()}
        for block, profile in zip(subject.blocks, profiles, strict=True)
    ]
    if not np.isfinite(subject.curve("rms")).all():
        raise UserError(f"{subject.name}: the features are not finite: use other weights")
    if args.entropy:
        for key, curve in analyses.entropy_over_depth(batches).items():
            for block, value in zip(subject.blocks, curve, strict=True):
                block[key] = value
    if args.ranks:
        found = analyses.rank_analysis(lambda: (maps[-1] for maps in batches()), args.seed)
        subject.ranks = found | {"published": published_ranks(subject) if data["data_set"] == "IMNET" else {}}
    subject.network = None  # there may be many milestones


def published_ranks(subject: Subject) -> dict[str, list[int]]:
    """Return the published ranks of a model on ImageNet, {"svd": [...], "pca": [...]}, or {}."""

    def identity(config):
        return config.get("architecture"), config.get("tag")

    own = identity(model_config(subject.network))
    for name, ranks in json.loads(PUBLISHED.read_text(encoding="utf-8"))["ranks"].items():
        if identity(models.pretrained_config(name)) == own and subject.weights != "random":
            return ranks
    return {}


def log_curves(subject: Subject) -> None:
    """Print one line per block."""
    model = "" if subject.name == subject.model else f"{subject.model}, "
    utils.log(f"\n{subject.name}: {model}weights {subject.weights}, {subject.input_size} pixels")
    columns = "".join(f"{name:>11}" for name in ("intensity", "shuffled", "x sqrt(C)", "RMS"))
    utils.log(f"{'block':>5}  {'module':<16}{'C x H x W':>15}{columns}")
    for i, block in enumerate(subject.blocks):
        curves = "".join(f"{float(block[key]):>11.4g}" for key in CURVES)
        utils.log(f"{i:>5}  {block['module']:<16}{' x '.join(map(str, block['shape'])):>15}{curves}")


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
        utils.log(f"{subject.name:<11}{''.join(f'{value:>8.3g}' for value in subject.curve('intensity'))}")


def suggest(args: argparse.Namespace, student_blocks: list[dict], teacher: Subject) -> dict:
    """Choose pairs, and print them with the curve on which they are based."""
    intensity = teacher.curve("intensity_corrected").tolist()
    student, taught = ([block["reduction"] for block in blocks] for blocks in (student_blocks, teacher.blocks))
    with as_user_error("--suggest: ", ValueError):
        s_id, t_id = analyses.suggest_pairs(intensity, student, taught, args.suggest)
    utils.log(f"\n{teacher.name} teaches {args.student}: intensity x sqrt(C) of the teacher's blocks, and pairs")
    for i, value in enumerate(intensity):
        partner = f"  <- student {s_id[t_id.index(i)]}" if i in t_id else ""
        utils.log(f"{i:>5} {value:>10.4g}  {'#' * round(40 * value / max(intensity)):<40}{partner}".rstrip())
    share = sum(intensity[i] for i in t_id) / sum(intensity)
    utils.log(f"Of all choices from both ends, these {len(t_id)} have the largest sum: {share:.1%} of the total.")
    utils.log(f"--s-id {' '.join(map(str, s_id))} --t-id {' '.join(map(str, t_id))}")
    return {"student": args.student, "teacher": teacher.name, "s_id": s_id, "t_id": t_id}


def curves_of(subject: Subject) -> tuple[str, ...]:
    """Return the names of the measurements with one number per block."""
    return CURVES + tuple(key for key in ENTROPY if key in subject.blocks[0])


def write_numbers(folder: Path, subjects: list[Subject], about: dict) -> None:
    """Write spectra.npz (see KEYS), spectra.json with `about`, the models and one number per block, and ranks.json."""
    arrays: dict[str, Any] = {}
    plain: list[dict[str, Any]] = []
    for subject in subjects:
        arrays[f"{subject.name}/shape"] = np.array([block["shape"] for block in subject.blocks])
        arrays |= {f"{subject.name}/{key}": subject.curve(key) for key in curves_of(subject)}
        for i, block in enumerate(subject.blocks):
            arrays |= {f"{subject.name}/{key}/{i}": block[key].numpy() for key in PROFILES}
        plain.append({key: getattr(subject, key) for key in ("name", "model", "weights", "input_size")})
        plain[-1]["blocks"] = [{k: v for k, v in block.items() if k not in PROFILES} for block in subject.blocks]
    documents = {"spectra": {**about, "models": plain, "keys_of_spectra_npz": KEYS}}
    if subjects[0].ranks:
        percentiles = {subject.name: {"model": subject.model, **subject.ranks} for subject in subjects}
        documents["ranks"] = {**about, "shares": analyses.SHARES, "percentile": 99, "models": percentiles}
    utils.write_atomically(folder / "spectra.npz", lambda file: np.savez_compressed(file, **arrays))
    for name, document in documents.items():
        text = json.dumps(document, indent=1, default=torch.Tensor.tolist)
        utils.write_atomically(folder / f"{name}.json", lambda file, text=text: file.write(text.encode()))


def write_tensorboard(folder: Path, subjects: list[Subject], figures: dict[str, Figure]) -> None:
    """Write the figures, and the curves over blocks as a run per model, so that models share charts."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    shutil.rmtree(folder, ignore_errors=True)  # or charts of an earlier analysis would be mixed in
    for subject in subjects:
        with SummaryWriter(str(folder / subject.name)) as writer:
            for key in curves_of(subject):
                for i, value in enumerate(subject.curve(key)):
                    writer.add_scalar(f"block/{key}", value, i)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure)


def main(args: argparse.Namespace) -> None:
    device = init_distributed(args.device)
    if args.import_module:
        models.import_models(args.import_module)
    read = (read_subject(name, source, args) for name, source in sources_of(args))
    # Check all models before running the first one. Only one milestone at a time is in memory.
    subjects = list(itertools.islice(read, 1 if args.milestones else None))
    if args.suggest:
        student = models.build_model(args.student, None, input_size=None, kwargs=args.student_kwargs)
        with as_user_error("--student: ", ValueError):
            student_blocks = spectral.describe_blocks(student)
    dataset, data = build_data(args, subjects)
    folder = Path(args.output_dir)
    with as_user_error(f"--output_dir {folder} cannot be written: ", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    which = ORDERS[data["order"]].format(args.seed)
    utils.log(f"{len(data['images'])} validation images of {data['data_set']}, {which}")
    for subject in subjects:
        analyze(subject, dataset, data, device, args)
        subjects += itertools.islice(read, 1)  # the next milestone
    if args.milestones:
        log_milestones(subjects)
    else:
        for subject in subjects:
            log_curves(subject)
    if args.ranks:
        for subject in subjects:
            log_ranks(subject)
    pairs = suggest(args, student_blocks, subjects[0]) if args.suggest else None
    if not args.output_dir:
        return
    with as_user_error(f"--output_dir {folder}: ", OSError), matplotlib.rc_context(plots.STYLE):
        write_numbers(folder, subjects, {**data, "seed": args.seed, "suggestion": pairs})
        figures = plots.draw_milestones(subjects) if args.milestones else plots.draw(subjects, pairs)
        for name, kind in itertools.product(figures, ("png", "pdf")[: 1 + args.pdf]):
            save = functools.partial(figures[name].savefig, format=kind, dpi=200)
            utils.write_atomically(folder / f"{name}.{kind}", save)
        write_tensorboard(folder / "tensorboard", subjects, figures)
    files = ["spectra.npz", "spectra.json", *["ranks.json"] * args.ranks, *(f"{name}.png" for name in figures)]
    utils.log(f"wrote {', '.join(files)} to {folder}")


if __name__ == "__main__":
    with exit_codes():
        main(parse_args())
