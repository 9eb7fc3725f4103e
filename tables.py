"""Logs of runs to the paper's table: measured beside published, spread over seeds, gains over the controls."""

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

# Arguments that leave the result alone. Every other one keeps runs apart, flags of later versions included.
NEUTRAL = ["output_dir", "resume", "start_epoch", "overwrite", "save_every", "eval", "eval_ema", "export", "dry_run"]
NEUTRAL += ["dist_eval", "dist_url", "dist_timeout", "device", "num_workers", "pin_mem", "loader_timeout"]
NEUTRAL += ["spectral_impl", "spectra_every", "allow_world_size_change", "skip_bad_images", "model_ema_force_cpu"]
NEUTRAL += ["seed", "compile"]
NEUTRAL += ["world_size", "batch_size", "accum_steps"]  # their product is what counts
FEATURE = ["s_id", "t_id", "feature_loss"]
TEACHER = ["teacher_model", "teacher_path", "teacher_kwargs", "distillation_alpha", "distillation_tau", "w_fft"]

# Published results: what a run must be, in terms of `settings`, to stand beside one. BASE is common to all.
BASE = {"data_set": "IMNET", "input_size": 224, "eval_crop_ratio": 0.875, "num_classes": None}
BASE |= {"model_kwargs": [], "pretrained": False, "finetune": "", "drop": 0, "attn_only": False, "train_mode": True}
BASE |= {"opt": "adamw", "opt_eps": None, "opt_betas": None, "clip_grad": None, "weight_decay": 0.05}
BASE |= {"lr": 5e-4, "unscale_lr": False, "sched": "cosine", "lr_noise": None, "warmup_lr": 1e-6, "min_lr": 1e-5}
BASE |= {"warmup_epochs": 5, "cooldown_epochs": 0, "smoothing": 0.1, "bce_loss": False, "repeated_aug": True}
BASE |= {"aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "train_interpolation": "bicubic", "ThreeAugment": False}
BASE |= {"src": False, "reprob": 0.25, "remode": "pixel", "recount": 1, "cutmix_minmax": None}
BASE |= {"distillation_type": "none"}
PLAIN = BASE | {"model": "deit_tiny_patch16_224", "mixup": 0, "cutmix": 0, "drop_path": 0}
SOFT = PLAIN | {"distillation_type": "soft", "distillation_alpha": 0.9, "distillation_tau": 1, "w_fft": 0}
SOFT |= {"teacher_model": "cait_s24_224", "teacher_kwargs": []}
SPECTRAL = SOFT | {"feature_loss": "spectral", "w_fft": 0.2, "global_batch": 512, "epochs": 500}
SPECTRAL |= {"s_id": [0, 1, 6, 7, 8, 9, 10, 11], "t_id": [0, 1, 18, 19, 20, 21, 22, 23]}
SWIN = {"model": "swin_tiny_patch4_window7_224", "teacher_model": "swin_small_patch4_window7_224.ms_in1k"}
SWIN |= {"w_fft": 0.05, "s_id": [0, 1, 2, 3], "t_id": [0, 1, 2, 3], "warmup_epochs": 20}
LATER = {"global_batch": 2048, "epochs": 300}  # the authors' later runs; their w_fft is taken to be the paper's
DEIT = BASE | {"epochs": 300, "global_batch": 1024, "mixup": 0.8, "cutmix": 1, "drop_path": 0.1}
DEIT |= {"mixup_prob": 1, "mixup_switch_prob": 0.5, "mixup_mode": "batch"}
HARD = DEIT | {"distillation_type": "hard", "distillation_alpha": 0.5, "w_fft": 0}
HARD |= {"teacher_model": "regnety_160.deit_in1k", "teacher_kwargs": []}
PAPER, DEIT_PAPER = "arXiv 2412.19055", "arXiv 2012.12877"
LATER_PAPERS = "same authors, arXiv 2511.06848, 2511.15572"
PUBLISHED = (  # (ImageNet-1K top-1 of the best epoch in percent, source, settings)
    (77.4, PAPER, SPECTRAL | {"epochs": 400}),
    (82.2, PAPER, SPECTRAL | {"model": "deit_small_patch16_224"}),
    (82.7, PAPER, SPECTRAL | SWIN),
    (74.86, LATER_PAPERS, PLAIN | LATER),
    (76.99, LATER_PAPERS, SOFT | LATER),
    (77.00, LATER_PAPERS, SPECTRAL | LATER | {"s_id": [0], "t_id": [0]}),
    (77.08, LATER_PAPERS, SPECTRAL | LATER | {"s_id": [0, 11], "t_id": [0, 23]}),
    (76.83, LATER_PAPERS, SPECTRAL | LATER | {"s_id": [11], "t_id": [23]}),
    (78.07, LATER_PAPERS, SOFT | LATER | {"epochs": 500}),
    (77.59, LATER_PAPERS, SPECTRAL | LATER | {"s_id": [11], "t_id": [23], "epochs": 500}),
    (72.2, DEIT_PAPER, DEIT | {"model": "deit_tiny_patch16_224"}),
    (79.9, f"{DEIT_PAPER}, as quoted in {PAPER}", DEIT | {"model": "deit_small_patch16_224"}),
    (74.5, DEIT_PAPER, HARD | {"model": "deit_tiny_distilled_patch16_224"}),
    (81.2, DEIT_PAPER, HARD | {"model": "deit_small_distilled_patch16_224"}),
)
PARAMETERS = {  # with ImageNet's 1000 classes, which flags alone do not tell
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "swin_tiny_patch4_window7_224": 28_288_354,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
}


# Reading


def warn(text):
    print(text, file=sys.stderr)


@dataclass
class Run:
    """A log and the arguments beside it; `args` and `settings` are empty where they are not known."""

    log: Path
    epochs: dict  # {epoch: the numbers of its line}
    args: dict
    settings: dict

    def __post_init__(self):
        self.folder = self.log.resolve().parent
        self.name = self.folder.name if self.log.name == "log.txt" else self.log.stem
        self.epochs_seen = max(self.epochs) + 1
        self.done = self.epochs_seen >= num_epochs(self.args) if self.args else None
        top1, ema = (
            [stats[number] for _, stats in sorted(self.epochs.items()) if number in stats]
            for number in ("test_acc1", "test_ema_acc1")
        )
        last10 = statistics.fmean(top1[-10:]) if len(top1) >= 10 else None
        self.top1 = {"best": max(top1), "last": top1[-1], "last10": last10, "ema_best": max(ema, default=None)}


def read_run(argument):
    """Reads the folder of a run, or a log by itself.

    Raises:
        ValueError, OSError: it is no log of a run.
    """
    log = Path(argument)
    if log.is_dir():
        log = log / "log.txt"
        if not log.exists():
            raise ValueError("no log.txt in it")
    epochs = read_epochs(log)
    beside = log.with_name("args.json")
    if log.name == "log.txt" and beside.exists():
        try:
            args = json.loads(beside.read_text(encoding="utf-8"))
            return Run(log, epochs, args, settings(args))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            warn(f"{beside}: not the arguments of a run; its log is shown without them")
    return Run(log, epochs, {}, {})


def read_epochs(log):
    """{epoch: numbers} of a log; of an epoch that stands in it twice, as after a resume of the original, the later."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    epochs = {}
    for number, line in enumerate(lines, 1):
        try:
            stats = json.loads(line)
            if not isinstance(stats["epoch"], int) or not math.isfinite(stats["test_acc1"]):
                raise ValueError(line)
        except (ValueError, KeyError, TypeError):
            if not epochs or number < len(lines):
                raise ValueError(f"line {number} is not an epoch of a run") from None
            warn(f"{log}: the last line is torn and was left out")
        else:
            if stats["epoch"] in epochs:
                warn(f"{log}: line {number} repeats epoch {stats['epoch']}; the later line counts")
            epochs[stats["epoch"]] = stats
    if not epochs:
        raise ValueError("no epoch in it yet")
    return epochs


def num_epochs(args):
    """Length of the run; timm's schedules that go in cycles have the cool-down on top."""
    cyclic = args["sched"].startswith(("cosine", "tanh", "poly", "wsd", "rsqrt"))
    return args["epochs"] + (args["cooldown_epochs"] if cyclic else 0)


def settings(args):
    """The arguments that the result depends on, equal for runs that differ in their seed only.

    Raises:
        KeyError, TypeError, AttributeError: they are not the arguments of a run.
    """
    known = {name: value for name, value in args.items() if name not in NEUTRAL}
    num_epochs(args)  # whose arguments are needed as well
    needed = [args[name] for name in ("seed", "model", *TEACHER)]
    if None in needed or args["distillation_type"] not in ("none", "soft", "hard", "fft"):
        raise ValueError("not the arguments of a run")
    known["model_kwargs"], known["s_id"], known["t_id"] = (
        list(args[name]) for name in ("model_kwargs", "s_id", "t_id")
    )
    known["global_batch"] = args["world_size"] * args["batch_size"] * args["accum_steps"]
    known["amp_dtype"] = args["amp_dtype"] or ("float16" if args["device"].startswith("cuda") else "float32")
    known["data_path"] = PurePath(args["data_path"] or "").name  # it may lie elsewhere on another machine
    known["w_fft"] = args["w_fft"] * known.pop("distillation_beta")
    unused = FEATURE if known["w_fft"] == 0 else []
    unused = unused + (["distillation_tau"] if args["distillation_type"] != "soft" else [])
    unused = TEACHER + FEATURE if args["distillation_type"] == "none" else unused
    return {name: value for name, value in known.items() if name not in unused}


def fingerprint(known, without=(), **changed):
    return json.dumps({name: value for name, value in known.items() if name not in without} | changed, sort_keys=True)


def published(known):
    """(top-1, source) of the published result that a run of these settings repeats, or (None, None)."""
    for top1, source, needs in PUBLISHED:
        if all(name in known and known[name] == value for name, value in needs.items()):
            return top1, source
    return None, None


# The table

METHODS = ("none", "soft KD", "MSE twin", "SpectralKD", "fft", "hard")  # in the order of the table


def method(run):
    """(place in the order, name) of a run's method; without arguments, the terms that its log has."""
    known = run.settings
    if not known:
        terms = [t for t in ("base", "dist", "fft") if any(e.get(f"train_loss_{t}") for e in run.epochs.values())]
        return len(METHODS), f"unknown; loss terms {', '.join(terms)}" if terms else "unknown"
    kind, pairs, twin = known["distillation_type"], len(known.get("s_id", [])), known.get("feature_loss") == "mse"
    if kind == "soft":
        kind = ("MSE twin" if twin else "SpectralKD") if pairs else "soft KD"
        name = kind
    else:
        name = kind + (" + MSE" if twin else " + spectral" if pairs else "")
    return METHODS.index(kind), f"{name} ({pairs} pair{'s' * (pairs > 1)})" if pairs else name


def make_row(runs, teachers):
    """One row: runs that differ in their seed only. `teachers` is {path of a checkpoint: its top-1}."""
    run, names = runs[0], [r.name for r in runs]
    known, seeds = run.settings, [r.args["seed"] for r in runs if r.args]
    row = {
        "run": os.path.commonprefix(names) + "*" * (len(names) > 1),  # noqa: RUF071 characters are what is wanted
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
        # A seed that was run twice says nothing of the spread over seeds.
        row[f"{name}_std"] = statistics.stdev(values) if len(set(seeds)) == len(values) > 1 else None
    row |= dict.fromkeys(("gain_no_teacher", "gain_no_teacher_se", "gain_soft_kd", "gain_soft_kd_se"))
    row["parameters"] = run.epochs[max(run.epochs)].get("n_parameters")
    imagenet = row["parameters"] == PARAMETERS.get(known.get("model"))
    row["published"], row["source"] = published(known) if imagenet else (None, None)
    row["logs"] = [str(r.log) for r in runs]
    return row


def add_gains(row, known, controls):
    """Notes how much better the best epoch is than those of the controls that differ in nothing else.

    `controls` is {fingerprint: row}. The error is the standard error of the difference of two means over seeds.
    """
    wanted = {}
    if known["distillation_type"] != "none":
        wanted["gain_no_teacher"] = fingerprint(known, TEACHER + FEATURE, distillation_type="none")
    if known["distillation_type"] == "soft" and known["w_fft"]:
        wanted["gain_soft_kd"] = fingerprint(known, FEATURE, w_fft=0.0)
    for name, control in ((name, controls.get(wanted[name])) for name in wanted):
        if control:
            row[name] = row["best"] - control["best"]
            if None not in (row["best_std"], control["best_std"]):
                row[f"{name}_se"] = math.hypot(*(r["best_std"] / math.sqrt(len(r["seeds"])) for r in (row, control)))


def name_differences(table):
    """Adds to the method of rows that would look alike the settings in which they differ."""
    alike = {}
    for row, runs in table:
        look = tuple(row[name] for name in ("data_set", "student", "teacher", "method", "epochs", "global_batch"))
        alike.setdefault(look, []).append((row, runs[0].settings))
    for same in alike.values():
        for name in sorted(set().union(*(known for _, known in same))):
            values = [known.get(name) for _, known in same]
            if any(value != values[0] for value in values):
                for (row, _), value in zip(same, values, strict=True):
                    row["method"] += f", {name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def tabulate(runs):
    """Groups runs to [(row, its runs)]: per data set the teachers, then of each student controls before methods."""
    teachers, groups = {}, {}
    for run in runs:
        teachers |= {run.folder / "model_best.pth": run.top1["best"], run.folder / "checkpoint.pth": run.top1["last"]}
        # A run that is going has a row for itself, and so has one whose arguments are not known.
        groups.setdefault(fingerprint(run.settings) if run.done else run.log, []).append(run)
    teaching = {Path(run.settings.get("teacher_path") or "/").resolve().parent for run in runs}

    def place(runs):
        run, known = runs[0], runs[0].settings
        student = [known.get(name, "") for name in ("model", "model_kwargs")] if known else []
        size = [known.get(name, 0) for name in ("epochs", "global_batch")]
        teaches = run.folder in teaching
        return (known.get("data_set", "~"), not teaches, student, size, method(run)[0], run.done is False, run.name)

    table = [(make_row(group, teachers), group) for group in sorted(groups.values(), key=place)]
    finished = [(row, group[0].settings) for row, group in table if row["done"]]
    controls = {fingerprint(known): row for row, known in finished}
    for row, known in finished:
        add_gains(row, known, controls)
    name_differences(table)
    return table


# Printing


def with_error(row, name, sign=""):
    value, error = row[name], row.get(f"{name}_std", row.get(f"{name}_se"))
    return "" if value is None else f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def markdown(rows):
    """The table as aligned Markdown, then what its footnotes and numbers mean."""
    notes = {}

    def model(text):  # arguments of a model go below the table
        name, _, kwargs = (text or "").partition(" ")
        return f"{name} [{notes.setdefault(kwargs, len(notes) + 1)}]" if kwargs else name

    def cells(row):
        seen, whole, seeds = row["epochs_seen"], row["epochs"], ", ".join(map(str, row["seeds"]))
        return {
            "run": row["run"],
            "data set": row["data_set"] or "unknown",
            "student": model(row["student"]) or f"unknown, {row['parameters'] or '?'} parameters",
            "teacher": model(row["teacher"])
            + (f" ({row['teacher_top1']:.2f})" if row["teacher_top1"] is not None else ""),
            "method": row["method"],
            "epochs": f"{seen} seen" if whole is None else whole if row["done"] else f"{seen} of {whole}",
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
    lines = [columns, ["-" * width for width in widths], *([row[name] for name in columns] for row in table)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    lines += ["", *(f"[{number}] {kwargs}  " for kwargs, number in notes.items())]
    lines += [
        "Top-1 in percent; ± is the sample standard deviation over seeds. Gains compare the best epochs of finished"
    ]
    return "\n".join([*lines, "runs that differ in nothing else; their ± is the standard error of the difference."])


def print_csv(rows):
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {name: " ".join(map(str, row[name])) for name in ("seeds", "logs")})


TERMS = {"train_loss_base": "weighted cross-entropy", "train_loss_dist": "weighted loss of the logits"}
TERMS |= {"train_loss_fft": "weighted loss of the features"}
STYLES = ("-", "--", ":", "-.")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito, no yellow


def plot(table, file):
    """Draws top-1 and the loss terms over the epochs: a colour a row, a line a seed, into an image file."""
    from matplotlib.figure import Figure  # slow to import, and needed here only
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    logged = [stats for _, runs in table for run in runs for stats in run.epochs.values()]
    terms = [term for term in TERMS if any(stats.get(term) for stats in logged)]
    panels = [["test_acc1", term] for term in terms] or [["test_acc1"]]
    figure = Figure(figsize=(10, 5.8), dpi=200, layout="constrained")
    axes = figure.subplot_mosaic(panels, width_ratios=(5, 3)[: len(panels[0])], sharex=True)
    one_student = len({row["student"] for row, _ in table}) == 1 and table[0][0]["student"]
    for i, (row, runs) in enumerate(table):
        look = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)], "lw": 1.3}
        label = row["method"] if one_student else f"{row['run']}: {row['method']}"
        for run in runs:
            for name, axis in axes.items():
                points = [(epoch + 1, stats.get(name)) for epoch, stats in sorted(run.epochs.items())]
                points = [point for point in points if point[1]]  # a term that the method lacks is logged as zero
                axis.plot([epoch for epoch, _ in points], [value for _, value in points], label=label, **look)
            label = None
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
    for name in panels[-1]:
        axes[name].set_xlabel("epoch")
    figure.legend(*axes["test_acc1"].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(file)


def main(argv=None):
    """Returns the exit code: 2 where no argument could be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", help="folders of runs, or log files")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print comma-separated values instead of Markdown")
    form.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the training curves, too")
    args = parser.parse_args(argv)
    runs = {}
    for path in args.paths:
        try:
            run = read_run(path)
            runs[run.log.resolve()] = run
        except (OSError, ValueError) as error:
            warn(f"{path}: skipped, {getattr(error, 'strerror', None) or error}")
    if not runs:
        warn("error: none of the arguments is the folder or the log of a run: give folders that hold a log.txt")
        return 2
    table = tabulate(list(runs.values()))
    rows = [row for row, _ in table]
    if args.csv:
        print_csv(rows)
    else:
        print(json.dumps(rows, indent=1) if args.json else markdown(rows))
    if args.plot:
        try:
            plot(table, args.plot)
        except (OSError, ValueError) as error:
            warn(f"error: --plot {args.plot}: {getattr(error, 'strerror', None) or error}")
            return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # an early end of `| head` is no error
    sys.exit(main())
