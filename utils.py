"""Errors, ranks, seeds, meters, and the log of a run. torch is imported where it is needed, as that takes seconds."""

import contextlib
import json
import math
import os
import random
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Errors


class UserError(Exception):
    """An error the user can fix, printed as a single line. Exit code 2."""


class Diverged(Exception):
    """Training broke down: losses, gradients or weights are not finite. Exit code 3."""


class Stopped(BaseException):
    """A signal ended the run early. Exit code 128 + the signal's number."""

    def __init__(self, number: int, detail: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{detail}")
        self.number = number


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line, without the traceback of a DataLoader worker."""
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def error_line(error: BaseException) -> str:
    """Return the line to print for an error; ranks other than 0 add their number."""
    return f"{f'[rank {rank()}] ' if rank() else ''}error: {one_line(error)}"


@contextlib.contextmanager
def as_user_error(prefix: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into UserErrors that begin with `prefix`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{one_line(error)}") from error


@contextlib.contextmanager
def warn_on(kind: type[Exception], message: str) -> Iterator[None]:
    """Log errors of this kind as warnings and continue after the block."""
    try:
        yield
    except kind as error:
        log(f"warning: {message}: {one_line(error)}")


def log(*words: Any, every_rank: bool = False) -> None:
    """Print on rank 0, or on every rank. A full disk or a closed pipe loses the line but does not end the run."""
    if every_rank or rank() == 0:
        try:
            print(*words, flush=True)
        except OSError:  # drop the line, or all later flushes would fail
            old = sys.stdout
            sys.stdout = open(old.fileno(), "w", closefd=False, encoding=old.encoding, errors=old.errors)  # noqa: SIM115


# Ranks


def _dist():
    """Return torch.distributed if a process group exists, else None."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch and torch.distributed.is_initialized() else None


def rank() -> int:
    """Return the rank of this process; before there is a process group, the launcher's variables tell it."""
    dist = _dist()
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return dist.get_rank() if dist else int(text) if text.isdecimal() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    dist = _dist()
    return dist.get_world_size() if dist else 1


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks in place and return it."""
    if dist := _dist():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list:
    """Return the values of all ranks, in rank order."""
    if not (dist := _dist()):
        return [value]
    values = [None] * world_size()
    with sys.modules["torch"].inference_mode(False):  # torch 2.4 cannot gather into inference tensors
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Run the block on rank 0 first, so that others find what it downloads. Its UserError is raised on all ranks."""
    if rank() != 0 and (error := gather_objects(None)[0]) is not None:
        raise UserError(error)
    try:
        yield
    except UserError as error:
        if rank() == 0:
            gather_objects(str(error))
        raise
    if rank() == 0:
        gather_objects(None)


# Seeds


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on GPUs as well."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def counter_seed(*counters: int) -> int:
    """Mix integers into a 63-bit seed with SplitMix64; every value and its position matter."""
    state = 0
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


# Meters and logs


class Meter:
    """Averages of named numbers over the steps of an epoch; steps with a non-finite number do not count.

    Sums are float64 on the host and added step by step, so an interrupted epoch gives the same bits.
    """

    def __init__(self, names: list[str]):
        self.sums = dict.fromkeys(names, 0.0)
        self.count = 0

    def add(self, row: list[float]) -> None:
        """Add the numbers of one step, in the order of the names."""
        if all(math.isfinite(value) for value in row):
            self.count += 1
            for name, value in zip(self.sums, row, strict=True):
                self.sums[name] += value

    def averages(self, over_ranks: bool = False) -> dict[str, float]:
        """Return {name: mean} of this process or of all processes."""
        totals = [self.count, *self.sums.values()]
        if over_ranks:
            totals = [sum(column) for column in zip(*gather_objects(totals), strict=True)]
        count, *sums = totals
        return {name: total / count if count else math.nan for name, total in zip(self.sums, sums, strict=True)}

    def state_dict(self) -> list[dict]:
        """Return the sums of every rank; a collective."""
        return gather_objects({"sums": dict(self.sums), "count": self.count})

    def load_state_dict(self, states: list[dict]) -> None:
        """Load this rank's sums; if the number of processes has changed, rank 0 takes all sums."""
        if len(states) == world_size():
            states = [states[rank()]]
        elif rank() != 0:
            states = []
        self.count = sum(state["count"] for state in states)
        self.sums = {name: sum(state["sums"][name] for state in states) for name in self.sums}


def write_atomically(path: str | Path, write: Callable[[Any], Any]) -> None:
    """Call `write` with a binary file, so that a kill leaves either the old file or the whole new one on disk."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # mkstemp makes it unreadable for others
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that its renames survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class RunLog:
    """log.txt (a line of JSON per epoch), args.json, TensorBoard scalars and Weights & Biases, written by rank 0.

    Lines that an earlier run wrote for `start_epoch` or later epochs are dropped. An empty `folder` or `wandb_project`
    turns off what is written there.
    """

    def __init__(self, folder: str | Path, arguments: dict, start_epoch: int = 0, wandb_project: str = ""):
        self.folder = Path(folder) if folder and rank() == 0 else None
        self.writer, self.wandb, self.lost = None, None, []
        if wandb_project and rank() == 0:
            self.wandb = _begin_wandb(wandb_project, self.folder, arguments, resumed=start_epoch > 0)
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = self.folder / "log.txt"
        with as_user_error(f"--output_dir {folder} cannot be written: ", OSError):
            text = json.dumps(arguments, indent=1, default=str).encode()
            write_atomically(self.folder / "args.json", lambda file: file.write(text))
            if self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                kept = "".join(line for line in lines if _epoch_of(line) < start_epoch).encode()
                write_atomically(self.path, lambda file: file.write(kept))
            with warn_on(UnicodeError, "TensorBoard events are not written, because the folder's name is not UTF-8"):
                self.writer = SummaryWriter(str(self.folder), purge_step=start_epoch or None)

    def epoch(self, stats: dict) -> None:
        """Log the statistics of an epoch; if the disk is full, warn and note that the line is lost."""
        if self.wandb is not None:
            self.wandb.log(stats, step=stats["epoch"])
        if self.folder is None:
            return
        line = (json.dumps(stats) + "\n").encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                whole = file.tell()
                if file.write(line) < len(line):
                    file.truncate(whole)
                    raise OSError("no space left on device")
                os.fsync(file.fileno())
        except OSError as error:
            self.lost.append(stats["epoch"])
            log(f"warning: log.txt not written: {error}")
        if self.writer is not None:
            try:
                for name, value in stats.items():
                    if isinstance(value, (int, float)) and name != "epoch":
                        self.writer.add_scalar(name.replace("_", "/", 1), value, stats["epoch"])
                self.writer.flush()
            except OSError as error:  # its thread has ended
                self.writer = None
                log(f"warning: no more TensorBoard events are written: {error}")

    def close(self) -> None:
        """Close the loggers."""
        if self.writer is not None:
            with warn_on(OSError, "TensorBoard events not written"):
                self.writer.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


def _begin_wandb(project: str, folder: Path | None, arguments: dict, resumed: bool):
    """Begin a run of Weights & Biases; a resumed run continues its curves by the id in wandb_id.txt."""
    with as_user_error("--wandb needs wandb (pip install wandb): ", ImportError):
        import wandb
    options: dict[str, Any] = {}
    if folder is not None:
        path = folder / "wandb_id.txt"
        identity = path.read_text().strip() if resumed and path.exists() else secrets.token_hex(8)
        write_atomically(path, lambda file: file.write(identity.encode()))
        options = {"name": folder.resolve().name, "id": identity, "resume": "allow", "dir": str(folder)}
    with as_user_error("--wandb: ", Exception):
        return wandb.init(project=project, config=arguments, **options)


def _epoch_of(line: str) -> float:
    try:
        return float(json.loads(line)["epoch"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill: dropped


class RunStatus:
    """status.json, for scripts that requeue jobs: running, preempted, done, diverged or failed, with details."""

    folder: Path | None = None

    def begin(self, folder: Path | None) -> None:
        """Start to write to a folder; a collective. A start refused before that leaves the status of the run in it."""
        self.folder = folder
        self.attempt = gather_objects(secrets.token_hex(8))[0]  # because clocks of machines differ
        self.write("running")
        gather_objects(None)  # now others may fail: this slow write cannot come after theirs

    def write(self, status: str, **facts: Any) -> None:
        """Write the status on rank 0, or on the rank that failed. The first end stays, as it causes the others."""
        if self.folder is None or (rank() != 0 and status != "failed"):
            return
        path = self.folder / "status.json"
        with contextlib.suppress(OSError, ValueError):
            before = json.loads(path.read_text())
            if before.get("attempt") == self.attempt and before["status"] != "running":
                return
        facts = {"status": status, **facts, "pid": os.getpid(), "host": socket.gethostname(), "attempt": self.attempt}
        text = json.dumps(facts | {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}).encode()
        try:
            write_atomically(path, lambda file: file.write(text))
        except OSError:
            # Even on a full disk an existing file can be overwritten.
            with warn_on(OSError, "status.json not written"), open(path, "r+b", buffering=0) as file:
                file.write(text)
                file.truncate()


run_status = RunStatus()
