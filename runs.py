"""Read the logs of runs: their accuracy, the settings that it depends on, and the published result they repeat."""

import functools
import glob
import json
import math
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import flags
import parsing

ROOT = Path(__file__).parent
PUBLISHED = json.loads((ROOT / "recipes" / "published.json").read_text(encoding="utf-8"))
RELEASED = {entry["log"]: entry for entry in PUBLISHED["results"] if entry["log"]}
DEFAULTS = vars(flags.get_args_parser().parse_args([]))

# Arguments that cannot change the result. All others tell runs apart, including flags of later versions.
NEUTRAL = {
    *("output_dir", "resume", "start_epoch", "overwrite", "save_every", "eval", "eval_ema", "export", "dry_run"),
    *("dist_eval", "dist_url", "dist_timeout", "device", "num_workers", "pin_mem", "loader_timeout", "compile", "seed"),
    *("spectral_impl", "skip_bad_images", "model_ema_force_cpu", "patience_epochs", "deterministic", "wandb"),
    *("import_module", "teacher_attention"),
    *("world_size", "batch_size", "accum_steps"),  # only their product matters
    "spectra_every",  # of version 0.1
}
FEATURE = ["s_id", "t_id", "feature_loss", "batch_per_process"]
TEACHER = ["teacher_model", "teacher_path", "teacher_kwargs", "teacher_dtype", "distillation_alpha"]
TEACHER += ["distillation_tau", "w_fft"]
# Settings that a published result does not depend on or state; the number of parameters implies the classes.
NOT_PUBLISHED = ["data_path", "inat_category", "gratings_sizes", "num_classes", "teacher_path"]
NOT_PUBLISHED += ["model_ema", "model_ema_decay"]


