"""Train a teacher and students with and without it on embedded data, then show their table and their spectra.

Runs of main.py are forks of this process, two at a time, so that its imports, which take seconds, are paid for once.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401 main.py imports it late

import analyze
import faults
import flags
import main as training
import tables

LANES = 2  # runs at a time, one thread each
GRID = "img_size=32 patch_size=8"
TEACHER = f"{GRID} embed_dim=64 depth=4 num_heads=4"
STUDENT = f"{GRID} embed_dim=48 depth=4 num_heads=3"
# RandAugment and DeiT's crops would turn and stretch the gratings into other classes: only shifts and erasing.
COMMON = "--data-set GRATINGS --input-size 32 --aa none --color-jitter 0 --batch-size 50 --lr 0.02 --warmup-epochs 0 "
COMMON += "--no-repeated-aug --clip-grad 1 --no-model-ema --num_workers 0 --device cpu --overwrite"
PAIRS = "--s-id 0 1 2 3 --t-id 0 1 2 3 --w-fft 0.2"
STUDENTS = {  # name in the figure: (folder, flags besides those of the teacher)
    "no teacher": ("no_teacher", None),
    "soft KD": ("soft_kd", "--w-fft 0"),
    "MSE baseline": ("mse", f"{PAIRS} --feature-loss mse"),
    "SpectralKD": ("spectral", PAIRS),
}


@dataclasses.dataclass
class Run:
    """A run of main.py; `after` is the one that has to end first."""

    folder: Path
    flags: str
    epochs: int
    after: "Run | None" = None
    process: BaseProcess | None = None
    stats: list[dict] = dataclasses.field(default_factory=list)  # of the epochs that have ended

    @property
    def left(self) -> int:
        """The number of epochs to come."""
        return self.epochs - len(self.stats)

    def start(self) -> None:
        """Train in a process of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.txt").unlink(missing_ok=True)  # of an earlier demo
        words = [*self.flags.split(), "--epochs", str(self.epochs), "--output_dir", str(self.folder)]
        self.process = fork(lambda: training.main(flags.parse_args(words)), self.folder / "console.txt")

    def read_log(self) -> list[dict]:
        """Return the lines of the log that are new since the last call."""
        log = self.folder / "log.txt"
        lines = log.read_text().splitlines() if self.process and log.exists() else []
        new = [json.loads(line) for line in lines[len(self.stats) :]]
        self.stats += new
        return new

    def ended(self) -> bool:
        """Return whether the run has ended; end the demo if it failed."""
        return self.process is not None and succeeded(self.process, self.folder / "console.txt") and self.left == 0


def fork(work: Callable, console: Path) -> BaseProcess:
    """Start a function in a fork of this process, with its output in a file."""

    def redirected():
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
        with faults.exit_codes():
            work()

    with open(console, "wb") as output:
        process = multiprocessing.get_context("fork").Process(target=redirected, daemon=True)
        process.start()
    return process


def succeeded(process: BaseProcess, console: Path) -> bool:
    """Return whether a process has ended; end the demo with the last line of its output if it failed."""
    if process.exitcode:
        last = console.read_text(errors="replace").strip().rpartition("\n")[2]
        raise SystemExit(f"{console}, exit code {process.exitcode}: {last}")
    return process.exitcode == 0


def plan(folder: Path, common: str, epochs: list[int], seeds: range) -> list[Run]:
    """Return the runs in the order of their start; `epochs` are those of the teacher and of a student."""
    teacher = Run(folder / "teacher", f"{common} --model cait_s24_224 --model-kwargs {TEACHER}", epochs[0])
    soft = f"--teacher-model cait_s24_224 --teacher-kwargs {TEACHER} --teacher-path {teacher.folder}/model_best.pth "
    soft += "--distillation-type soft --distillation-alpha 0.9"
    runs = [teacher]
    for name, distillation in STUDENTS.values():
        for seed in seeds:
            words = f"{common} --model deit_tiny_patch16_224 --model-kwargs {STUDENT} --seed {seed} "
            words += "" if distillation is None else f"{soft} {distillation}"
            runs.append(Run(folder / f"{name}-{seed}", words, epochs[1], None if distillation is None else teacher))
    return runs


def train(runs: list[Run]) -> None:
    """Train all runs, LANES at a time, and print a line for each epoch."""
    while not all(run.ended() for run in runs):
        for run in runs:
            busy = sum(other.process is not None and not other.ended() for other in runs)
            if run.process is None and busy < LANES and (run.after is None or run.after.ended()):
                run.start()
        for number, run in enumerate(runs, 1):
            for stats in run.read_log():
                epoch = f"epoch {stats['epoch'] + 1} of {run.epochs}, accuracy {stats['test_acc1']:.1f} %"
                left = "{}:{:02}".format(*divmod(round(seconds_left(runs)), 60))
                print(f"run {number} of {len(runs)}, {run.folder.name}: {epoch}, {left} left", flush=True)
        time.sleep(0.1)


def seconds_left(runs: list[Run]) -> float:
    """Estimate the time that the runs will still take, from their epochs so far."""
    known = [stats["seconds"] for run in runs for stats in run.stats]
    lanes, ends = [0.0] * LANES, {}
    for run in runs:
        pace = statistics.fmean([stats["seconds"] for stats in run.stats] or known)
        lanes.sort()
        lanes[0] = ends[run.folder] = max(lanes[0], ends[run.after.folder] if run.after else 0) + run.left * pace
    return max(lanes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.sh", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("Output/demo"), help="output folder")
    parser.add_argument("--full", action="store_true", help="two seeds per student, as in the README's table")
    parser.add_argument("--images", nargs=2, default=["5000", "1000"], metavar=("TRAIN", "VAL"))
    parser.add_argument("--epochs", nargs=2, type=int, default=[8, 3], metavar=("TEACHER", "STUDENT"))
    args = parser.parse_args()
    began = time.monotonic()
    runs = plan(args.folder, f"{COMMON} --gratings-sizes {' '.join(args.images)}", args.epochs, range(1 + args.full))
    print(f"{len(runs)} runs, {LANES} at a time; their output is in {args.folder}/*/console.txt", flush=True)
    train(runs)

    print(flush=True)
    tables.main([str(run.folder) for run in runs])
    subjects = {"teacher": "teacher"} | {label: f"{name}-0" for label, (name, _) in STUDENTS.items()}
    words = ["--compare", *(f"{label}={args.folder / name}" for label, name in subjects.items())]
    words += ["--num-images", "256", "--device", "cpu", "--num_workers", "0", "--output_dir", f"{args.folder}/analysis"]
    console = args.folder / "analysis.txt"
    process = fork(lambda: analyze.main(analyze.get_args_parser().parse_args(words)), console)
    process.join()
    succeeded(process, console)
    print(f"\nSpectra: {args.folder}/analysis/intensity.png. Curves over epochs: tensorboard --logdir {args.folder}")
    print(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
