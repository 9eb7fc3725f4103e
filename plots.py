"""The figures of analyze.py and tables.py.

A subject is an `analyze.Subject`: `curves` with a number per block, and `profiles` with an array per block.
"""

import math
from typing import Any

import numpy as np
from matplotlib import cm, colors
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

STYLE: Any = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5, "legend.frameon": False}
STYLE |= {"pdf.fonttype": 42}  # keeps text as text
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKERS = "osD^vP"
STYLES = ("-", "--", ":", "-.")
DEPTH_COLORS = "viridis"
PAGE_WIDTH = 7  # inches
CHANNEL_FREQUENCY = "frequency along channels (cycles per channel)"
SHUFFLED: Any = {"label": "channels shuffled", "color": "black", "ls": "", "marker": "x", "ms": 3, "mew": 0.7}
RMS: Any = {"label": r"$\sqrt{\pi}/2\ \times$ RMS", "color": "black", "ls": ":", "lw": 0.9, "zorder": 3}
# Of a curve: the control drawn with it, its factor and its style.
CONTROLS = {
    "intensity": ("intensity_shuffled", 1, SHUFFLED),
    "intensity_corrected": ("rms", math.sqrt(math.pi) / 2, RMS),
}
CORRECTED = r"intensity $\times\ \sqrt{C}$"
ENTROPY = {
    "entropy": "entropy (bits), one range for all blocks",
    "entropy_own_range": "entropy (bits), range of each block",
    "magnitude": "mean magnitude of the features",
}
WIDE_SPREAD = 30  # curves with a larger ratio get a logarithmic axis


def draw(subjects: list, pairs: dict | None = None) -> dict[str, Figure]:
    """Return {name: figure} for all measurements and the suggested pairs."""
    figures = {"intensity": draw_over_depth(subjects, {"intensity": "intensity", "intensity_corrected": CORRECTED})}
    figures["spectrum"] = draw_lines(subjects, half_spectra, CHANNEL_FREQUENCY, "spectrum $S$")
    figures["heatmap"] = draw_heatmap(subjects)
    figures["radial"] = draw_lines(subjects, radial_powers, "frequency over the grid (cycles per token)", "power")
    if "entropy" in subjects[0].curves:
        figures["entropy"] = draw_over_depth(subjects, ENTROPY)
    return figures | ({"suggestion": draw_suggestion(subjects[0], pairs)} if pairs else {})


def draw_milestones(subjects: list) -> dict[str, Figure]:
    """Return {name: figure} for a training run; each subject is named after its epoch, as in "epoch 100"."""
    curves = {"intensity": "intensity", "rms": "RMS of the features"}
    if "entropy" in subjects[0].curves:
        curves |= {key: title for key, title in ENTROPY.items() if key != "magnitude"}
    epochs = [int(subject.name.rpartition(" ")[2]) for subject in subjects]
    return {"milestones": draw_over_depth(subjects, curves, epochs)}