def warn(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Run:
    """A log and the arguments stored with it; `args` and `settings` are empty if they are unknown."""

    log: Path
    epochs: dict[int, dict]  # the numbers of each epoch's line
    args: dict

    def __post_init__(self):
        self.settings = settings(self.args) if self.args else {}
        self.folder = self.log.resolve().parent
        self.name = self.folder.name if self.log.name == "log.txt" else self.log.stem
        if "=" in self.name:  # by recipes/sweep.py, whose folders are named after their values
            self.name = f"{self.folder.parent.name}/{self.name}"
        self.epochs_seen = max(self.epochs) + 1
        self.parameters = self.epochs[max(self.epochs)].get("n_parameters")
        self.entry = published(self.settings, self.parameters) if self.args else RELEASED.get(self.log.stem)
        self.num_epochs = num_epochs(self.args) if self.args else self.entry["epochs"] if self.entry else None
        self.done = self.epochs_seen >= self.num_epochs if self.num_epochs else None
        in_order = [stats for _, stats in sorted(self.epochs.items())]
        top1 = [stats["test_acc1"] for stats in in_order]
        ema = [stats["test_ema_acc1"] for stats in in_order if "test_ema_acc1" in stats]
        last10 = statistics.fmean(top1[-10:]) if len(top1) >= 10 else None
        self.top1 = {"best": max(top1), "last": top1[-1], "last10": last10, "ema_best": max(ema, default=None)}

    def __str__(self):
        return str(self.log)


def find_logs(path: Path) -> list[Path]:
    """Return the logs of all runs in a folder, at any depth, or else its .txt files; or the file itself."""
    if not path.is_dir():
        return [path]
    names = glob.glob("**/log.txt", root_dir=path, recursive=True) or glob.glob("*.txt", root_dir=path)
    if not names:
        warn(f"{path}: skipped, there is no log.txt in it")
    return [path / name for name in sorted(names)]


def read_run(log: Path) -> Run:
    """Read a log and the arguments next to it; raise a ValueError or OSError if it is not a log."""
    epochs = read_epochs(log)
    stored = log.with_name("args.json")
    if log.name == "log.txt" and stored.exists():
        try:
            return Run(log, epochs, DEFAULTS | json.loads(stored.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, flags.UserError):
            warn(f"{stored}: not the arguments of a run; its log is shown without them")
    return Run(log, epochs, {})


def read_epochs(log: Path) -> dict[int, dict]:
    """Return the numbers of each epoch. If lines repeat an epoch, as after resuming DeiT, the last one counts."""
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    epochs: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        try:
            stats = json.loads(line)
            if not math.isfinite(stats["test_acc1"]):
                raise ValueError(line)
            epochs[stats["epoch"]] = stats
        except (ValueError, KeyError, TypeError):
            if not epochs or number < len(lines):
                raise ValueError(f"line {number} is not an epoch of a run") from None
            warn(f"{log}: the last line is incomplete and was skipped")
    if not epochs:
        raise ValueError("it has no epochs yet")
    return epochs


def num_epochs(args: dict) -> int:
    """Return the number of epochs of a run; timm's cyclic schedules add the cool-down."""
    cyclic = args["sched"].startswith(("cosine", "tanh", "poly", "wsd", "rsqrt"))
    return args["epochs"] + (args["cooldown_epochs"] if cyclic else 0)


def settings(args: dict) -> dict:
    """Return the arguments that the result depends on. Runs with equal settings differ only in their seed.

    Raises:
        KeyError, TypeError, AttributeError, flags.UserError: they are not the arguments of a run.
    """
    known = {name: value for name, value in args.items() if name not in NEUTRAL}
    for name in ("model_kwargs", "teacher_kwargs"):  # version 0.1 stored lists of KEY=VALUE
        known[name] = [f"{key}={value}" for key, value in parsing.stored_kwargs(args[name]).items()]
    known["s_id"], known["t_id"] = list(args["s_id"]), list(args["t_id"])
    known["global_batch"] = args["world_size"] * args["batch_size"] * args["accum_steps"]
    known["amp_dtype"] = args["amp_dtype"] or ("float32" if args["device"] == "cpu" else "float16")
    known["data_path"] = PurePath(args["data_path"] or "").name  # its folder may differ between machines
    known["w_fft"] = args["w_fft"] * known.pop("distillation_beta")
    if args["feature_loss"].startswith(("manifold", "projector")):  # they compare the images of a process's batch
        known["batch_per_process"] = args["batch_size"]
    unused = FEATURE * (known["w_fft"] == 0) + ["distillation_tau"] * (args["distillation_type"] != "soft")
    unused += (TEACHER + FEATURE) * (args["distillation_type"] == "none")
    return {name: value for name, value in known.items() if name not in unused}


def fingerprint(known: dict, without=(), **changed) -> str:
    return json.dumps({name: value for name, value in known.items() if name not in without} | changed, sort_keys=True)


def recipe_words(recipe: Path) -> Iterator[str]:
    """Yield the words of a recipe and of the recipes it includes, which are relative to the repository."""
    for line in recipe.read_text(encoding="utf-8").splitlines():
        for word in shlex.split(line, comments=True):
            yield from recipe_words(ROOT / word[1:]) if word.startswith("@") else [word]


@functools.cache
def recipe_settings(recipe: str) -> dict:
    """Return the settings of a recipe's run on 2 processes."""
    args = flags.get_args_parser().parse_args([*recipe_words(ROOT / "recipes" / f"{recipe}.args")])
    return settings(vars(args) | {"world_size": 2})


def published(known: dict, parameters: int | None) -> dict | None:
    """Return the published ImageNet result that a run with these settings and parameters repeats, or None."""
    if parameters != PUBLISHED["parameters"].get(known["model"]):
        return None
    for entry in PUBLISHED["results"]:
        if entry["recipe"]:
            needs = recipe_settings(entry["recipe"]) | {"global_batch": entry["global_batch"]}
            if all(known.get(name, ...) == needs[name] for name in needs.keys() - NOT_PUBLISHED):
                return entry
    return None


def read_runs(paths: list[str]) -> list[Run]:
    """Read all runs; warn about everything else and skip it."""
    runs = {}
    for log in [log for path in paths for log in find_logs(Path(path))]:
        try:
            runs[log.resolve()] = read_run(log)
        except (OSError, ValueError) as error:
            warn(f"{log}: skipped, {getattr(error, 'strerror', None) or error}")
    return list(runs.values())
