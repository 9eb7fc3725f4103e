"""Make a table of runs from their logs: accuracy next to published values, spread over seeds, gains over controls."""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from runs import DEFAULTS, FEATURE, NEUTRAL, PUBLISHED, TEACHER, Run, fingerprint, read_runs, warn

NAMES = {"none": "no teacher", "soft": "soft KD", "soft KD + spectral": "SpectralKD", "soft KD + mse": "MSE baseline"}


def method(known: dict) -> str:
    """Return the name of the method of a run with these settings."""
    name = NAMES.get(known["distillation_type"], known["distillation_type"])
    if not known.get("s_id"):
        return name
    name, count = f"{name} + {known['feature_loss']}", len(known["s_id"])
    pairs = "all blocks" if known["s_id"] == ["all"] else f"{count} pair{'s' * (count > 1)}"
    return f"{NAMES.get(name, name)} ({pairs})"


def as_text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def describe(run: Run) -> dict:
    """Return what was trained: by the run's arguments, or else by the published result that its log is named after."""
    known, names = run.settings, ("data_set", "student", "teacher", "method", "global_batch")
    if not known:
        unknown = dict.fromkeys(("data_set", "student", "method"), "unknown")
        entry = {"data_set": "IMNET", **run.entry} if run.entry else unknown
        return {name: entry.get(name) for name in names}
    # IMNET stands for any folder, so its name is shown.
    data_set = known["data_path"] if known["data_set"] == "IMNET" and known["data_path"] else known["data_set"]
    student = " ".join([known["model"], *known["model_kwargs"]])
    teacher = " ".join([known["teacher_model"], *known["teacher_kwargs"]]) if "teacher_model" in known else None
    return dict(zip(names, (data_set, student, teacher, method(known), known["global_batch"]), strict=True))


def make_row(runs: list[Run]) -> dict:
    """Return the row of runs that differ only in their seed."""
    run, names, seeds = runs[0], [r.name for r in runs], [r.args["seed"] for r in runs if r.args]
    row: dict[str, Any] = {
        "run": os.path.commonprefix(names) + "*" * (len(names) > 1),  # noqa: RUF071 a prefix of characters
        **describe(run),
        "epochs": run.num_epochs,
        "epochs_seen": run.epochs_seen,
        "done": run.done,
        "seeds": seeds,
    }
    for name in run.top1:
        values = [r.top1[name] for r in runs if r.top1[name] is not None]
        row[name] = statistics.fmean(values) if values else None
        # Runs with the same seed do not show the spread over seeds.
        row[f"{name}_std"] = statistics.stdev(values) if len(set(seeds)) == len(values) > 1 else None
    row |= dict.fromkeys(("gain_no_teacher", "gain_no_teacher_se", "gain_soft_kd", "gain_soft_kd_se"))
    entry = run.entry or {}
    row |= {"parameters": run.parameters, "published": entry.get("best"), "source": entry.get("source")}
    return row | {"runs": runs, "varied": {}}


def add_gains(rows: list[dict]) -> None:
    """Add the gain of the best epoch over each control, all else being equal, and its standard error."""
    finished = [(row, row["runs"][0].settings) for row in rows if row["done"] and row["runs"][0].args]
    controls = {fingerprint(known): row for row, known in finished}
    for row, known in finished:
        wanted = {"gain_no_teacher": fingerprint(known, TEACHER + FEATURE, distillation_type="none")}
        if known["distillation_type"] == "soft":
            wanted["gain_soft_kd"] = fingerprint(known, FEATURE, w_fft=0.0)
        for name, control in ((name, controls.get(key, row)) for name, key in wanted.items()):
            if control is not row:
                row[name] = row["best"] - control["best"]
                if None not in (row["best_std"], control["best_std"]):
                    errors = (r["best_std"] / math.sqrt(len(r["seeds"])) for r in (row, control))
                    row[f"{name}_se"] = math.hypot(*errors)


def add_varied(rows: list[dict], names: list[str]) -> None:
    """Add the values of the named settings, or of those that differ between rows that would look the same."""
    alike = defaultdict(list)
    for row in rows:
        look = ("data_set", "student", "teacher", "method", "epochs", "global_batch")
        alike[tuple(row[name] for name in look)].append(row["runs"][0].settings)
    differ = {
        name
        for same in alike.values()
        for name in set().union(*same)
        if len({as_text(known.get(name)) for known in same}) > 1
    }
    for row in rows:
        for name in names or sorted(differ):
            value = row["runs"][0].settings.get(name)
            row["varied"][name.replace("_", "-")] = as_text(value) if isinstance(value, list) else value


def tabulate(runs: list[Run], vary: list[str]) -> list[dict]:
    """Group runs into rows: teachers first for each data set, then for each student controls before methods.

    Args:
        vary: settings to show in columns and to sort by.
    """
    groups = defaultdict(list)
    for run in runs:
        # Unfinished runs and runs with unknown arguments have their own rows.
        groups[fingerprint(run.settings) if run.args and run.done else run.log].append(run)
    teaching = {Path(run.settings.get("teacher_path") or "/").resolve().parent for run in runs}

    def order(row):
        run = row["runs"][0]
        kind = run.settings.get("distillation_type", "none") != "none", "s_id" in run.settings, row["method"]
        model = row["student"], row["epochs"] or 0, row["global_batch"] or 0
        return row["data_set"], run.folder not in teaching, model, kind, row["done"] is False, run.name

    def by_varied(row):  # numbers, then text; None counts as zero
        return [(isinstance(value, str), 0 if value is None else value) for value in row["varied"].values()]

    rows = sorted([make_row(group) for group in groups.values()], key=order)
    add_gains(rows)
    add_varied(rows, vary)
    return sorted(rows, key=by_varied) if vary else rows


