"""Make a table of runs from their logs: accuracy next to published values, spread over seeds, gains over controls."""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import sys
from pathlib import Path

from runs import DEFAULTS, FEATURE, NEUTRAL, PUBLISHED, TEACHER, Run, fingerprint, read_runs, warn

KINDS = ("none", "soft KD", "fft", "hard")  # in the order of the table
NAMES = {"none": "no teacher", "soft KD + spectral": "SpectralKD", "soft KD + mse": "MSE baseline"}


def method(run: Run) -> tuple[int, str]:
    """Return the position and name of a run's method; if its arguments are unknown, the loss terms in its log."""
    known, entry = run.settings, run.entry
    if not known and entry:
        return PUBLISHED["results"].index(entry), entry["method"]
    if not known:
        terms = [t for t in ("base", "dist", "fft") if any(e.get(f"train_loss_{t}") for e in run.epochs.values())]
        return 2 * len(KINDS), f"unknown; loss terms {', '.join(terms)}" if terms else "unknown"
    kind = known["distillation_type"].replace("soft", "soft KD")
    name = NAMES.get(kind, kind)
    if count := len(known.get("s_id", [])):
        name = f"{kind} + {known['feature_loss']}"
        pairs = "all blocks" if known["s_id"] == ["all"] else f"{count} pair{'s' * (count > 1)}"
        name = f"{NAMES.get(name, name)} ({pairs})"
    return 2 * KINDS.index(kind) + (count > 0), name


def as_text(value) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def data_set(known: dict) -> str:
    """Return the name of a run's data set; IMNET stands for any folder, so it is the folder's name."""
    return known["data_path"] if known["data_set"] == "IMNET" and known["data_path"] else known["data_set"]


def make_row(runs: list[Run], teachers: dict[Path, float]) -> dict:
    """Return the row of runs that differ only in their seed; `teachers` maps checkpoints to top-1."""
    run, names, entry = runs[0], [r.name for r in runs], runs[0].entry or {}
    known, seeds = run.settings, [r.args["seed"] for r in runs if r.args]
    row = {
        "run": os.path.commonprefix(names) + "*" * (len(names) > 1),  # noqa: RUF071 a prefix of characters
        "data_set": data_set(known) if known else "IMNET" if entry else None,
        "student": " ".join([known["model"], *known["model_kwargs"]]) if known else entry.get("student"),
        "teacher": " ".join([known["teacher_model"], *known["teacher_kwargs"]]) if "teacher_model" in known else None,
        "teacher_top1": teachers.get(Path(known["teacher_path"]).resolve()) if known.get("teacher_path") else None,
        "method": method(run)[1],
        "epochs": run.num_epochs,
        "epochs_seen": run.epochs_seen,
        "done": run.done,
        "global_batch": known.get("global_batch", entry.get("global_batch")),
        "seeds": seeds,
    }
    if not known:
        row["teacher"] = entry.get("teacher")
    for name in run.top1:
        values = [r.top1[name] for r in runs if r.top1[name] is not None]
        row[name] = statistics.fmean(values) if values else None
        # Runs with the same seed do not show the spread over seeds.
        row[f"{name}_std"] = statistics.stdev(values) if len(set(seeds)) == len(values) > 1 else None
    row |= dict.fromkeys(("gain_no_teacher", "gain_no_teacher_se", "gain_soft_kd", "gain_soft_kd_se"))
    row |= {"parameters": run.parameters, "published": entry.get("best"), "source": entry.get("source")}
    return row | {"logs": [str(r.log) for r in runs], "varied": {}}


def add_gains(row: dict, known: dict, controls: dict[str, dict]) -> None:
    """Add the gain of the best epoch over each control, all else being equal, and its standard error."""
    wanted = {"gain_no_teacher": fingerprint(known, TEACHER + FEATURE, distillation_type="none")}
    if known["distillation_type"] == "soft":
        wanted["gain_soft_kd"] = fingerprint(known, FEATURE, w_fft=0.0)
    for name, control in ((name, controls.get(key, row)) for name, key in wanted.items()):
        if control is not row:
            row[name] = row["best"] - control["best"]
            if None not in (row["best_std"], control["best_std"]):
                row[f"{name}_se"] = math.hypot(*(r["best_std"] / math.sqrt(len(r["seeds"])) for r in (row, control)))


def add_varied(table: list[tuple[dict, list[Run]]], names: list[str]) -> None:
    """Add the values of the named settings, or of those that differ between rows that would look the same."""
    alike: dict[tuple, list] = {}
    for row, runs in table:
        look = tuple(row[name] for name in ("data_set", "student", "teacher", "method", "epochs", "global_batch"))
        alike.setdefault(look, []).append(runs[0].settings)
    groups = () if names else alike.values()
    differ = {name for same in groups for name in set().union(*same) if len({as_text(k.get(name)) for k in same}) > 1}
    for row, runs in table:
        row["varied"] = {name.replace("_", "-"): runs[0].settings.get(name) for name in names or sorted(differ)}


def order_of(value) -> tuple:
    """Return a sort key: None first, then numbers, then text."""
    number = isinstance(value, (int, float))
    return value is not None, not number, value if number else 0, as_text(value)


