"""Spectral analysis of timm models: how strong their blocks' features are, at which frequencies, and what to pair.

    python analyze.py --model cait_s24_224 --data-path ILSVRC2012 --output_dir Output/analysis/cait
    python analyze.py --compare teacher=cait_s24_224 student=Output/DeiT-Tiny --data-path ILSVRC2012 --output_dir ...

The measures are those of section 3 of arXiv 2412.19055, with controls beside them; `KEYS` says what is written.
"""

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import datasets
import models
import samplers
import spectral
import utils
from utils import Parser, key_values, number

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


def get_args_parser():
    parser = Parser("Spectral analysis of the blocks of timm models.")
    add = parser.add_argument_group("models").add_argument
    add("--model", help="any timm model, with timm's own weights unless --checkpoint or --random is given")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="its arguments, where no run names them")
    add("--checkpoint", help="a run folder of main.py, a file of weights (ours, DeiT's, bare, safetensors), or a URL")
    add("--ema", action="store_true", help="the moving average of the weights in checkpoints")
    add("--random", action="store_true", help="random weights instead of timm's own")
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME=SOURCE",
        help="models to see on the same images; SOURCE: as --checkpoint, MODEL:CHECKPOINT, or a timm model",
    )
    add = parser.add_argument_group("data").add_argument
    add("--data-set", choices=datasets.DATA_SETS, help="data set; default: that of the first run, or IMNET")
    add("--data-path", help="its folder, of which val/ is enough; default: that of the first run")
    add("--inat-category", choices=datasets.INAT_CATEGORIES, help="level that is the class (INAT*); default: name")
    add("--input-size", type=number(int, 1), help="side of the images, pixels; default: each model's own")
    share = number(float, 0.01, 1)
    add("--eval-crop-ratio", type=share, help="centre crop's part; default: the first run's, or 0.875")
    add("--num-images", type=number(int, 1), default=32, help="validation images, drawn by --seed from all")
    add("--first", action="store_true", help="the first ones instead, as in the paper; in ImageNet all of one class")
    add("--batch-size", type=number(int, 1), default=64, help="images a step")
    add("--num_workers", "--num-workers", type=number(int, 0), default=10, help="loader processes")
    add = parser.add_argument_group("pairs of blocks").add_argument
    add(
        "--suggest",
        type=number(int, 1),
        metavar="N",
        help="print N pairs for --s-id and --t-id; the first model teaches",
    )
    add("--student", help="the student they are for, any timm model")
    add("--student-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="its arguments")
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", "--output-dir", default="", help="folder of numbers and figures; default: print only")
    add("--pdf", action="store_true", help="figures as PDF, too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of images, shuffled channels and random weights")
    return parser


def check_args(args):
    """Checks flags against each other, before any data or model is touched.

    Raises:
        utils.UserError: with one line.
    """
    if not (args.model or args.checkpoint or args.compare):
        raise utils.UserError("nothing to analyse: give --model, --checkpoint or --compare NAME=SOURCE")
    if args.compare and args.checkpoint:
        raise utils.UserError("--compare and --checkpoint exclude each other: write --compare NAME=CHECKPOINT ...")
    if args.checkpoint and args.random:
        raise utils.UserError("--checkpoint and --random exclude each other: give one")
    names = [entry.partition("=")[0] for entry in args.compare]
    for entry, name in zip(args.compare, names, strict=True):
        if not re.fullmatch(r"\w[\w .+-]*=.+", entry):
            raise utils.UserError(f"--compare: expected NAME=SOURCE with a NAME of letters and digits, got {entry}")
        if names.count(name) > 1:
            raise utils.UserError(f"--compare: {name} is given {names.count(name)} times: use different names")
    if (args.suggest is None) != (args.student is None):
        raise utils.UserError("--suggest N and --student MODEL need each other: give both")
    for flag, given, needs in (
        ("--pdf", args.pdf, "output_dir"),
        ("--student-kwargs", args.student_kwargs, "student"),
        ("--ema", args.ema and not args.compare, "checkpoint"),
    ):
        if given and not getattr(args, needs):
            raise utils.UserError(f"{flag} has no effect without --{needs}: leave it out")
    if args.model and Path(args.model).exists():
        raise utils.UserError(f"--model {args.model} is a path: give it as --checkpoint")
    for name in (args.model, args.student):
        if name:
            models.check_name(name)
    key_values(args.model_kwargs + args.student_kwargs)
    utils.check_device(args.device)


# Models


@dataclasses.dataclass
class Subject:
    """A model to analyse: `weights` is a state dict, or None where timm's own or random ones are wanted."""

    name: str
    model: str
    source: str
    kwargs: dict
    weights: dict | None = None
    run: dict = dataclasses.field(default_factory=dict)  # flags of the training run that the weights come from


def read_subjects(args):
    """What to analyse, with the weights of files read, so that most mistakes are found before a model is built."""
    if args.compare:
        return [read_source(*entry.split("=", 1), args) for entry in args.compare]
    if args.checkpoint:
        return [read_weights(args.model, args.model, args.checkpoint, args)]
    return [without_file(args.model, args.model, args)]


def read_source(name, source, args):
    """NAME=SOURCE: a path or URL, MODEL:CHECKPOINT, or a timm model."""
    model, colon, path = source.partition(":")
    if Path(source).exists() or path.startswith("//"):
        return read_weights(name, None, source, args)
    with utils.as_user_error(f"{source} is no file and no folder, and ", utils.UserError):
        models.check_name(model)
    return read_weights(name, model, path, args) if colon else without_file(name, model, args)


def without_file(name, model, args):
    return Subject(name, model, "random" if args.random else "timm", key_values(args.model_kwargs))


def read_weights(name, model, path, args):
    """A subject from a file, which says itself what model it is for unless `model` does."""
    if Path(path).is_dir():
        path = str(Path(path) / utils.CheckpointFolder.LATEST)
    checkpoint = utils.load_checkpoint(path)
    with utils.as_user_error(f"{path}: ", utils.UserError):
        weights = utils.extract_weights(checkpoint, ema=args.ema)
    run = utils.stored_args(checkpoint)
    model = model or run.get("model") or args.model
    if not model:
        raise utils.UserError(f"{path} does not say which model it is for: give --model, or MODEL:{path}")
    kwargs = run.get("model_kwargs", []) if model == run.get("model") else args.model_kwargs
    return Subject(name or model, model, path, key_values(kwargs), weights, run)


def build_model(subject, args):
    """(model in eval mode on the CPU, side of its input images)."""
    size = args.input_size or subject.run.get("input_size")
    utils.seed_everything(args.seed)
    with utils.as_user_error(f"{subject.name}: ", utils.UserError):
        pretrained = subject.source == "timm"
        model = models.build_model(subject.model, None, input_size=size, kwargs=subject.kwargs, pretrained=pretrained)
        if subject.weights is not None:  # blocks do not depend on the head, so any class count will do
            models.load_weights(model, subject.weights, head="fresh")
    return model.eval(), size or model.pretrained_cfg["input_size"][-1]


# Measuring


@dataclasses.dataclass
class Analysis:
    """What was measured of one model; a block is its module, reduction, shape and what SpectralProfile gives."""

    name: str
    model: str
    weights: str
    input_size: int
    blocks: list[dict]

    def curve(self, key):
        """One number a block, as an array."""
        return np.array([float(block[key]) for block in self.blocks])


def build_data(args, subjects):
    """(validation set without a transform, {"data_set", "crop_ratio", "images": indices}), as in the first run."""
    run = next((subject.run for subject in subjects if subject.run.get("data_set")), {})
    name = args.data_set or run.get("data_set", "IMNET")
    crop_ratio = args.eval_crop_ratio or run.get("eval_crop_ratio", 0.875)
    run = run if name == run.get("data_set") else {}
    path = args.data_path or run.get("data_path")
    if name != "GRATINGS" and not path:
        raise utils.UserError(f"--data-set {name} needs --data-path, the folder of its images")
    with utils.as_user_error("", ValueError, OSError, RuntimeError):
        category = args.inat_category or run.get("inat_category", "name")
        _, size = run.get("gratings_sizes") or (None, None)
        dataset = datasets.build_dataset(name, "val", path, inat_category=category, num_images=size)
    if args.num_images > len(dataset):
        utils.say(f"--num-images {args.num_images}: {name} has {len(dataset)} validation images; all are taken")
    if args.first:
        indices = list(range(min(args.num_images, len(dataset))))
    else:
        indices = samplers.random_subset(len(dataset), args.num_images, args.seed)
    return dataset, {"data_set": name, "crop_ratio": crop_ratio, "images": indices}


@torch.no_grad()
def analyse(subject, dataset, data, args):
    """Runs one model over the images and returns its Analysis; memory does not grow with their number."""
    device = torch.device(args.device)
    model, input_size = build_model(subject, args)
    with utils.as_user_error(f"{subject.name}: ", ValueError):
        described = spectral.describe_blocks(model)
        hooks = spectral.FeatureHooks(model.to(device), range(len(described)))
    dataset.transform = datasets.eval_transform(input_size, data["crop_ratio"])
    prepare = datasets.Prepare(model.pretrained_cfg["mean"], model.pretrained_cfg["std"], device=device)
    profiles = [spectral.SpectralProfile(args.seed) for _ in described]
    workers = min(args.num_workers, math.ceil(len(data["images"]) / args.batch_size))
    pin = device.type == "cuda"
    loader = datasets.build_loader(dataset, data["images"], args.batch_size, workers, drop_last=False, pin_memory=pin)
    with utils.as_user_error("", datasets.BadImageError):
        for images, _ in tqdm(loader, desc=subject.name, unit="batch", disable=None):
            with utils.as_user_error(f"{subject.name}, --input-size {input_size}: ", AssertionError, RuntimeError):
                model(prepare(images.to(device)))
                maps = hooks.pop()
            for profile, block_maps in zip(profiles, maps, strict=True):
                profile.add(block_maps)
    blocks = [
        {"module": block["module"], "reduction": block["reduction"], "shape": profile.shape, **profile.result()}
        for block, profile in zip(described, profiles, strict=True)
    ]
    analysis = Analysis(subject.name, subject.model, subject.source, input_size, blocks)
    if not np.isfinite(analysis.curve("rms")).all():
        raise utils.UserError(f"{subject.name}: its features are not finite: use other weights")
    return analysis


def say_curves(analysis):
    """Prints one line a block."""
    utils.say(f"\n{analysis.name}: {analysis.model}, weights {analysis.weights}, {analysis.input_size} pixels")
    utils.say(
        f"{'block':>5}  {'module':<16}{'C x H x W':>15}{'intensity':>11}{'shuffled':>11}{'x sqrt(C)':>11}{'RMS':>11}"
    )
    for i, block in enumerate(analysis.blocks):
        shape = " x ".join(map(str, block["shape"]))
        curves = "".join(f"{float(block[key]):>11.4g}" for key in CURVES)
        utils.say(f"{i:>5}  {block['module']:<16}{shape:>15}{curves}")


# Pairs of blocks


def choose_ends(intensity, num_pairs):
    """How many of `num_pairs` blocks to take from the start of a network, the others being its last.

    Of all splits, the one whose blocks have the largest summed intensity; among equals the most even one.
    """

    def rank(first):
        chosen = [*intensity[:first], *intensity[len(intensity) - (num_pairs - first) :]]
        return math.fsum(chosen), -abs(2 * first - num_pairs)

    return max(range(num_pairs + 1), key=rank)


def suggest_pairs(intensity, student, teacher, num_pairs):
    """Chooses the teacher's blocks by `choose_ends` and a block of the student for each.

    Where both models have stages, only the last blocks of equal reduction are looked at, and paired. Otherwise a
    student no deeper than the teacher gives as many of its first and of its last blocks, since places in proportion
    would fall on one another, and a deeper one gives those at the same relative depth.

    Args:
        intensity: of the teacher's blocks, comparable across widths.
        student, teacher: reduction of each block, in input pixels a token.
        num_pairs: how many to choose.

    Returns:
        (student ids, teacher ids), ascending and without repeats.

    Raises:
        utils.UserError: there are fewer blocks than that.
    """
    s_from, t_from, unit = range(len(student)), range(len(teacher)), "blocks"
    if len(set(student)) > 1 and len(set(teacher)) > 1:
        common, unit = sorted(set(student) & set(teacher)), "stages of equal resolution"
        s_from, t_from = (
            [max(i for i, r in enumerate(model) if r == c) for c in common] for model in (student, teacher)
        )
    for who, found in (("student", s_from), ("teacher", t_from)):
        if num_pairs > len(found):
            raise utils.UserError(f"--suggest {num_pairs}: the {who} has only {len(found)} {unit}: ask for fewer")
    depth, extra = len(t_from), len(s_from) - len(t_from)
    first = choose_ends([intensity[i] for i in t_from], num_pairs)
    chosen = [*range(first), *range(depth - (num_pairs - first), depth)]
    if extra > 0:
        partners = [round(i * (len(s_from) - 1) / max(depth - 1, 1)) for i in chosen]
    else:
        partners = [i if i < first else i + extra for i in chosen]
    return [s_from[i] for i in partners], [t_from[i] for i in chosen]


def suggest(args, student_blocks, teacher):
    """Chooses the pairs, and prints them with the curve that they come from; returns them."""
    intensity = teacher.curve("intensity_corrected").tolist()
    student, taught = ([block["reduction"] for block in blocks] for blocks in (student_blocks, teacher.blocks))
    s_id, t_id = suggest_pairs(intensity, student, taught, args.suggest)
    share = sum(intensity[i] for i in t_id) / sum(intensity)
    utils.say(f"\n{args.student} taught by {teacher.name}: intensity x sqrt(C) of the teacher's blocks, and the pairs")
    for i, value in enumerate(intensity):
        partner = f"<- student {s_id[t_id.index(i)]}" if i in t_id else ""
        utils.say(f"{i:>5} {value:>10.4g}  {'#' * round(40 * value / max(intensity)):<40}  {partner}")
    utils.say(
        f"Of all choices of {len(t_id)} blocks at the two ends these have the most of it, {share:.1%} of the whole."
    )
    utils.say(f"--s-id {' '.join(map(str, s_id))} --t-id {' '.join(map(str, t_id))}")
    return {"student": args.student, "teacher": teacher.name, "s_id": s_id, "t_id": t_id}


# Results


def write_numbers(folder, analyses, about):
    """Writes spectra.npz (see KEYS), and what it is of with one number a block as spectra.json."""
    arrays, plain = {}, []
    for analysis in analyses:
        arrays[f"{analysis.name}/shape"] = np.array([block["shape"] for block in analysis.blocks])
        arrays |= {f"{analysis.name}/{key}": analysis.curve(key) for key in CURVES}
        for i, block in enumerate(analysis.blocks):
            arrays |= {f"{analysis.name}/{key}/{i}": block[key].numpy() for key in PROFILES}
        plain.append(dataclasses.asdict(analysis))
        plain[-1]["blocks"] = [{k: v for k, v in block.items() if k not in PROFILES} for block in analysis.blocks]
    text = json.dumps({**about, "models": plain, "keys_of_spectra_npz": KEYS}, indent=1, default=torch.Tensor.tolist)
    utils.write_atomically(folder / "spectra.npz", lambda file: np.savez_compressed(file, **arrays))
    utils.write_atomically(folder / "spectra.json", lambda file: file.write(text.encode()))


def write_figures(folder, figures, pdf):
    for name, figure in figures.items():
        for kind in ("png", "pdf")[: 1 + pdf]:
            save = functools.partial(figure.savefig, format=kind, dpi=DPI)
            utils.write_atomically(folder / f"{name}.{kind}", save)


def write_tensorboard(folder, analyses, figures):
    """Curves over blocks, a run a model so that they share their charts, and the figures."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    shutil.rmtree(folder, ignore_errors=True)  # charts of an earlier analysis would mix with these
    for analysis in analyses:
        with SummaryWriter(str(folder / analysis.name)) as writer:
            for key in CURVES:
                for i, value in enumerate(analysis.curve(key)):
                    writer.add_scalar(f"block/{key}", value, i)
    with SummaryWriter(str(folder)) as writer:
        for name, figure in figures.items():
            writer.add_figure(name, figure)


# Figures

DPI = 200
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay letters
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vP"
DEPTH_COLOURS = "viridis"
SHUFFLED = {"color": "black", "linestyle": "", "marker": "x", "markersize": 3, "markeredgewidth": 0.7}
RMS = {"color": "black", "linestyle": ":", "linewidth": 0.9, "zorder": 3}
PAGE_WIDTH = 7  # inches
CHANNEL_FREQUENCY = "frequency along channels (cycles per channel)"
GRID_FREQUENCY = "frequency over the grid (cycles per token)"
WIDE_SPREAD = 30  # levels that differ by more are drawn on a logarithmic axis


def draw(analyses, pairs=None):
    """{name: figure} of everything that was measured, and of the suggested pairs."""
    figures = {
        "intensity": draw_intensity(analyses),
        "spectrum": draw_lines(analyses, spectrum_line, CHANNEL_FREQUENCY, "spectrum $S$"),
        "heatmap": draw_heatmap(analyses),
        "radial": draw_lines(analyses, radial_line, GRID_FREQUENCY, "power"),
    }
    return figures | ({"suggestion": draw_suggestion(analyses[0], pairs)} if pairs else {})


def panels(num, width=None, **options):
    """(figure, axes in a list) of equal panels, at most four in a row and then as wide as a page's text."""
    rows = math.ceil(num / 4)
    columns = math.ceil(num / rows)
    size = (width or min(1.5 + 2.1 * columns, PAGE_WIDTH), 0.4 + 2.1 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for spare in axes[num:]:
        spare.remove()
    for lowest in axes[num - columns : num]:
        lowest.tick_params(labelbottom=True)
    return figure, axes[:num]


def depth_axis(analyses):
    """(places of an analysis's blocks, label): block numbers, or relative depth where models differ in depth."""
    if len({len(analysis.blocks) for analysis in analyses}) == 1:
        return (lambda analysis: np.arange(len(analysis.blocks))), "block"
    return (lambda analysis: np.linspace(0, 1, len(analysis.blocks))), "relative depth"


def draw_intensity(analyses):
    """Intensity over depth with shuffled channels beside it, and both made comparable across widths beside the RMS."""
    place, label = depth_axis(analyses)
    figure, axes = panels(2, PAGE_WIDTH)
    for i, analysis in enumerate(analyses):
        x, colour = place(analysis), COLOURS[i % len(COLOURS)]
        line = {"color": colour, "marker": MARKERS[i % len(MARKERS)], "label": analysis.name}
        axes[0].plot(x, analysis.curve("intensity"), **line)
        axes[0].plot(x, analysis.curve("intensity_shuffled"), **SHUFFLED)
        axes[1].plot(x, analysis.curve("intensity_corrected"), **line)
        axes[1].plot(x, analysis.curve("rms") * math.sqrt(math.pi) / 2, **RMS)
    for axis, ylabel in zip(axes, ("intensity", r"intensity $\times\ \sqrt{C}$"), strict=True):
        axis.set(xlabel=label, ylabel=ylabel)
        levels = np.concatenate([line.get_ydata() for line in axis.lines])
        if levels.max() > WIDE_SPREAD * levels.min() > 0:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.05 * levels.max())
        if label == "block":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True)) | {"channels shuffled": Line2D([], [], **SHUFFLED)}
    shown[r"$\sqrt{\pi}/2\ \times$ RMS"] = Line2D([], [], **RMS)
    columns = math.ceil(len(shown) / math.ceil(len(shown) / 5))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns)
    return figure