def with_error(row: dict, name: str, sign: str = "") -> str:
    value, error = row.get(name), row.get(f"{name}_std", row.get(f"{name}_se"))
    return "" if value is None else f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


MEANING = """Top-1 in percent; ± is the sample standard deviation over seeds. Gains compare the best epochs of runs with
otherwise equal settings; their ± is the standard error of the difference. Unfinished runs are excluded."""


def markdown(rows: list[dict]) -> str:
    """Return the table as aligned Markdown, with footnotes and a legend."""
    notes: dict[str, int] = {}

    def model(text):  # model arguments become footnotes
        name, _, kwargs = (text or "").partition(" ")
        return f"{name} [{notes.setdefault(kwargs, len(notes) + 1)}]" if kwargs else name

    def cells(row):
        seen, total, seeds = row["epochs_seen"], row["epochs"], ", ".join(map(str, row["seeds"]))
        varied = {name: as_text(x) for name, x in row["varied"].items() if name not in ("model", "teacher-model")}
        return {
            "run": row["run"],
            "data set": row["data_set"],
            "student": model(row["student"]),
            "teacher": model(row["teacher"]),
            "method": row["method"],
            **varied,
            "epochs": f"{seen} seen" if total is None else total if row["done"] else f"{seen} of {total}",
            "batch": row["global_batch"] or "",
            "seeds": f"{seeds} (n = {len(row['seeds'])})" if len(row["seeds"]) > 1 else seeds,
            "best": with_error(row, "best"),
            "last": with_error(row, "last"),
            "mean of last 10": with_error(row, "last10"),
            "best of EMA": with_error(row, "ema_best"),
            "over no teacher": with_error(row, "gain_no_teacher", "+"),
            "over soft KD": with_error(row, "gain_soft_kd", "+"),
            "published": row["published"] or "",
            "source": row["source"] or "",
        }

    lines = [*align([cells(row) for row in rows]), ""]
    lines += [f"[{number}] {kwargs}  " for kwargs, number in notes.items()]
    return "\n".join(lines) + "\n" + MEANING


def align(table: list[dict]) -> list[str]:
    """Return the lines of a Markdown table without empty columns."""
    table = [{name: str(cell).replace("|", "\\|") for name, cell in row.items()} for row in table]
    columns = [name for name in table[0] if any(row[name] for row in table)]
    widths = [max(len(name), *(len(row[name]) for row in table)) for name in columns]
    body = [columns, ["-" * width for width in widths], *([row[name] for name in columns] for row in table)]
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in body]


def published_markdown(rows: list[dict]) -> str:
    """Return all published results as Markdown, each next to the rows of its released log or of runs that repeat it."""
    for row in rows:
        if row["runs"][0].entry is None:
            warn(f"{row['run']}: not shown, because it does not repeat a published result")
    table = []
    for entry in PUBLISHED["results"]:
        for row in [row for row in rows if row["runs"][0].entry is entry] or [{}]:
            cells = entry | {name: row.get(name) for name in ("run", "seeds", "epochs_seen")}
            cells |= {f"measured {name}": with_error(row, name) for name in ("best", "last", "last10")}
            cells |= {name: cells.pop(name) for name in ("log", "recipe", "differences", "source")}  # the last columns
            table.append({name.replace("_", " "): as_text(value) for name, value in cells.items()})
    legend = "Top-1 on ImageNet-1K in percent: best epoch, last epoch, mean of the last 10; published: one seed."
    return "\n".join([*align(table), "", legend])


def write_csv(rows: list[dict]) -> None:
    rows = [row | row["varied"] for row in rows]
    columns = [name for name in rows[0] if name != "varied"]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerows([columns, *([as_text(row[name]) for name in columns] for row in rows)])


def varied_flags(text: str) -> list[str]:
    names = [name.strip().lstrip("-").replace("-", "_") for name in text.split(",")]
    if unknown := [name for name in names if name not in DEFAULTS.keys() - NEUTRAL]:
        raise argparse.ArgumentTypeError(f"expected flags of main.py that change the result, got {unknown[0]}")
    return names


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="folders with runs at any depth, or log files")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of Markdown")
    form.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    form.add_argument("--published", action="store_true", help="print all published results next to these runs")
    help_text = "flags to show and sort by, such as those of a sweep; default: those that tell rows apart"
    parser.add_argument("--vary", type=varied_flags, default=[], metavar="FLAG,...", help=help_text)
    help_text = "also draw the training curves, or with --vary the best top-1 of each row and its seeds"
    parser.add_argument("--plot", metavar="FILE.png", help=help_text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 2 if no argument could be read or the plot could not be written."""
    args = get_args_parser().parse_args(argv)
    rows = tabulate(read_runs(args.paths), args.vary)
    if not rows and (args.paths or not args.published):
        warn("error: there is no run in these paths: give folders that contain log.txt")
        return 2
    if args.plot and rows:
        import plots  # matplotlib is slow to import

        try:
            draw = plots.draw_rows if args.vary else plots.draw_training
            draw(rows).savefig(args.plot, bbox_inches="tight")  # with the whole legend
        except (OSError, ValueError) as error:
            warn(f"error: --plot {args.plot}: {getattr(error, 'strerror', None) or error}")
            return 2
    if args.csv:
        write_csv(rows)
    elif args.json:
        print(json.dumps(rows, indent=1, default=str))
    else:
        print(published_markdown(rows) if args.published else markdown(rows))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe early
    sys.exit(main())