def tabulate(runs: list[Run], vary: list[str]) -> list[tuple[dict, list[Run]]]:
    """Group runs into rows: teachers first for each data set, then for each student controls before methods.

    Args:
        vary: settings to show in columns and to sort by.
    """
    teachers: dict[Path, float] = {}
    groups: dict[str | Path, list[Run]] = {}
    for run in runs:
        teachers |= {run.folder / "model_best.pth": run.top1["best"], run.folder / "checkpoint.pth": run.top1["last"]}
        # Unfinished runs and runs with unknown arguments have their own rows.
        groups.setdefault(fingerprint(run.settings) if run.args and run.done else run.log, []).append(run)
    teaching = {Path(run.settings.get("teacher_path") or "/").resolve().parent for run in runs}

    def order(runs):
        run, known = runs[0], runs[0].settings
        model = [known.get(name, "") for name in ("model", "model_kwargs", "epochs", "global_batch")] if known else []
        data_set = known.get("data_set") or ("IMNET" if run.entry else "~")
        learns = run.folder not in teaching
        return data_set, learns, model, method(run), run.done is False, run.name

    table = [(make_row(group, teachers), group) for group in sorted(groups.values(), key=order)]
    finished = [(row, group[0].settings) for row, group in table if row["done"] and group[0].args]
    controls = {fingerprint(known): row for row, known in finished}
    for row, known in finished:
        add_gains(row, known, controls)
    add_varied(table, vary)
    return sorted(table, key=lambda pair: [order_of(value) for value in pair[0]["varied"].values()] if vary else 0)


def with_error(row: dict, name: str, sign: str = "") -> str:
    value, error = row[name], row.get(f"{name}_std", row.get(f"{name}_se"))
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
        teacher = f" ({row['teacher_top1']:.2f})" if row["teacher_top1"] is not None else ""
        return {
            "run": row["run"],
            "data set": row["data_set"] or "unknown",
            "student": model(row["student"]) or f"unknown, {row['parameters'] or '?'} parameters",
            "teacher": model(row["teacher"]) + teacher,
            "method": row["method"],
            **{name: as_text(value) for name, value in row["varied"].items()},
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


def published_rows(table: list[tuple[dict, list[Run]]]) -> list[dict]:
    """Return all published results, each next to the rows of its released log or of runs that repeat it."""
    for row, runs in table:
        if runs[0].entry is None:
            warn(f"{row['run']}: not shown, because it does not repeat a published result")
    first = ("student", "teacher", "method", "epochs", "global_batch", "best", "last", "last10")
    last = ("recipe", "differences", "source")
    measured = ("best", "best_std", "last", "last_std", "last10", "last10_std")
    rows = []
    for entry in PUBLISHED["results"]:
        for row in [row for row, runs in table if runs[0].entry is entry] or [{}]:
            shown = {name: entry[name] for name in first}
            shown |= {name: row.get(name) for name in ("run", "seeds", "epochs_seen")}
            shown |= {f"measured_{name}": row.get(name) for name in measured}
            rows.append(shown | {name: entry[name] for name in last})
    return rows


def published_markdown(rows: list[dict]) -> str:
    """Return the published results as aligned Markdown, with a legend."""

    def cells(row):
        numbers = {name: with_error(row, name) for name in row if name.startswith("measured")}
        texts = {name: as_text(value) for name, value in row.items()} | numbers
        return {name.replace("_", " "): text for name, text in texts.items() if not name.endswith("_std")}

    lines = [*align([cells(row) for row in rows]), ""]
    lines += ["Top-1 on ImageNet-1K in percent: best epoch, last epoch, mean of the last 10; published: one seed."]
    return "\n".join(lines)


def write_csv(rows: list[dict]) -> None:
    rows = [row | row.get("varied", {}) for row in rows]
    writer = csv.DictWriter(
        sys.stdout, [name for name in rows[0] if name != "varied"], "", "ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({name: as_text(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows)


def varied_flags(text: str) -> list[str]:
    names = [name.strip().lstrip("-").replace("-", "_") for name in text.split(",")]
    if unknown := [name for name in names if name not in DEFAULTS.keys() - NEUTRAL]:
        raise argparse.ArgumentTypeError(f"expected flags of main.py that change the result, got {unknown[0]}")
    return names


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="folders of runs, folders that contain them, or log files")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of Markdown")
    form.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--published", action="store_true", help="print all published results next to these runs")
    help_text = "flags to show and sort by, such as those of a sweep; default: those that tell rows apart"
    parser.add_argument("--vary", type=varied_flags, default=[], metavar="FLAG,...", help=help_text)
    help_text = "also draw the training curves, or with --vary the best top-1 by the first flag"
    parser.add_argument("--plot", metavar="FILE.png", help=help_text)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 2 if no argument could be read or the plot could not be written."""
    args = get_args_parser().parse_args(argv)
    runs = read_runs(args.paths)
    if not runs and (args.paths or not args.published):
        warn("error: there is no run in these paths: give folders that contain log.txt")
        return 2
    table = tabulate(runs, args.vary)
    rows = published_rows(table) if args.published else [row for row, _ in table]
    if args.csv:
        write_csv(rows)
    else:
        as_markdown = published_markdown if args.published else markdown
        print(json.dumps(rows, indent=1) if args.json else as_markdown(rows))
    if args.plot and table:
        import plots  # matplotlib is slow to import

        try:
            done = [(row, runs) for row, runs in table if row["done"] is not False]
            figure = plots.draw_sweep(done) if args.vary and done else plots.draw_training(table)
            figure.savefig(args.plot)
        except (OSError, ValueError) as error:
            warn(f"error: --plot {args.plot}: {getattr(error, 'strerror', None) or error}")
            return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe early
    sys.exit(main())
