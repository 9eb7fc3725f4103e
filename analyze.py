"""Spectral analysis of timm models: how strong each block's features are, at which frequencies, and which to pair.

    python analyze.py --model cait_s24_224 --data-path ILSVRC2012 --output_dir Output/analysis/cait
    python analyze.py --compare teacher=cait_s24_224 student=Output/DeiT-Tiny --data-path ILSVRC2012 --output_dir ...

The measures are those of section 3 of arXiv 2412.19055, next to controls. `KEYS` documents the numbers written.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import datasets
import models
import plots
import samplers
import spectral
import utils
from builders import forward_errors
from checkpoint import CheckpointFolder
from faults import exit_codes, init_distributed
from flags import DATA_SETS, INAT_CATEGORIES, KeyValues, Parser, number, stored_kwargs
from utils import UserError, as_user_error
from weights import extract_weights, load_checkpoint, stored_args

KEYS = {
    "NAME/intensity": "(blocks,) mean over the C bins of the layer-wise spectrum; unit of the features",
    "NAME/intensity_shuffled": "(blocks,) the same after one random permutation of the channels",
    "NAME/intensity_corrected": "(blocks,) intensity x sqrt(C), for comparing widths",
    "NAME/rms": "(blocks,) root mean square of the features; intensity_corrected is at most this",
    "NAME/shape": "(blocks, 3) channels C, height H and width W of the block's map",
    "NAME/spectrum/BLOCK": "(C,) layer-wise spectrum S; bin k is k / C cycles per channel; unit of the features",
    "NAME/radial_frequency/BLOCK": "(R,) radius of each ring of the 2-D spectrum over the grid, cycles per token",
    "NAME/radial_power/BLOCK": "(R,) mean power in that ring, squared unit of the features",
}
CURVES = ("intensity", "intensity_shuffled", "intensity_corrected", "rms")
PROFILES = ("spectrum", "radial_frequency", "radial_power")


def get_args_parser() -> Parser:
    parser = Parser("Spectral analysis of the blocks of timm models.")
    kwargs: dict[str, Any] = {"nargs": "*", "action": KeyValues, "default": {}, "metavar": "KEY=VALUE"}
    add = parser.add_argument_group("models").add_argument
    add("--model", help="timm model, with timm's own weights unless --checkpoint or --random is given")
    add("--model-kwargs", **kwargs, help="its arguments, unless a checkpoint stores them")
    add("--checkpoint", help="run folder of main.py, file of weights (ours, DeiT's, bare, safetensors), or URL")
    add("--ema", action="store_true", help="take the moving average of the weights from checkpoints")
    add("--random", action="store_true", help="random weights instead of timm's own")
    named = kwargs | {"metavar": "NAME=SOURCE"}
    add("--compare", **named, help="models on the same images; SOURCE: a --checkpoint, MODEL:CHECKPOINT or timm model")
    add = parser.add_argument_group("data").add_argument
    add("--data-set", choices=DATA_SETS, help="data set; default: that of the first run, or IMNET")
    add("--data-path", help="its folder, of which val/ is enough; default: that of the first run")
    add("--inat-category", choices=INAT_CATEGORIES, help="level used as the class (INAT*); default: name")
    add("--input-size", type=number(int, 1), help="side of the images in pixels; default: each model's own")
    add("--eval-crop-ratio", type=number(float, 0.01, 1), help="center crop ratio; default: the first run's, or 0.875")
    add("--num-images", type=number(int, 1), default=32, help="number of validation images, drawn using --seed")
    add("--first", action="store_true", help="take the first images, as in the paper; in ImageNet all of one class")
    add("--batch-size", type=number(int, 1), default=64, help="images per batch")
    add("--num_workers", "--num-workers", type=number(int, 0), default=10, help="loader processes")
    add = parser.add_argument_group("pairs of blocks").add_argument
    add("--suggest", type=number(int, 1), metavar="N", help="print N pairs (--s-id, --t-id); the first model teaches")
    add("--student", help="timm model to suggest pairs for")
    add("--student-kwargs", **kwargs, help="its arguments")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", "--output-dir", default="", help="folder for numbers and figures; default: print only")
    add("--import", dest="import_module", metavar="MODULE", help="module that registers models with timm")
    add("--pdf", action="store_true", help="write the figures as PDF as well")
    add("--device", default="auto", help="cuda, cuda:N or cpu; auto: cuda if there is a GPU")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of images, shuffled channels and random weights")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Check flags against each other before any data or model is touched."""
    if not (args.model or args.checkpoint or args.compare):
        raise UserError("nothing to analyze: give --model, --checkpoint or --compare NAME=SOURCE")
    if args.checkpoint and (args.compare or args.random):
        raise UserError("--checkpoint cannot be combined with --compare or --random: use --compare NAME=CHECKPOINT")
    if (args.suggest is None) != (args.student is None):
        raise UserError("--suggest N and --student MODEL need each other: give both")