def spectrum_line(block):
    """The first C // 2 bins of the layer-wise spectrum, over their frequencies."""
    half = len(block["spectrum"]) // 2
    return np.arange(half) / len(block["spectrum"]), block["spectrum"][:half].numpy()


def radial_line(block):
    return block["radial_frequency"].numpy(), block["radial_power"].numpy()


def draw_lines(analyses, line, xlabel, ylabel):
    """A panel a model, a line a block, coloured by depth."""
    place, label = depth_axis(analyses)
    figure, axes = panels(len(analyses), sharex=True, sharey=True)
    scale = ScalarMappable(Normalize(0, max(place(analyses[0])[-1], 1)), DEPTH_COLOURS)
    for axis, analysis in zip(axes, analyses, strict=True):
        for x, block in zip(place(analysis), analysis.blocks, strict=True):
            axis.plot(*line(block), color=scale.to_rgba(x), lw=0.8)
        axis.set(yscale="log", title=analysis.name)
    ticks = MaxNLocator(integer=True) if label == "block" else None
    return label_all(figure, axes, scale, xlabel, ylabel, label=label, ticks=ticks)


def draw_heatmap(analyses):
    """A panel a model: layer-wise spectrum by block and frequency, one scale for all."""
    figure, axes = panels(len(analyses), sharex=True)
    levels = np.concatenate([spectrum_line(block)[1] for analysis in analyses for block in analysis.blocks])
    scale = ScalarMappable(LogNorm(*np.quantile(levels[levels > 0], (0.002, 0.998))), DEPTH_COLOURS)
    for axis, analysis in zip(axes, analyses, strict=True):
        for i, block in enumerate(analysis.blocks):
            frequency, values = spectrum_line(block)
            edges = np.append(frequency, 0.5)
            axis.pcolormesh(edges, (i - 0.5, i + 0.5), values[None], norm=scale.norm, cmap=scale.cmap, rasterized=True)
        axis.set(title=analysis.name, xlim=(0, 0.5))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return label_all(figure, axes, scale, CHANNEL_FREQUENCY, "block", label="spectrum $S$")


