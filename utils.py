"""User errors, flags, distributed facts, meters, the run's log, and checkpoints."""

import argparse
import ast
import contextlib
import datetime
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


# Errors


class UserError(Exception):
    """Something the user can mend, said in one line. Exit code 2."""


class Diverged(Exception):
    """Training cannot go on. Exit code 3."""


@contextlib.contextmanager
def exit_codes():
    """Turns UserError and Diverged into one line on stderr, said by one process, and exit codes 2 and 3."""
    try:
        yield
    except (UserError, Diverged) as error:
        if rank() == 0:
            line = " ".join(str(error).split())
            print(f"error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, UserError) else 3) from None


@contextlib.contextmanager
def as_user_error(prefix, *kinds):
    """Says an error of these kinds as a UserError, led by `prefix`."""
    try:
        yield
    except kinds as error:
        message = str(error).strip() or type(error).__name__
        raise UserError(f"{prefix}{message}") from error


def say(*words):
    """Prints on the first process only, at once."""
    if rank() == 0:
        print(*words, flush=True)


# Flags


class Parser(argparse.ArgumentParser):
    """Reads `@file` arguments, one flag a line, with # comments; an error is one line and exit code 2."""

    def convert_arg_line_to_args(self, line):
        return line.split("#", 1)[0].split()

    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf, *, ends=True):
    """An argparse type: an int or float inside [low, high], or inside (low, high) without `ends`; never nan."""
    brackets = "[]" if ends and math.isfinite(high) else "[)" if ends else "()"
    name = "a whole number" if kind is int else "a number"
    expected = (
        f"{name} in {brackets[0]}{low:g}, {high:g}{brackets[1]}" if (low, high) != (-math.inf, math.inf) else name
    )

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}") from None
        inside = low <= value <= high if ends else low < value < high
        if not inside or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


def key_values(pairs):
    """["depth=4", "name=abc"] -> {"depth": 4, "name": "abc"}, values read as Python literals where they are some."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"expected KEY=VALUE, got {pair}")
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result


def check_device(name):
    """Raises a UserError where torch has no such device, or this machine has not."""
    with as_user_error(f"--device {name}: expected cuda, cuda:N or cpu: ", RuntimeError):
        device = torch.device(name)
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: expected cuda, cuda:N or cpu")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UserError(f"--device {name}: this machine has {found} GPUs; try --device cpu")


# Processes


def rank() -> int:
    """This process's number, from the process group or, before there is one, from the launcher's environment."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def init_distributed(device, dist_url="env://", timeout=1800.0):
    """Joins the process group of the launcher where there is one, and returns this process's torch.device.

    Args:
        device: "cuda", "cuda:1", "cpu" ...; a plain "cuda" becomes the GPU of LOCAL_RANK.
        dist_url: rendezvous address for torch.distributed.
        timeout: seconds after which a collective that a process does not join ends the job.
    """
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index)
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            init_method=dist_url,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=datetime.timedelta(seconds=timeout),
        )
    return device


def sum_over_ranks(tensor):
    """Adds a tensor up over the processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value) -> list:
    """The values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def main_first():
    """Lets the first process run the body before the others: it downloads, they find the files."""
    if dist.is_initialized() and rank() != 0:
        dist.barrier()
    try:
        yield
    finally:
        if dist.is_initialized() and rank() == 0:
            dist.barrier()


class StopRequest:
    """Notes signals that ask the job to stop; the processes agree on it between steps.

    The handler only sets a flag. Calling the object is a collective: true on all processes once one was asked.
    """

    def __init__(self):
        self.asked = False
        # NCCL has no host tensors, and a collective on the device would wait for the step.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 and dist.is_initialized() else None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True

    def __call__(self) -> bool:
        if self.group is not None:
            flag = torch.tensor([int(self.asked)])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.asked = bool(flag.item())
        return self.asked