@dataclasses.dataclass
class Subject:
    """A model to analyze. `analyze` adds to each block its shape and the results of its `SpectralProfile`."""

    name: str
    model: str
    weights: str
    input_size: int
    blocks: list[dict]
    network: torch.nn.Module
    run: dict = dataclasses.field(default_factory=dict)  # flags of the training run that the weights come from

    def curve(self, key: str) -> np.ndarray:
        """Return one number per block."""
        return np.array([float(block[key]) for block in self.blocks])


def read_subject(name: str | None, source: str, args: argparse.Namespace) -> Subject:
    """Build a model from a run folder, a file, a URL, MODEL:CHECKPOINT or the name of a timm model.

    Raises:
        UserError: there is no such file or model, or they do not fit each other.
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
        if weights is not None:  # blocks do not depend on the head, so any number of classes will do
            models.load_weights(network, weights, head="fresh")
        blocks = spectral.describe_blocks(network)
    size = size or network.pretrained_cfg["input_size"][-1]
    return Subject(name or model, model, path or ("timm" if timms else "random"), size, blocks, network, run)


def build_data(args: argparse.Namespace, subjects: list[Subject]) -> tuple[torch.utils.data.Dataset, dict]:
    """Return the validation set, without a transform, and {"data_set", "crop_ratio", "images": indices}.

    The first training run among the subjects provides what the flags leave open.
    """
    run = next((subject.run for subject in subjects if subject.run.get("data_set")), {})
    name = args.data_set or run.get("data_set", "IMNET")
    crop_ratio = args.eval_crop_ratio or run.get("eval_crop_ratio", 0.875)
    run = run if name == run.get("data_set") else {}
    path = args.data_path or run.get("data_path")
    if name != "GRATINGS" and not path:
        raise UserError(f"--data-set {name} needs --data-path, the folder of its images")
    category = args.inat_category or run.get("inat_category", "name")
    _, size = run.get("gratings_sizes") or (None, None)
    with as_user_error("", ValueError, OSError, RuntimeError):
        dataset = datasets.build_dataset(name, "val", path, inat_category=category, num_images=size)
    drawn = samplers.random_subset(len(dataset), args.num_images, args.seed)
    images = list(range(len(drawn))) if args.first else drawn
    return dataset, {"data_set": name, "crop_ratio": crop_ratio, "images": images}


@torch.no_grad()
def analyze(subject: Subject, dataset, data: dict, device: torch.device, args: argparse.Namespace) -> None:
    """Run one model over the images and add the results to its blocks. Memory does not grow with the images."""
    with as_user_error(f"{subject.name}: ", ValueError):
        hooks = spectral.FeatureHooks(subject.network.to(device), range(len(subject.blocks)))
    dataset.transform = datasets.eval_transform(subject.input_size, data["crop_ratio"])
    mean, std = models.normalization(subject.network)
    prepare = datasets.Prepare(mean, std, device=device)
    profiles = [spectral.SpectralProfile(args.seed) for _ in subject.blocks]
    workers = min(args.num_workers, math.ceil(len(data["images"]) / args.batch_size))
    pin = device.type == "cuda"
    loader = datasets.build_loader(dataset, data["images"], args.batch_size, workers, drop_last=False, pin_memory=pin)
    with as_user_error("", datasets.BadImageError):
        for images, _ in tqdm(loader, desc=subject.name, unit="batch", disable=None):
            with forward_errors(subject.name, subject.input_size):
                subject.network(prepare(images.to(device)))
                maps = hooks.pop()
            for profile, block_maps in zip(profiles, maps, strict=True):
                profile.add(block_maps)
    subject.network.cpu()
    subject.blocks = [
        {"module": block["module"], "reduction": block["reduction"], "shape": profile.shape, **profile.result()}
        for block, profile in zip(subject.blocks, profiles, strict=True)
    ]
    if not np.isfinite(subject.curve("rms")).all():
        raise UserError(f"{subject.name}: its features are not finite: use other weights")


def log_curves(subject: Subject) -> None:
    """Print one line per block."""
    utils.log(f"\n{subject.name}: {subject.model}, weights {subject.weights}, {subject.input_size} pixels")
    columns = "".join(f"{name:>11}" for name in ("intensity", "shuffled", "x sqrt(C)", "RMS"))
    utils.log(f"{'block':>5}  {'module':<16}{'C x H x W':>15}{columns}")
    for i, block in enumerate(subject.blocks):
        curves = "".join(f"{float(block[key]):>11.4g}" for key in CURVES)
        utils.log(f"{i:>5}  {block['module']:<16}{' x '.join(map(str, block['shape'])):>15}{curves}")


def suggest_pairs(intensity: list[float], student: list[int], teacher: list[int], num_pairs: int) -> tuple[list, list]:
    """Choose the blocks at the two ends of the teacher with the largest summed intensity, and partners for them.

    If sums are equal, the most even split wins. If both models have stages, the last blocks of stages of equal
    resolution are paired. Otherwise a deeper student uses its blocks at the same relative depth, and any other student
    as many of its first and of its last blocks, because blocks at the same relative depth could coincide.

    Args:
        intensity: of the teacher's blocks, comparable across widths.
        student, teacher: reduction of each block, in input pixels per token.
        num_pairs: how many to choose; a UserError if there are fewer blocks.

    Returns:
        (student ids, teacher ids), ascending and without repeats.
    """
    s_from, t_from, unit = [*range(len(student))], [*range(len(teacher))], "blocks"
    if len(set(student)) > 1 and len(set(teacher)) > 1:
        common, unit = sorted(set(student) & set(teacher)), "stages of equal resolution"
        s_from, t_from = ([max(i for i, r in enumerate(net) if r == c) for c in common] for net in (student, teacher))
    for who, found in (("student", s_from), ("teacher", t_from)):
        if num_pairs > len(found):
            raise UserError(f"--suggest {num_pairs}: the {who} has only {len(found)} {unit}: ask for fewer")
    depth, extra = len(t_from), len(s_from) - len(t_from)

    def ends(first):
        return [*range(first), *range(depth - (num_pairs - first), depth)]

    def rank(first):
        return math.fsum(intensity[t_from[i]] for i in ends(first)), -abs(2 * first - num_pairs)

    first = max(range(num_pairs + 1), key=rank)
    if extra > 0:
        partners = [round(i * (len(s_from) - 1) / max(depth - 1, 1)) for i in ends(first)]
    else:
        partners = [i if i < first else i + extra for i in ends(first)]
    return [s_from[i] for i in partners], [t_from[i] for i in ends(first)]


def suggest(args: argparse.Namespace, student_blocks: list[dict], teacher: Subject) -> dict:
    """Choose the pairs, and print them with the curve they are based on."""
    intensity = teacher.curve("intensity_corrected").tolist()
    student, taught = ([block["reduction"] for block in blocks] for blocks in (student_blocks, teacher.blocks))
    s_id, t_id = suggest_pairs(intensity, student, taught, args.suggest)
    utils.log(f"\n{args.student} taught by {teacher.name}: intensity x sqrt(C) of the teacher's blocks, and the pairs")
    for i, value in enumerate(intensity):
        partner = f"<- student {s_id[t_id.index(i)]}" if i in t_id else ""
        utils.log(f"{i:>5} {value:>10.4g}  {'#' * round(40 * value / max(intensity)):<40}  {partner}")
    share = sum(intensity[i] for i in t_id) / sum(intensity)
    utils.log(f"No other {len(t_id)} blocks at the two ends have a larger sum; it is {share:.1%} of the total.")
    utils.log(f"--s-id {' '.join(map(str, s_id))} --t-id {' '.join(map(str, t_id))}")
    return {"student": args.student, "teacher": teacher.name, "s_id": s_id, "t_id": t_id}


def write_numbers(folder: Path, subjects: list[Subject], about: dict) -> None:
    """Write spectra.npz (see KEYS), and spectra.json with `about`, the models and one number per block."""
    arrays: dict[str, Any] = {}
    plain: list[dict[str, Any]] = []
    for subject in subjects:
        arrays[f"{subject.name}/shape"] = np.array([block["shape"] for block in subject.blocks])
        arrays |= {f"{subject.name}/{key}": subject.curve(key) for key in CURVES}
        for i, block in enumerate(subject.blocks):
            arrays |= {f"{subject.name}/{key}/{i}": block[key].numpy() for key in PROFILES}
        plain.append({key: getattr(subject, key) for key in ("name", "model", "weights", "input_size")})
        plain[-1]["blocks"] = [{k: v for k, v in block.items() if k not in PROFILES} for block in subject.blocks]
    text = json.dumps({**about, "models": plain, "keys_of_spectra_npz": KEYS}, indent=1, default=torch.Tensor.tolist)
    utils.write_atomically(folder / "spectra.npz", lambda file: np.savez_compressed(file, **arrays))
    utils.write_atomically(folder / "spectra.json", lambda file: file.write(text.encode()))


def write_tensorboard(folder: Path, subjects: list[Subject], figures: dict[str, Figure]) -> None:
    """Write the figures, and the curves over blocks as one run per model so that models share their charts."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    shutil.rmtree(folder, ignore_errors=True)  # charts of an earlier analysis would mix with these
    for subject in subjects:
        with SummaryWriter(str(folder / subject.name)) as writer:
            for key in CURVES:
                for i, value in enumerate(subject.curve(key)):
                    writer.add_scalar(f"block/{key}", value, i)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure)