def label_all(figure, axes, scale, xlabel, ylabel, **colorbar):
    """One label an axis and one colour bar for all panels."""
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    figure.colorbar(scale, ax=axes, **colorbar)
    return figure


def draw_suggestion(teacher, pairs):
    """The teacher's curve with the chosen blocks, each with its student block."""
    figure, (axis,) = panels(1)
    curve = teacher.curve("intensity_corrected")
    axis.plot(curve, color=COLOURS[0], marker=".", label=teacher.name)
    axis.plot(pairs["t_id"], curve[pairs["t_id"]], "o", ms=7, mfc="none", color=COLOURS[1], label="chosen")
    for s, t in zip(pairs["s_id"], pairs["t_id"], strict=True):
        axis.annotate(s, (t, curve[t]), textcoords="offset points", xytext=(0, 6), ha="center", color=COLOURS[1])
    axis.set(xlabel="teacher block (numbers: student block)", ylabel=r"intensity $\times\ \sqrt{C}$")
    axis.set_ylim(0, 1.12 * curve.max())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


def main(args):
    subjects = read_subjects(args)
    if args.suggest:
        student = models.build_model(args.student, None, input_size=None, kwargs=key_values(args.student_kwargs))
        with utils.as_user_error("--student: ", ValueError):
            student_blocks = spectral.describe_blocks(student)
    dataset, data = build_data(args, subjects)
    folder = utils.open_output_folder(args.output_dir)
    which = "the first" if args.first else f"drawn by seed {args.seed}"
    utils.say(f"{len(data['images'])} validation images of {data['data_set']}, {which}")
    analyses = [analyse(subject, dataset, data, args) for subject in subjects]
    for analysis in analyses:
        say_curves(analysis)
    pairs = suggest(args, student_blocks, analyses[0]) if args.suggest else None
    if folder is None:
        return
    with utils.as_user_error(f"--output_dir {args.output_dir}: ", OSError), matplotlib.rc_context(STYLE):
        write_numbers(folder.folder, analyses, {**data, "seed": args.seed, "suggestion": pairs})
        figures = draw(analyses, pairs)
        write_figures(folder.folder, figures, args.pdf)
        write_tensorboard(folder.folder / "tensorboard", analyses, figures)
    utils.say(f"wrote spectra.npz, spectra.json, {', '.join(f'{name}.png' for name in figures)} to {folder.folder}")


if __name__ == "__main__":
    with utils.exit_codes():
        arguments = get_args_parser().parse_args()
        check_args(arguments)
        main(arguments)
