"""Train a teacher and students with and without it on embedded data, then show their table and their spectra.

Runs of main.py are forks of this process, two at a time, so that its imports, which take seconds, are paid for once.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
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
    """A run of main.py."""

    folder: Path
    flags: str
    epochs: int
    taught: bool  # by the first run
    process: BaseProcess | None = None
    done: int = 0  # epochs whose log was read

    def start(self) -> None:
        """Train in a fork of this process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "log.txt").unlink(missing_ok=True)  # of an earlier demo
        words = [*self.flags.split(), "--epochs", str(self.epochs), "--output_dir", str(self.folder)]
        self.process = multiprocessing.get_context("fork").Process(target=self.work, args=(words,), daemon=True)
        self.process.start()

    def work(self, words: list[str]) -> None:
        """Execute main.py with its output in a file."""
        with open(self.folder / "console.txt", "wb") as output:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(output.fileno(), stream.fileno())
        with faults.exit_codes():
            training.main(flags.parse_args(words))

    def read_log(self) -> list[dict]:
        """Return the lines of the log that are new since the last call."""
        log = self.folder / "log.txt"
        lines = log.read_text().splitlines()[self.done :] if self.process and log.exists() else []
        self.done += len(lines)
        return [json.loads(line) for line in lines]

    def ended(self) -> bool:
        """Return whether the run has ended; end the demo with the last line of its output if it failed."""
        if self.process and self.process.exitcode:
            console = self.folder / "console.txt"
            last = console.read_text(errors="replace").strip().rpartition("\n")[2]
            raise SystemExit(f"{console}, exit code {self.process.exitcode}: {last}")
        return self.process is not None and self.process.exitcode == 0 and self.done == self.epochs


def plan(folder: Path, common: str, epochs: list[int], seeds: range) -> list[Run]:
    """Return the teacher and its students; `epochs` are those of the teacher and of a student."""
    runs = [Run(folder / "teacher", f"{common} --model cait_s24_224 --model-kwargs {TEACHER}", epochs[0], False)]
    soft = f"--teacher-model cait_s24_224 --teacher-kwargs {TEACHER} --teacher-path {folder}/teacher/model_best.pth "
    soft += "--distillation-type soft --distillation-alpha 0.9"
    for (name, distillation), seed in itertools.product(STUDENTS.values(), seeds):
        words = f"{common} --model deit_tiny_patch16_224 --model-kwargs {STUDENT} --seed {seed} "
        words += f"{soft} {distillation}" if distillation else ""
        runs.append(Run(folder / f"{name}-{seed}", words, epochs[1], distillation is not None))
    return runs


def train(runs: list[Run]) -> None:
    """Train all runs, LANES at a time, and print a line for each epoch."""
    began, total = time.monotonic(), sum(run.epochs for run in runs)
    while not all(run.ended() for run in runs):
        busy = sum(run.process is not None and not run.ended() for run in runs)
        ready = [run for run in runs if run.process is None and (runs[0].ended() or not run.taught)]
        for run in ready[: LANES - busy]:
            run.start()
        for number, run in enumerate(runs, 1):
            for stats in run.read_log():
                epoch = f"epoch {stats['epoch'] + 1} of {run.epochs}, accuracy {stats['test_acc1']:.1f} %"
                left = (time.monotonic() - began) * (total / sum(run.done for run in runs) - 1)  # roughly
                print(f"run {number} of {len(runs)}, {run.folder.name}: {epoch}, {left:.0f} s left", flush=True)
        time.sleep(0.1)


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
    with open(args.folder / "analysis.txt", "w") as console, contextlib.redirect_stdout(console):
        analyze.main(analyze.parse_args(words))
    print(f"\nSpectra: {args.folder}/analysis/intensity.png. Curves over epochs: tensorboard --logdir {args.folder}")
    print(f"Done in {time.monotonic() - began:.0f} s.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
