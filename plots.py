"""The figures of analyze.py and tables.py. Importing it sets matplotlib's style.

A subject is an `analyze.Subject`: `curves` with a number per block, and `profiles` with an array per block.
"""

import math
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import cm, colors
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE: Any = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5, "grid.color": "0.9"}
STYLE |= {"legend.frameon": False, "savefig.dpi": 200, "pdf.fonttype": 42}  # 42 keeps text as text
matplotlib.rcParams.update(STYLE)
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


def draw(subjects: list) -> dict[str, Figure]:
    """Return {name: figure} for all measurements."""
    figures = {"intensity": draw_over_depth(subjects, {"intensity": "intensity", "intensity_corrected": CORRECTED})}
    figures["spectrum"] = draw_lines(subjects, half_spectra, CHANNEL_FREQUENCY, "spectrum $S$")
    figures["heatmap"] = draw_heatmap(subjects)
    figures["radial"] = draw_lines(subjects, radial_powers, "frequency over the grid (cycles per token)", "power")
    if "entropy" in subjects[0].curves:
        figures["entropy"] = draw_over_depth(subjects, ENTROPY)
    return figures


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


def radial_powers(subject) -> Iterable[tuple]:
    return zip(subject.profiles["radial_frequency"], subject.profiles["radial_power"], strict=True)


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


def draw_training(rows: list[dict]) -> Figure:
    """Draw top-1 of `tables.tabulate`'s rows over epochs: a color per row, a line per seed."""
    figure = Figure(figsize=(PAGE_WIDTH, 4.2), layout="constrained")
    axis = figure.subplots()
    for i, (label, row) in enumerate(zip(row_labels(rows), rows, strict=True)):
        style: Any = {"color": COLORS[i % len(COLORS)], "ls": STYLES[i // len(COLORS) % len(STYLES)]}
        for j, run in enumerate(row["runs"]):
            epochs = sorted(run.epochs)
            top1 = [run.epochs[epoch]["test_acc1"] for epoch in epochs]
            axis.plot([epoch + 1 for epoch in epochs], top1, label=None if j else label, **style)
    axis.set(xlabel="epoch", ylabel="top-1 on the validation set, %")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def row_labels(rows: list[dict]) -> list[str]:
    """Return a label per row: its student, if there are several, its method, and the varied flags."""
    students = [row["student"].partition(" ")[0] for row in rows]
    labels = []
    for student, row in zip(students, rows, strict=True):
        label = row["method"] if len(set(students)) == 1 else f"{student}: {row['method']}"
        shown = {name: x for name, x in row["varied"].items() if name != "model" and x not in (None, "")}
        labels.append(", ".join([label, *(f"{name} {x}" for name, x in shown.items())]))
    return labels


def draw_rows(rows: list[dict]) -> Figure:
    """Draw the best top-1 of each finished run as a dot, and the mean of each row with its standard error."""
    rows = [row for row in rows if row["done"] is not False]
    figure = Figure(figsize=(PAGE_WIDTH, 0.9 + 0.28 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows):
        axis.plot([run.top1["best"] for run in row["runs"]], [y] * len(row["runs"]), "o", mfc="none", color="0.6")
        if row["best_std"] is not None:
            error = row["best_std"] / math.sqrt(len(row["runs"]))
            axis.errorbar(row["best"], y, xerr=error, fmt="o", capsize=3, color=COLORS[0])
    axis.set_yticks(range(len(rows)), row_labels(rows))
    axis.invert_yaxis()
    axis.grid(axis="x")
    figure.supxlabel("best top-1 on the validation set, %; mean ± standard error over seeds", fontsize="medium")
    return figure