def main(args: argparse.Namespace) -> None:
    device = init_distributed(args.device)
    if args.import_module:
        models.import_models(args.import_module)
    sources = args.compare.items() or [
        (None, f"{args.model}:{args.checkpoint or ''}" if args.model else args.checkpoint)
    ]
    subjects = [read_subject(name, str(source), args) for name, source in sources]
    if args.suggest:
        student = models.build_model(args.student, None, input_size=None, kwargs=args.student_kwargs)
        with as_user_error("--student: ", ValueError):
            student_blocks = spectral.describe_blocks(student)
    dataset, data = build_data(args, subjects)
    folder = Path(args.output_dir)
    with as_user_error(f"--output_dir {folder} cannot be written: ", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    which = "the first" if args.first else f"drawn by seed {args.seed}"
    utils.log(f"{len(data['images'])} validation images of {data['data_set']}, {which}")
    for subject in subjects:
        analyze(subject, dataset, data, device, args)
    for subject in subjects:
        log_curves(subject)
    pairs = suggest(args, student_blocks, subjects[0]) if args.suggest else None
    if not args.output_dir:
        return
    with as_user_error(f"--output_dir {folder}: ", OSError), matplotlib.rc_context(plots.STYLE):
        write_numbers(folder, subjects, {**data, "seed": args.seed, "suggestion": pairs})
        figures = plots.draw(subjects, pairs)
        for name, kind in itertools.product(figures, ("png", "pdf")[: 1 + args.pdf]):
            save = functools.partial(figures[name].savefig, format=kind, dpi=200)
            utils.write_atomically(folder / f"{name}.{kind}", save)
        write_tensorboard(folder / "tensorboard", subjects, figures)
    utils.log(f"wrote spectra.npz, spectra.json, {', '.join(f'{name}.png' for name in figures)} to {folder}")


if __name__ == "__main__":
    with exit_codes():
        arguments = get_args_parser().parse_args()
        check_args(arguments)
        main(arguments)
