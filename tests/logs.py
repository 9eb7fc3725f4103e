"""Helpers for tests of tables: folders of runs as main.py leaves them, and their rows."""

import json

import flags
import runs
import tables

RUN = ["--data-set", "GRATINGS", "--device", "cpu", "--epochs", "3", "--warmup-epochs", "0"]
SOFT = ["--distillation-type", "soft", "--distillation-alpha", "0.9", "--w-fft", "0"]
SPECTRAL = [*SOFT, "--s-id", "0", "11", "--t-id", "0", "23", "--w-fft", "0.2"]


def log_line(epoch, top1, **more):
    """Return a line with the keys of the original program."""
    terms = {"train_loss": 1.5, "train_loss_base": 0.5, "train_loss_fft": 0.0, "train_loss_dist": 1.0}
    test = {"test_loss": 1.0, "test_acc1": top1, "test_acc5": 95.0}
    return json.dumps({"train_lr": 1e-3, **terms, **test, "epoch": epoch, "n_parameters": 5717416, **more}) + "\n"


def write_run(folder, top1, *more_flags, base=RUN, args=None, **more):
    """Write a run from its top-1 of each epoch, its flags, and changes of the stored arguments; return its folder."""
    folder.mkdir()
    stored = vars(flags.parse_args([*base, *map(str, more_flags)])) | {"world_size": 1} | (args or {})
    (folder / "args.json").write_text(json.dumps(stored))
    (folder / "log.txt").write_text("".join(log_line(i, value, **more) for i, value in enumerate(top1)))
    return folder


def rows_of(*paths):
    """Return the rows of the table by the name of the run."""
    return {row["run"]: row for row in tables.tabulate(runs.read_runs([*map(str, paths)]), [])}


def cells(markdown):
    """Return the cells of a Markdown table, as one dict per row, by the name of the run."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[header.index("run")]: dict(zip(header, row, strict=True)) for row in rows}