def half_spectra(subject) -> list[tuple]:
    """Return, for each block, frequencies and values of the first C // 2 bins of the layer-wise spectrum."""
    return [(np.arange(len(s) // 2) / len(s), s[: len(s) // 2]) for s in subject.profiles["spectrum"]]


def radial_powers(subject) -> list[tuple]:
    return list(zip(subject.profiles["radial_frequency"], subject.profiles["radial_power"], strict=True))


def depth_axis(subjects: list):
    """Return (subject -> x of its blocks, label): block numbers, or relative depth if the models differ in depth."""
    if len({len(subject.blocks) for subject in subjects}) == 1:
        return (lambda subject: np.arange(len(subject.blocks))), "block"
    return (lambda subject: np.linspace(0, 1, len(subject.blocks))), "relative depth"


def draw_over_depth(subjects: list, curves: dict[str, str], epochs: list[int] | None = None) -> Figure:
    """Draw a panel per curve, {key: title}: a color per model, and controls; or a color per epoch if given."""
    place, label = depth_axis(subjects)
    rows = math.ceil(len(curves) / 3)
    columns = math.ceil(len(curves) / rows)
    figure = Figure(figsize=(PAGE_WIDTH, 0.5 + 2.1 * rows), layout="constrained")
    axes = dict(zip(curves, figure.subplots(rows, columns, squeeze=False).flat, strict=True))
    styles: list[dict] = [{"color": COLORS[i % 7], "marker": MARKERS[i % 6]} for i in range(len(subjects))]
    if epochs:
        scale = cm.ScalarMappable(colors.Normalize(epochs[0], epochs[-1]), DEPTH_COLORS)
        styles = [{"color": scale.to_rgba(epoch), "marker": "."} for epoch in epochs]
        figure.colorbar(scale, ax=[*axes.values()], label="epoch", ticks=MaxNLocator(integer=True))
    for key, axis in axes.items():
        for subject, style in zip(subjects, styles, strict=True):
            axis.plot(place(subject), subject.curves[key], label=subject.name, **style)
        if key in CONTROLS and not epochs:
            control, factor, style = CONTROLS[key]
            for subject in subjects:
                axis.plot(place(subject), factor * subject.curves[control], **style)
        axis.set(title=curves[key], xlabel=label)
        if label == "block":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not key.startswith("entropy"):
            scale_from_zero(axis)
    if "entropy" in axes:
        axes["entropy_own_range"].sharey(axes["entropy"])
        axes["entropy_own_range"].autoscale_view()
    if not epochs:
        lines = {line.get_label(): line for axis in axes.values() for line in axis.lines}
        columns = math.ceil(len(lines) / math.ceil(len(lines) / 5))
        figure.legend(handles=lines.values(), loc="outside lower center", ncols=columns)
    return figure


def scale_from_zero(axis) -> None:
    """Start the y axis at zero, or make it logarithmic if the values differ a lot."""
    levels = np.concatenate([line.get_ydata() for line in axis.lines])
    if levels.max() > WIDE_SPREAD * levels.min() > 0:
        axis.set_yscale("log")
    else:
        axis.set_ylim(0, 1.05 * levels.max() or 1)


def draw_lines(subjects: list, lines, xlabel: str, ylabel: str) -> Figure:
    """Draw one line per block, colored by depth; `lines` returns the x and y of each block of a subject."""
    place, label = depth_axis(subjects)
    scale = cm.ScalarMappable(colors.Normalize(0, max(place(subjects[0])[-1], 1)), DEPTH_COLORS)

    def plot(axis, subject):
        for depth, line in zip(place(subject), lines(subject), strict=True):
            axis.plot(*line, color=scale.to_rgba(depth), lw=0.8)
        axis.set_yscale("log")

    ticks = MaxNLocator(integer=True) if label == "block" else None
    return draw_panels(subjects, plot, scale, xlabel, ylabel, sharey=True, label=label, ticks=ticks)


def draw_heatmap(subjects: list) -> Figure:
    """Draw the layer-wise spectrum by block and frequency, with one scale for all models."""
    levels = np.concatenate([values for subject in subjects for _, values in half_spectra(subject)])
    scale = cm.ScalarMappable(colors.LogNorm(*np.quantile(levels[levels > 0], (0.002, 0.998))), DEPTH_COLORS)

    def plot(axis, subject):
        for i, (frequency, values) in enumerate(half_spectra(subject)):
            edges, rows = np.append(frequency, 0.5), (i - 0.5, i + 0.5)
            axis.pcolormesh(edges, rows, values[None], norm=scale.norm, cmap=scale.cmap, rasterized=True)
        axis.set_xlim(0, 0.5)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))

    return draw_panels(subjects, plot, scale, CHANNEL_FREQUENCY, "block", label="spectrum $S$")


def draw_panels(subjects: list, plot, scale, xlabel: str, ylabel: str, sharey=False, **colorbar) -> Figure:
    """Draw a panel per model, at most four per row, not wider than a page, and a color bar."""
    rows = math.ceil(len(subjects) / 4)
    columns = math.ceil(len(subjects) / rows)
    figure = Figure(figsize=(min(1.5 + 2.1 * columns, PAGE_WIDTH), 0.4 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=sharey).flatten().tolist()
    while len(axes) > len(subjects):
        axes.pop().remove()
    for axis in axes[-columns:]:
        axis.tick_params(labelbottom=True)
    for axis, subject in zip(axes, subjects, strict=True):
        plot(axis, subject)
        axis.set_title(subject.name)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    figure.colorbar(scale, ax=axes, **colorbar)
    return figure


def draw_suggestion(teacher, pairs: dict) -> Figure:
    """Draw the teacher's curve, and mark the chosen blocks with the number of their student block."""
    figure = Figure(figsize=(3.6, 2.5), layout="constrained")
    axis, curve = figure.subplots(), teacher.curves["intensity_corrected"]
    axis.plot(curve, color=COLORS[0], marker=".", label=teacher.name)
    axis.plot(pairs["t_id"], curve[pairs["t_id"]], "o", ms=7, mfc="none", color=COLORS[1], label="chosen")
    for s, t in zip(pairs["s_id"], pairs["t_id"], strict=True):
        axis.annotate(s, (t, curve[t]), textcoords="offset points", xytext=(0, 6), ha="center", color=COLORS[1])
    axis.set(xlabel="teacher block (numbers: student block)", ylabel=CORRECTED, ylim=(0, 1.12 * curve.max()))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend()
    return figure


TERMS = {"train_loss_base": "weighted cross-entropy", "train_loss_dist": "weighted logit distillation"}
TERMS |= {"train_loss_fft": "weighted feature loss"}


def draw_training(table: list) -> Figure:
    """Draw top-1 and loss terms over epochs for (row, runs) pairs: a color per row, a line per seed."""
    logged = [stats for _, runs in table for run in runs for stats in run.epochs.values()]
    terms = [term for term in TERMS if any(stats.get(term) for stats in logged)]
    mosaic: list[list[Any]] = [["test_acc1", term] for term in terms] or [["test_acc1"]]
    figure = Figure(figsize=(10, 5.8), dpi=200, layout="constrained")
    axes = figure.subplot_mosaic(mosaic, width_ratios=(5, 3)[: len(mosaic[0])], sharex=True)
    for i, (label, (_, runs)) in enumerate(zip(row_labels(table), table, strict=True)):
        style: Any = {"color": COLORS[i % len(COLORS)], "ls": STYLES[i // len(COLORS) % len(STYLES)], "lw": 1.3}
        for j, run in enumerate(runs):
            for name, axis in axes.items():  # unused terms are logged as zero
                points = [(epoch + 1, stats[name]) for epoch, stats in sorted(run.epochs.items()) if stats.get(name)]
                axis.plot(*np.reshape(points, (-1, 2)).T, label=None if j else label, **style)
    for name, axis in axes.items():
        axis.set_title(TERMS.get(name, "top-1 on the validation set, %"), loc="left", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.grid(color="0.9")
        if name in TERMS:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    for name in mosaic[-1]:
        axes[name].set_xlabel("epoch")
    figure.legend(*axes["test_acc1"].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def row_labels(table: list, without: str = "") -> list[str]:
    """Return a label per row: its student, if there are several, its method, and the varied flags but one."""
    students = [text(row["student"]).partition(" ")[0] or row["run"] for row, _ in table]
    labels = []
    for student, (row, _) in zip(students, table, strict=True):
        label = row["method"] if len(set(students)) == 1 else f"{student}: {row['method']}"
        shown = {name: x for name, x in row["varied"].items() if name not in ("model", without) and x not in (None, [])}
        labels.append(", ".join([label, *(f"{name} {text(x)}" for name, x in shown.items())]))
    return labels


def text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def draw_sweep(table: list) -> Figure:
    """Draw the best top-1 of (row, runs) pairs over the first varied flag, with the deviation over seeds.

    Rows that differ only in the flag are a line; rows to which it does not apply are horizontal. If the flag's values
    are not numbers, `draw_rows` draws the pairs.
    """
    (flag, *_), lines = table[0][0]["varied"], {}
    if not all(isinstance(row["varied"][flag], (int, float, type(None))) for row, _ in table):
        return draw_rows(table)
    figure = Figure(figsize=(6, 4.2), dpi=200, layout="constrained")
    axis = figure.subplots()
    for label, (row, _) in zip(row_labels(table, without=flag), table, strict=True):
        x, others = row["varied"][flag], [row[name] for name in ("data_set", "teacher", "epochs", "global_batch")]
        lines.setdefault((label, x is None, *others), []).append((x, row["best"], row["best_std"] or 0))
    for i, ((label, horizontal, *_), points) in enumerate(lines.items()):
        style: Any = {"color": COLORS[i % len(COLORS)], "label": label}
        if horizontal:
            axis.axhline(points[0][1], ls="--", **style)
        else:
            axis.errorbar(*zip(*points, strict=True), marker=MARKERS[i % len(MARKERS)], capsize=2, **style)
    axis.set(xlabel=f"--{flag}", ylabel="best top-1 on the validation set, %")
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_rows(table: list) -> Figure:
    """Draw the best top-1 of each run as a dot, and the mean of each row over seeds with its standard error."""
    figure = Figure(figsize=(PAGE_WIDTH, 0.9 + 0.28 * len(table)), dpi=200, layout="constrained")
    axis = figure.subplots()
    for y, (row, runs) in enumerate(table):
        axis.plot([run.top1["best"] for run in runs], [y] * len(runs), "o", ms=4, mfc="none", color="0.6")
        if row["best_std"] is not None:
            error = row["best_std"] / math.sqrt(len(runs))
            axis.errorbar(row["best"], y, xerr=error, fmt="o", ms=4, capsize=3, color=COLORS[0])
    axis.set_yticks(range(len(table)), row_labels(table))
    axis.invert_yaxis()
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("best top-1 on the validation set, %; mean ± standard error over seeds", fontsize="medium")
    return figure
