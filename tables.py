"""Turn the logs of runs into a table: measured next to published accuracy, spread over seeds, gains over controls."""

import argparse
import csv
import json
import math
import os
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath

# Arguments that cannot change the result. All others keep runs apart, including flags that later versions add.
NEUTRAL = {
    *("output_dir", "resume", "start_epoch", "overwrite", "save_every", "eval", "eval_ema", "export", "dry_run"),
    *("dist_eval", "dist_url", "dist_timeout", "device", "num_workers", "pin_mem", "loader_timeout", "compile", "seed"),
    *("spectral_impl", "skip_bad_images", "model_ema_force_cpu", "patience_epochs"),
    *("world_size", "batch_size", "accum_steps"),  # only their product matters
}
FEATURE = ["s_id", "t_id", "feature_loss"]
TEACHER = ["teacher_model", "teacher_path", "teacher_kwargs", "distillation_alpha", "distillation_tau", "w_fft"]
PUBLISHED = json.loads((Path(__file__).parent / "recipes" / "published.json").read_text(encoding="utf-8"))


def warn(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Run:
    """A log and the arguments stored with it; `args` and `settings` are empty if they are unknown."""

    log: Path
    epochs: dict[int, dict]  # the numbers of each epoch's line
    args: dict
    settings: dict

    def __post_init__(self):
        self.folder = self.log.resolve().parent
        self.name = self.folder.name if self.log.name == "log.txt" else self.log.stem
        self.epochs_seen = max(self.epochs) + 1
        self.done = self.epochs_seen >= num_epochs(self.args) if self.args else None
        in_order = [stats for _, stats in sorted(self.epochs.items())]
        top1 = [stats["test_acc1"] for stats in in_order]
        ema = [stats["test_ema_acc1"] for stats in in_order if "test_ema_acc1" in stats]
        last10 = statistics.fmean(top1[-10:]) if len(top1) >= 10 else None
        self.top1 = {"best": max(top1), "last": top1[-1], "last10": last10, "ema_best": max(ema, default=None)}


def read_run(path: str) -> Run:
    """Read the folder of a run, or a log file; a ValueError or OSError if it is not one."""
    log = Path(path) / "log.txt" if Path(path).is_dir() else Path(path)
    epochs = read_epochs(log)
    stored = log.with_name("args.json")
    if log.name == "log.txt" and stored.exists():
        try:
            args = json.loads(stored.read_text(encoding="utf-8"))
            return Run(log, epochs, args, settings(args))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            warn(f"{stored}: not the arguments of a run; its log is shown without them")
    return Run(log, epochs, {}, {})


def read_epochs(log: Path) -> dict[int, dict]:
    """Return the numbers of each epoch. Of lines that repeat an epoch, as after a resume of DeiT, the last counts."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    epochs: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        try:
            stats = json.loads(line)
            if not isinstance(stats["epoch"], int) or not math.isfinite(stats["test_acc1"]):
                raise ValueError(line)
        except (ValueError, KeyError, TypeError):
            if not epochs or number < len(lines):
                raise ValueError(f"line {number} is not an epoch of a run") from None
            warn(f"{log}: the last line is incomplete and was skipped")
        else:
            if stats["epoch"] in epochs:
                warn(f"{log}: line {number} repeats epoch {stats['epoch']}; the later line counts")
            epochs[stats["epoch"]] = stats
    if not epochs:
        raise ValueError("it holds no epoch yet")
    return epochs


def num_epochs(args: dict) -> int:
    """Return the length of a run; timm's cyclic schedules add the cool-down."""
    cyclic = args["sched"].startswith(("cosine", "tanh", "poly", "wsd", "rsqrt"))
    return args["epochs"] + (args["cooldown_epochs"] if cyclic else 0)


def settings(args: dict) -> dict:
    """Return the arguments that the result depends on; runs with equal ones differ only in their seed.

    Raises:
        KeyError, TypeError, AttributeError: they are not the arguments of a run.
    """
    known = {name: value for name, value in args.items() if name not in NEUTRAL}
    num_epochs(args)  # raises if its arguments are missing
    for name in ("model_kwargs", "teacher_kwargs"):  # version 0.1 stored lists of KEY=VALUE
        known[name] = [f"{k}={v}" for k, v in args[name].items()] if isinstance(args[name], dict) else list(args[name])
    known["s_id"], known["t_id"] = list(args["s_id"]), list(args["t_id"])
    known["global_batch"] = args["world_size"] * args["batch_size"] * args["accum_steps"]
    known["amp_dtype"] = args["amp_dtype"] or ("float32" if args["device"] == "cpu" else "float16")
    known["data_path"] = PurePath(args["data_path"] or "").name  # its folder may differ between machines
    known["w_fft"] = args["w_fft"] * known.pop("distillation_beta")
    unused = FEATURE * (known["w_fft"] == 0) + ["distillation_tau"] * (args["distillation_type"] != "soft")
    unused += (TEACHER + FEATURE) * (args["distillation_type"] == "none")
    return {name: value for name, value in known.items() if name not in unused}


def fingerprint(known: dict, without=(), **changed) -> str:
    return json.dumps({name: value for name, value in known.items() if name not in without} | changed, sort_keys=True)


def published(known: dict) -> tuple[float | None, str | None]:
    """Return top-1 and source of the published result that a run of these settings repeats, or Nones."""
    for entry in PUBLISHED["results"]:
        needs = {name: value for name, value in entry.items() if name not in ("top1", "source")}
        while "like" in needs:
            needs = PUBLISHED["settings"][needs.pop("like")] | needs
        if all(name in known and known[name] == value for name, value in needs.items()):
            return entry["top1"], entry["source"]
    return None, None


METHODS = ("none", "soft KD", "MSE baseline", "SpectralKD", "fft", "hard")  # in the order of the table


def method(run: Run) -> tuple[int, str]:
    """Return the position and name of a run's method; without arguments, the loss terms in its log."""
    known = run.settings
    if not known:
        terms = [t for t in ("base", "dist", "fft") if any(e.get(f"train_loss_{t}") for e in run.epochs.values())]
        return len(METHODS), f"unknown; loss terms {', '.join(terms)}" if terms else "unknown"
    kind, count, mse = known["distillation_type"], len(known.get("s_id", [])), known.get("feature_loss") == "mse"
    if kind == "soft":
        name = kind = ("MSE baseline" if mse else "SpectralKD") if count else "soft KD"
    else:
        name = kind + (" + MSE" if mse else " + spectral" if count else "")
    return METHODS.index(kind), f"{name} ({count} pair{'s' * (count > 1)})" if count else name


def make_row(runs: list[Run], teachers: dict[Path, float]) -> dict:
    """Return the row of runs that differ only in their seed. `teachers` maps checkpoints to their top-1."""
    run, names = runs[0], [r.name for r in runs]
    known, seeds = run.settings, [r.args["seed"] for r in runs if r.args]
    row = {
        "run": os.path.commonprefix(names) + "*" * (len(names) > 1),  # noqa: RUF071 a prefix of characters
        "data_set": known.get("data_set"),
        "student": " ".join([known["model"], *known["model_kwargs"]]) if known else None,
        "teacher": " ".join([known["teacher_model"], *known["teacher_kwargs"]]) if "teacher_model" in known else None,
        "teacher_top1": teachers.get(Path(known["teacher_path"]).resolve()) if known.get("teacher_path") else None,
        "method": method(run)[1],
        "epochs": num_epochs(run.args) if run.args else None,
        "epochs_seen": run.epochs_seen,
        "done": run.done,
        "global_batch": known.get("global_batch"),
        "seeds": seeds,
    }
    for name in run.top1:
        values = [r.top1[name] for r in runs if r.top1[name] is not None]
        row[name] = statistics.fmean(values) if values else None
        # Two runs of the same seed do not show the spread over seeds.
        row[f"{name}_std"] = statistics.stdev(values) if len(set(seeds)) == len(values) > 1 else None
    row |= dict.fromkeys(("gain_no_teacher", "gain_no_teacher_se", "gain_soft_kd", "gain_soft_kd_se"))
    row["parameters"] = run.epochs[max(run.epochs)].get("n_parameters")
    imagenet = row["parameters"] == PUBLISHED["parameters"].get(known.get("model"))
    row["published"], row["source"] = published(known) if imagenet else (None, None)
    row["logs"] = [str(r.log) for r in runs]
    return row


def add_gains(row: dict, known: dict, controls: dict[str, dict]) -> None:
    """Add the gain of the best epoch over each control that differs in nothing else, and its standard error."""
    wanted = {"gain_no_teacher": fingerprint(known, TEACHER + FEATURE, distillation_type="none")}
    if known["distillation_type"] == "soft":
        wanted["gain_soft_kd"] = fingerprint(known, FEATURE, w_fft=0.0)
    for name, control in ((name, controls.get(key, row)) for name, key in wanted.items()):
        if control is not row:
            row[name] = row["best"] - control["best"]
            if None not in (row["best_std"], control["best_std"]):
                row[f"{name}_se"] = math.hypot(*(r["best_std"] / math.sqrt(len(r["seeds"])) for r in (row, control)))


def name_differences(table: list[tuple[dict, list[Run]]]) -> None:
    """Append the settings that differ to the method of rows that would look the same."""
    alike: dict[tuple, list] = {}
    for row, runs in table:
        look = tuple(row[name] for name in ("data_set", "student", "teacher", "method", "epochs", "global_batch"))
        alike.setdefault(look, []).append((row, runs[0].settings))
    for same in alike.values():
        for name in sorted(set().union(*(known for _, known in same))):
            if any(known.get(name) != same[0][1].get(name) for _, known in same):
                for row, known in same:
                    value = known.get(name)
                    row["method"] += f", {name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def tabulate(runs: list[Run]) -> list[tuple[dict, list[Run]]]:
    """Group runs into rows: for each data set teachers first, then for each student controls before methods."""
    teachers: dict[Path, float] = {}
    groups: dict[str | Path, list[Run]] = {}
    for run in runs:
        teachers |= {run.folder / "model_best.pth": run.top1["best"], run.folder / "checkpoint.pth": run.top1["last"]}
        # Unfinished runs, and runs with unknown arguments, have a row each.
        groups.setdefault(fingerprint(run.settings) if run.done else run.log, []).append(run)
    teaching = {Path(run.settings.get("teacher_path") or "/").resolve().parent for run in runs}

    def order(runs):
        run, known = runs[0], runs[0].settings
        model = [known.get(name, "") for name in ("model", "model_kwargs", "epochs", "global_batch")] if known else []
        data_set, learns = known.get("data_set", "~"), run.folder not in teaching
        return data_set, learns, model, method(run)[0], run.done is False, run.name

    table = [(make_row(group, teachers), group) for group in sorted(groups.values(), key=order)]
    finished = [(row, group[0].settings) for row, group in table if row["done"]]
    controls = {fingerprint(known): row for row, known in finished}
    for row, known in finished:
        add_gains(row, known, controls)
    name_differences(table)
    return table


def with_error(row: dict, name: str, sign: str = "") -> str:
    value, error = row[name], row.get(f"{name}_std", row.get(f"{name}_se"))
    return "" if value is None else f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def markdown(rows: list[dict]) -> str:
    """Return the table as aligned Markdown, with footnotes and what its numbers mean."""
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

    table = [{name: str(cell).replace("|", "\\|") for name, cell in cells(row).items()} for row in rows]
    columns = [name for name in table[0] if name != "best of EMA" or any(row[name] for row in table)]
    widths = [max(len(name), *(len(row[name]) for row in table)) for name in columns]
    body = [columns, ["-" * width for width in widths], *([row[name] for name in columns] for row in table)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in body]
    lines += ["", *(f"[{number}] {kwargs}  " for kwargs, number in notes.items())]
    lines += [
        "Top-1 in percent; ± is the sample standard deviation over seeds. Gains compare the best epochs of runs that"
    ]
    lines += ["differ in nothing else; their ± is the standard error of the difference. Unfinished runs are excluded."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 2 if no argument could be read or the plot could not be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", help="folders of runs, or log files")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of Markdown")
    form.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the training curves")
    args = parser.parse_args(argv)
    runs = {}
    for path in args.paths:
        try:
            run = read_run(path)
            runs[run.log.resolve()] = run
        except (OSError, ValueError) as error:
            warn(f"{path}: skipped, {getattr(error, 'strerror', None) or error}")
    if not runs:
        warn("error: none of the arguments is the folder or the log of a run: give folders that contain log.txt")
        return 2
    table = tabulate(list(runs.values()))
    rows = [row for row, _ in table]
    if args.csv:
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | {name: " ".join(map(str, row[name])) for name in ("seeds", "logs")} for row in rows)
    else:
        print(json.dumps(rows, indent=1) if args.json else markdown(rows))
    if args.plot:
        import plots  # matplotlib is slow to import

        try:
            plots.draw_training(table).savefig(args.plot)
        except (OSError, ValueError) as error:
            warn(f"error: --plot {args.plot}: {getattr(error, 'strerror', None) or error}")
            return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe early
    sys.exit(main())