def seed_everything(seed: int):
    """Seeds Python's, numpy's and torch's generators, those of the GPUs included."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# Meters and logs


class Meter:
    """Averages of named numbers over the steps of an epoch; steps with a number that is not finite are left out.

    Sums are float64 on the host and added step by step, so that an epoch in two pieces gives the same bits.
    """

    def __init__(self, names):
        self.sums = dict.fromkeys(names, 0.0)
        self.count = 0

    def add(self, row: list[float]):
        """Takes the numbers of one step, in the order of the names."""
        if all(math.isfinite(value) for value in row):
            self.count += 1
            for name, value in zip(self.sums, row, strict=True):
                self.sums[name] += value

    def averages(self, over_ranks=False) -> dict[str, float]:
        """{name: mean}, of this process or of all."""
        totals = [self.count, *self.sums.values()]
        if over_ranks:
            totals = [sum(column) for column in zip(*gather_objects(totals), strict=True)]
        count, *sums = totals
        return {name: total / count if count else math.nan for name, total in zip(self.sums, sums, strict=True)}

    def state_dict(self):
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state):
        self.sums, self.count = dict(state["sums"]), state["count"]


class RunLog:
    """log.txt (one JSON object a line, an epoch a line), args.json and TensorBoard scalars; the first process writes.

    Args:
        folder: output folder; empty or None to write nothing.
        arguments: the run's flags, by name, for args.json.
        start_epoch: lines of this epoch and later are dropped: a resumed run writes them anew.
    """

    def __init__(self, folder, arguments, start_epoch=0):
        self.path, self.writer = None, None
        if not folder or rank() != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed by one process only

        self.path = Path(folder) / "log.txt"
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _epoch_of(line) < start_epoch]
            write_atomically(self.path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        self.writer = SummaryWriter(str(folder), purge_step=start_epoch or None)
        arguments = json.dumps(arguments, indent=1)
        write_atomically(Path(folder) / "args.json", lambda file: file.write(arguments.encode()))

    def epoch(self, stats: dict):
        """Appends a line to log.txt, and each number and list of numbers in it to TensorBoard over epochs."""
        if self.path is None:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(stats) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in stats.items():
            if isinstance(value, list):  # a curve over blocks
                for i, level in enumerate(value):
                    self.writer.add_scalar(f"{name.replace('_', '/', 1)}/{i:02d}", level, stats["epoch"])
            elif isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(name.replace("_", "/", 1), value, stats["epoch"])
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            self.writer.close()


def _epoch_of(line):
    try:
        return json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill: dropped


# Files

_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path, write):
    """Writes a file so that a kill at any moment leaves either the old one or the new one, whole and on disk.

    Args:
        path: the file.
        write: called with a binary file object.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o666 & ~_UMASK)  # mkstemp's own mode shuts out colleagues
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_copy(path, copy):
    """Gives a file that is never written in place a second name, atomically; a copy where links are not possible."""
    path, copy = Path(path), Path(copy)
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, copy)


class FolderLock:
    """Holds an output folder for one run. The lock goes with the process, however it ends.

    Raises:
        UserError: another run holds it.
    """

    def __init__(self, folder):
        self.file = open(Path(folder) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 open as long as the run
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.seek(0)
            holder = self.file.read().strip() or "another run"
            raise UserError(
                f"--output_dir {folder} is in use by {holder}: wait for it, or give another folder"
            ) from None
        self.file.truncate(0)
        self.file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        self.file.flush()


def open_output_folder(path):
    """Makes the output folder and locks it for this run; returns its CheckpointFolder, or None without a path."""
    if not path:
        return None
    folder = CheckpointFolder(path)
    if rank() == 0:
        with as_user_error(f"--output_dir {path} cannot be written: ", OSError):
            folder.folder.mkdir(parents=True, exist_ok=True)
            folder.lock = FolderLock(path)
    return folder


class CheckpointFolder:
    """The checkpoints of a run: checkpoint.pth, the one before it, the best, and milestones.

    Only the first process writes; a failed write keeps the previous file.
    """

    LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "model_best.pth"
    MAX_FAILURES = 3

    def __init__(self, folder):
        self.folder = Path(folder)
        self.failures = 0

    def save(self, state: dict, *, best=False, milestone=None):
        """Writes the state as the latest checkpoint.

        Raises:
            UserError: on all processes, when writing failed for the third time in a row.
        """
        if rank() == 0:
            try:
                self._write(state, best, milestone)
                self.failures = 0
            except OSError as error:
                self.failures += 1
                say(f"warning: checkpoint not written ({error}); the previous one is kept")
        if max(gather_objects(self.failures)) >= self.MAX_FAILURES:
            raise UserError(
                f"{self.MAX_FAILURES} checkpoints in a row could not be written to {self.folder}: free space"
            )

    def _write(self, state, best, milestone):
        latest = self.folder / self.LATEST
        if latest.exists():
            keep_copy(latest, self.folder / self.PREVIOUS)
        write_atomically(latest, lambda file: torch.save(state, file))
        if best:
            keep_copy(latest, self.folder / self.BEST)
        if milestone is not None:
            keep_copy(latest, self.folder / f"checkpoint_{milestone:04d}.pth")

    def load_newest(self):
        """(path, checkpoint) of the newest file that is whole, or (None, None) where there is none at all.

        Raises:
            UserError: there are files, and all are damaged.
        """
        paths = [self.folder / name for name in (self.LATEST, self.PREVIOUS) if (self.folder / name).exists()]
        for path in paths:
            try:
                return path, load_checkpoint(path)
            except UserError as error:
                say(f"warning: {error}")
        if paths:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: restore one, or use --overwrite to start anew"
            )
        return None, None


def load_checkpoint(path) -> dict:
    """Reads a checkpoint or weights file (ours, DeiT's, the original's, a bare state dict, safetensors) or a URL.

    Every byte is checked against the archive's checksums, which torch.load does not do. Nothing but tensors and plain
    types is unpickled; an argparse.Namespace, which DeiT's files hold, is let through.

    Raises:
        UserError: the file is missing, damaged, or asks for any other class.
    """
    if str(path).startswith(("https://", "http://")):
        with as_user_error(f"cannot load {path}: ", Exception):
            torch.serialization.add_safe_globals([argparse.Namespace])
            return torch.hub.load_state_dict_from_url(
                str(path),
                map_location="cpu",
                check_hash=bool(re.search(r"-[0-9a-f]{8,}\.", str(path))),
                weights_only=True,
            )
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with as_user_error(f"{path} is damaged: ", Exception):
            return load_file(path)
    _verify_archive(path)
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"(?:GLOBAL|global:?)\s+`?([\w.]+)", str(error))
        if found and "Unsupported" in str(error):
            raise UserError(
                f"{path} asks for the class {found[1]} and was refused: save tensors and plain types"
            ) from None
        raise UserError(f"{path} is damaged or no checkpoint: {str(error).splitlines()[0]}") from None


def _verify_archive(path):
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # files of torch < 1.6 are no archives and carry no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if damaged:
        raise UserError(f"{path} is damaged: bad checksum in {damaged}")


def extract_weights(checkpoint: dict, *, ema=False) -> dict:
    """The model's state dict inside a checkpoint, without the prefixes that wrappers put before its keys.

    Raises:
        UserError: there are no weights, or `ema` was asked and there is no moving average.
    """
    if ema:
        names = ("model_ema", "state_dict_ema")
        if not any(checkpoint.get(name) for name in names):
            raise UserError("the checkpoint holds no moving average: ask for its weights instead")
    else:
        names = ("model", "state_dict")
    weights = next((checkpoint[name] for name in names if isinstance(checkpoint.get(name), dict)), checkpoint)
    if not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise UserError("the file holds no weights: expected a state dict, or one under 'model'")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}


def write_status(folder, status, **facts):
    """Writes status.json (running, preempted, done, diverged, failed) for scripts that requeue jobs."""
    if rank() == 0 and folder:
        facts = {"status": status, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        write_atomically(Path(folder) / "status.json", lambda file: file.write(json.dumps(facts).encode()))
