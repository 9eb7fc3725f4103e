"""Errors and exit codes, flags, distributed facts, signals, meters, the run's log, and checkpoints."""

import argparse
import ast
import contextlib
import ctypes
import datetime
import errno
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import pickletools
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


# Errors


class UserError(Exception):
    """Something the user can mend, said in one line. Exit code 2."""


class Diverged(Exception):
    """Training cannot go on. Exit code 3."""


class Stopped(BaseException):
    """A signal ended the run early. Exit code 128 + its number, as a shell says it."""

    def __init__(self, number, where=""):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number = number


@contextlib.contextmanager
def exit_codes(*user_errors):
    """Ends the program as its errors ask: one line on stderr by one process, status.json, and the exit code.

    0: done. 1: a fault of the program, which keeps its traceback, or of another process. 2: UserError. 3: Diverged.
    128 + n: stopped by signal n.

    Args:
        user_errors: further exceptions that count as UserError.
    """
    code = 0
    try:
        yield
    except (Stopped, KeyboardInterrupt) as stop:
        stop = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
        # A launcher stops the others where one process fails: that is no reason to requeue the job.
        failed = _ask_store(lambda store: store.add("faults", 0) > 0, False)
        code = _finish(128 + stop.number, "failed" if failed else "preempted", stop)
    except Diverged as error:
        code = _finish(3, "diverged", error)
    except (UserError, *user_errors) as error:
        code = _finish(2, "failed", error)
    except Exception as error:
        if _lost_worker(error):
            way_out = "give fewer --num_workers, more memory or a longer --loader-timeout"
            code = _finish(2, "failed", UserError(f"lost a loader worker: {_one_line(error)}: {way_out}"))
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            error = UserError(f"{_one_line(error)} Lower --batch-size, and raise --accum-steps as much")
            code = _finish(2, "failed", error)
        elif _lost_contact(error):
            code = _finish(1, "failed", _who_is_silent(error), alone=True)
        else:
            _ask_store(lambda store: store.add("faults", 1), 0)
            run_status.write("failed", reason=_one_line(error))
            raise
    finally:
        _end_loader_workers()
    if code:
        leave_distributed(code)
        raise SystemExit(code)


@contextlib.contextmanager
def first_process_says_it():
    """For mistakes that all processes meet before they meet each other.

    The launcher ends all as soon as one has ended, so the others wait for the first to say the error and end. If they
    are still there after that, it was theirs alone, and they say it.
    """
    try:
        yield
    except UserError as error:
        if rank() != 0:
            time.sleep(10)
            print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        raise


def _finish(code, status, error, alone=False):
    """`alone`: say it also where the store that the processes share does not answer."""
    line = _one_line(error)
    sys.unraisablehook = lambda _: None  # a loader that was stopped half-built complains when it is deleted

    def is_first(store):
        store.add("faults", int(code < 128))
        return store.add("errors", 1) == 1

    if _ask_store(is_first, alone or rank() == 0):
        print(f"{'error: ' if code < 128 else ''}{line}", file=sys.stderr, flush=True)
    run_status.write(status, reason=line)
    return code


def _one_line(error):
    text = str(error).strip() or type(error).__name__
    if text.startswith("Caught "):  # from a loader worker: a whole traceback, whose last line is "class: message"
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


_meeting = {}  # "store": the key-value store that the processes of this start share


def _ask_store(question, otherwise):
    """question(store); `otherwise` where there is none, or where the process that holds it does not answer."""
    answers = [otherwise]

    def ask():
        with contextlib.suppress(KeyError, RuntimeError):
            answers.append(question(_meeting["store"]))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=5)
    return answers[-1]


def _lost_worker(error):
    """Whether an error says that a loader worker ended, hung, or ended while it handed over a batch."""
    frames = traceback.extract_tb(error.__traceback__)
    in_loader = any(frame.filename == torch.utils.data.dataloader.__file__ for frame in frames)
    return str(error).startswith("DataLoader") or (in_loader and isinstance(error, (EOFError, ConnectionError)))


def _lost_contact(error):
    """Whether an error says that another process did not take part in a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _who_is_silent(error):
    """The error again, led by the processes that do not answer. Waits, so that the launcher sees them end first."""

    def silent_ranks(store):
        store.add(f"alive {rank()}", 1)
        time.sleep(2)
        return [r for r in range(world_size()) if store.add(f"alive {r}", 0) == 0]

    silent = _ask_store(silent_ranks, [0])  # without a launcher's store the first process holds it
    silent = f"rank {', '.join(map(str, silent))}" if silent else "the network"
    return UserError(f"rank {rank()} lost {silent}: {_one_line(error)}")


def _end_loader_workers():
    """Workers leave signals to the main process, so those that do not answer would keep it from ending."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


@contextlib.contextmanager
def as_user_error(prefix, *kinds):
    """Says an error of these kinds as a UserError, led by `prefix`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{_one_line(error)}") from error


@contextlib.contextmanager
def warn_of(kind, message):
    """Says an error of this kind as a warning and goes on."""
    try:
        yield
    except kind as error:
        say(f"warning: {message}: {error}")


def say(*words):
    """Prints on the first process only, at once; a full disk or a closed pipe costs the line and not the run."""
    if rank() == 0:
        with contextlib.suppress(OSError):
            print(*words, flush=True)


# Flags


class Parser(argparse.ArgumentParser):
    """Reads `@file` arguments, one flag a line, with # comments; an error is one line and exit code 2."""

    def __init__(self, description):
        style = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=style)

    def convert_arg_line_to_args(self, line):
        return re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()

    def error(self, message):
        raise UserError(message)


def number(kind, low, high=math.inf, *, ends=True):
    """An argparse type: an int or float inside [low, high], or inside (low, high) without `ends`; never nan."""
    brackets = "[]" if ends and math.isfinite(high) else "[)" if ends else "()"
    name = "a whole number" if kind is int else "a number"
    expected = f"{name} in {brackets[0]}{low:g}, {high:g}{brackets[1]}"

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
    if dist.is_initialized():
        return dist.get_rank()
    try:
        return launched_as()[0]
    except UserError:  # the environment contradicts itself, which one task is to say
        return int(os.environ.get("SLURM_PROCID", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched_as(expected=None):
    """(rank, number of processes) as the launcher's environment has them, (0, 1) where there is none.

    Args:
        expected: the number of processes that the user expects, or None.

    Raises:
        UserError: the variables contradict each other or `expected`, or SLURM started several tasks without them.
    """
    env = os.environ
    found = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    if not found and env.get("SLURM_NTASKS", "1") != "1" and "SLURM_PROCID" in env:
        raise UserError(
            f"SLURM has {env['SLURM_NTASKS']} tasks here, but RANK and WORLD_SIZE are not set: call "
            "`srun python -m torch.distributed.run` with one task a node, as recipes/one_node.slurm does, or unset "
            "SLURM_NTASKS for a single process"
        )
    if len(found) == 1:
        raise UserError(
            f"{found[0]} is set without its partner (RANK, WORLD_SIZE): start with python -m torch.distributed.run, "
            f"or unset {found[0]}"
        )
    number, size = env.get("RANK", "0"), env.get("WORLD_SIZE", "1")
    if not (number.isdecimal() and size.isdecimal() and int(number) < int(size)):
        raise UserError(f"RANK={number} and WORLD_SIZE={size} contradict each other: expected 0 <= RANK < WORLD_SIZE")
    if expected not in (None, int(size)):
        raise UserError(
            f"--world_size {expected} was expected, but there are {size} processes: start with "
            f"python -m torch.distributed.run --nproc_per_node={expected}, or leave --world_size out"
        )
    return int(number), int(size)


def init_distributed(device, dist_url="env://", timeout=1800.0, expected=None):
    """Joins the process group of the launcher where there is one, and returns this process's torch.device.

    Args:
        device: "cuda", "cuda:1", "cpu" ...; a plain "cuda" becomes the GPU of LOCAL_RANK.
        dist_url: rendezvous address for torch.distributed.
        timeout: seconds after which a collective that a process does not join ends the job.
        expected: number of processes that the user expects, or None.

    Raises:
        UserError: the launcher's variables contradict each other, or it has gone.
    """
    number, size = launched_as(expected)
    device = torch.device(device)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if device.index is not None and size > 1:
            raise UserError(f"--device {device} would put all {size} processes on one GPU: give --device cuda")
        if index >= torch.cuda.device_count():
            raise UserError(f"process {index} of this machine has no GPU: it has {torch.cuda.device_count()}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return device
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    if elastic and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it listens before it starts us
        with as_user_error("the launcher has gone: ", OSError):
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address, timeout=60).close()
    timeout = datetime.timedelta(seconds=timeout)
    with as_user_error("the processes cannot meet: ", ValueError):  # no MASTER_ADDR, for example
        store, number, size = next(dist.rendezvous(dist_url, number, size, timeout=timeout))
    store.set_timeout(timeout)
    _meeting["store"] = store = dist.PrefixStore(_agree_on_start(store, number, size), store) if elastic else store
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=timeout)
    return device


def _agree_on_start(store, number, size) -> str:
    """A name of this start that the processes agree on.

    When torchrun restarts them, its store still holds the addresses of those that have gone, which torch 2.14 reads as
    those of the new ones; and the count of restarts differs between nodes. So the first process invents a name and
    hands it to each other one under a name that this one has invented.
    """
    mine = uuid.uuid4().hex
    if number > 0:
        store.set(f"hello {number}", mine)
        name = store.get(f"welcome {mine}").decode()
        store.add(f"met {name}", 1)
        return name
    deadline = time.monotonic() + store.timeout.total_seconds()
    while store.add(f"met {mine}", 0) < size - 1:
        for other in range(1, size):
            if store.check([f"hello {other}"]):
                store.set(f"welcome {store.get(f'hello {other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise UserError(f"{size} processes should meet, and some did not start")
        time.sleep(0.02)
    return mine


def end_with_launcher(grace=4.0):
    """Under torchrun, ends this process within 5 seconds of the launcher's end, which by itself leaves workers behind.

    They are sent SIGTERM, so that a step boundary within `grace` seconds still saves.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    _at_parents_end(signal.SIGTERM)

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.5)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def begin_loader_worker(_):
    """For a DataLoader: its workers end with their process, and leave to it what to do about signals."""
    for number in STOP_SIGNALS:  # torchrun sends them to the whole process group
        signal.signal(number, signal.SIG_IGN)
    _at_parents_end(signal.SIGKILL)
    if os.getppid() != multiprocessing.parent_process().pid:  # it ended before the kernel knew
        os._exit(1)


def _at_parents_end(number):
    """Asks the kernel for a signal when the parent ends, however that happens (prctl's PR_SET_PDEATHSIG, Linux)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, int(number))


def leave_distributed(code=0):
    """Ends this process with an exit code where there is a process group, without Python's and torch's clearing up.

    With it a finished run of two processes on a CPU ended in an abort ("terminate called without an active exception")
    in 9 of 60 cases where the group was left to the interpreter, and hung in some where it was destroyed.
    """
    if dist.is_initialized():
        if code == 0:
            dist.barrier()
        _end_loader_workers()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


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
    with torch.inference_mode(False):  # whose tensors torch 2.4 cannot gather into
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def main_first():
    """Lets the first process run the body before the others: it downloads, they find the files.

    Raises:
        UserError: on all processes, where it was raised on the first.
    """
    if rank() != 0:
        error = gather_objects(None)[0]
        if error is not None:
            raise UserError(error)
        yield
        return
    try:
        yield
    except UserError as error:
        gather_objects(str(error))
        raise
    gather_objects(None)


class StopRequest:
    """Notes the signals that ask the run to stop; the processes agree on it between steps.

    Before `between_steps` is called there is nothing to save, and a signal raises Stopped at once. From then on the
    handler only notes the signal's number. Calling the object is a collective: its number, or 0, on all processes.
    """

    def __init__(self):
        self.noted, self.number, self.stepping, self.group = 0, 0, False, None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.noted = number
        if not self.stepping:
            raise Stopped(number)

    def between_steps(self, timeout=1800.0):
        """Begins to look at signals between steps only; all processes call it. `timeout` as in init_distributed."""
        if dist.is_initialized():
            # NCCL has no host tensors, and a collective on the device would wait for the step.
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
        self.stepping = True

    def __call__(self) -> int:
        number = torch.tensor([self.noted])
        if self.group is not None:
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self.group)
        self.number = int(number)  # apart from `noted`: a signal that came meanwhile is for the next call
        return self.number


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

    def state_dict(self) -> list[dict]:
        """The sums of each process; all must call it."""
        return gather_objects({"sums": dict(self.sums), "count": self.count})

    def load_state_dict(self, states):
        """Takes this process's sums, or all on the first process where their number has changed."""
        if len(states) == world_size():
            states = [states[rank()]]
        elif rank() != 0:
            states = []
        self.count = sum(state["count"] for state in states)
        self.sums = {name: sum(state["sums"][name] for state in states) for name in self.sums}


class RunLog:
    """log.txt (one JSON object a line, an epoch a line), args.json and TensorBoard scalars; the first process writes.

    A full disk costs a warning; what it kept out follows with the next epoch.

    Args:
        folder: output folder; empty or None to write nothing.
        arguments: the run's flags, by name, for args.json.
        start_epoch: lines of this epoch and later are dropped: a resumed run writes them anew.
    """

    def __init__(self, folder, arguments, start_epoch=0):
        self.folder = Path(folder) if folder and rank() == 0 else None
        self.start_epoch, self.writer, self.pending = start_epoch, None, []
        if self.folder is None:
            return
        with as_user_error("TensorBoard cannot be imported: ", Exception):  # slow, and needed by one process only
            from torch.utils.tensorboard import SummaryWriter
        self.new_writer = SummaryWriter
        self.path = self.folder / "log.txt"
        arguments = json.dumps(arguments, indent=1).encode()
        with warn_of(OSError, "args.json not written"):
            write_atomically(self.folder / "args.json", lambda file: file.write(arguments))
        with as_user_error(f"{self.path} cannot be written: ", OSError):
            if self.path.exists():
                lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = "".join(line + "\n" for line in lines if _epoch_of(line) < start_epoch).encode()
                again = sum(start_epoch <= _epoch_of(line) < math.inf for line in lines)
                if again:
                    say(f"{again} epochs of log.txt come again; log_previous.txt keeps their lines")
                    keep_copy(self.path, self.folder / "log_previous.txt")
                write_atomically(self.path, lambda file: file.write(kept))

    def epoch(self, stats: dict):
        """Appends a line to log.txt, and each number and list of numbers in it to TensorBoard over epochs."""
        if self.folder is None:
            return
        self.pending.append(stats)
        with warn_of(OSError, "log.txt not written; its line follows with the next"):
            self._append("".join(json.dumps(line) + "\n" for line in self.pending).encode())
            try:
                for line in self.pending:
                    self._scalars(line)
            except OSError as error:
                say(f"warning: TensorBoard's events not written: {error}")
                self.writer = None  # its thread has ended; the next epoch begins a new file
            self.pending = []

    def _append(self, lines):
        with open(self.path, "ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise

    def _scalars(self, stats):
        if self.writer is None:
            self.writer = self.new_writer(str(self.folder), purge_step=self.start_epoch or None)
            self.start_epoch = 0  # only what an earlier run wrote is to be purged
        for name, value in stats.items():
            if isinstance(value, list):  # a curve over blocks
                for i, level in enumerate(value):
                    self.writer.add_scalar(f"{name.replace('_', '/', 1)}/{i:02d}", level, stats["epoch"])
            elif isinstance(value, (int, float)) and name != "epoch":
                self.writer.add_scalar(name.replace("_", "/", 1), value, stats["epoch"])
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            with warn_of(OSError, "TensorBoard's events not written"):
                self.writer.close()


def _epoch_of(line):
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill: dropped
    return epoch if isinstance(epoch, int) else math.inf


# Files

_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomically(path, write, previous=None):
    """Writes a file so that a kill at any moment leaves either the old one or the new one, whole and on disk.

    Args:
        path: the file.
        write: called with a binary file object.
        previous: second name under which the file's present content goes on, or None.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o666 & ~_UMASK)  # mkstemp's own mode shuts out colleagues
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            keep_copy(path, previous)
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
    temporary = copy.with_name(f".{copy.name}.link.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        with open(path, "rb") as source:
            write_atomically(copy, lambda file: shutil.copyfileobj(source, file))
    else:
        os.replace(temporary, copy)
        temporary.unlink(missing_ok=True)  # renaming one name of a file to another of its names does nothing


class FolderLock:
    """Holds an output folder for one run. The lock goes with the process, however it ends.

    It is a POSIX record lock: network file systems know it, and children do not inherit it, so that a loader worker
    that outlives its process for a moment does not keep the next run out.

    Args:
        folder: the output folder.
        wait: seconds to wait for a run that is ending.

    Raises:
        UserError: another run holds it.
    """

    def __init__(self, folder, wait=5.0):
        self.file = open(Path(folder) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 open as long as the run
        deadline = time.monotonic() + wait
        while not self._take(folder):
            if time.monotonic() > deadline:
                self.file.seek(0)
                holder = self.file.read().strip() or "another run"
                raise UserError(
                    f"--output_dir {folder} is in use by {holder}: wait for it to end, or give another folder"
                )
            time.sleep(0.2)
        with contextlib.suppress(OSError):  # a full disk
            self.file.truncate(0)
            self.file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            self.file.flush()

    def _take(self, folder):
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            say(f"warning: the file system of {folder} has no locks ({error}): take care that no other run uses it")
        return True


def open_output_folder(path):
    """Makes the output folder and locks it for this run; returns its CheckpointFolder, or None without a path."""
    if not path:
        return None
    folder = CheckpointFolder(path)
    if rank() == 0:
        with as_user_error(f"--output_dir {path} cannot be written: ", OSError):
            folder.folder.mkdir(parents=True, exist_ok=True)
            folder.lock = FolderLock(path)
            for leftover in folder.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                leftover.unlink()
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
        self.latest_damaged = False

    def files(self) -> list[Path]:
        """The checkpoints in the folder: the latest, the one before it, then the others, newest first."""
        first = [self.folder / name for name in (self.LATEST, self.PREVIOUS)]
        others = [self.folder / self.BEST, *self.folder.glob("checkpoint_????.pth")]
        others = sorted((path for path in others if path.exists()), key=lambda path: path.stat().st_mtime, reverse=True)
        return [path for path in first if path.exists()] + others

    def begun_by_launcher(self) -> bool:
        """Whether this is a restart by the torchrun that began the run in the folder, and that has saved since."""
        saved = rank() == 0 and _found_by_launcher(self.folder) not in (None, _time_of_checkpoint(self.folder))
        return gather_objects(saved)[0]

    def clear(self):
        """Deletes the checkpoints and TensorBoard's events of an earlier run, whose lines RunLog drops."""
        if rank() == 0:
            # The latest goes last: a restart would take its absence for a sign that this run has saved.
            with as_user_error(f"--output_dir {self.folder} cannot be cleared: ", OSError):
                for path in (*self.folder.glob("events.out.tfevents.*"), *reversed(self.files())):
                    path.unlink()

    def save(self, state: dict, *, best=False, milestone=None) -> bool:
        """Writes the state as the latest checkpoint; returns whether that went well, the same on all processes.

        Raises:
            Diverged: on all processes, when a tensor of the state is not finite; nothing is written then.
            UserError: on all processes, when writing failed for the third time in a row.
        """
        bad = None
        if rank() == 0:
            bad = name_not_finite(state)
            self.failures += 1
            if bad is None:
                with warn_of(OSError, "checkpoint not written; the previous one is kept"):
                    self._write(state, best, milestone)
                    self.failures = 0
        bad, self.failures = gather_objects((bad, self.failures))[0]
        if bad is not None:
            raise Diverged(f"{bad} is not finite: not saved, the checkpoint before is kept")
        if self.failures >= self.MAX_FAILURES:
            raise UserError(
                f"{self.MAX_FAILURES} checkpoints in a row could not be written to {self.folder}: free space"
            )
        return self.failures == 0

    def _write(self, state, best, milestone):
        latest = self.folder / self.LATEST
        previous = None if self.latest_damaged else self.folder / self.PREVIOUS
        write_atomically(latest, lambda file: _save(state, file), previous)
        self.latest_damaged = False
        if best:
            keep_copy(latest, self.folder / self.BEST)
        if milestone is not None:
            keep_copy(latest, self.folder / f"checkpoint_{milestone:04d}.pth")
        _sync_folder(self.folder)

    def load_newest(self):
        """(path, checkpoint) of the newest file that is whole, or (None, None) where there is none at all.

        The first process chooses, so that all go on from the same one.

        Raises:
            UserError: there are files, and all are damaged.
        """
        path, checkpoint, error = None, None, None
        if rank() == 0:
            try:
                path, checkpoint = self._newest()
            except UserError as damaged:
                error = str(damaged)
        path, error = gather_objects((path, error))[0]
        if error is not None:
            raise UserError(error)
        if path is not None and rank() != 0:
            checkpoint = load_checkpoint(path)
        return path, checkpoint

    def _newest(self):
        paths = self.files()
        for path in paths:
            try:
                return path, load_checkpoint(path)
            except UserError as error:
                say(f"warning: {error}; trying the one before")
                self.latest_damaged |= path.name == self.LATEST
        if paths:
            raise UserError(
                f"every checkpoint in {self.folder} is damaged: restore one, or use --overwrite to start anew"
            )
        return None, None


def _save(state, file):
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what torch makes of an OSError while it closes the archive
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def name_not_finite(state, name="checkpoint"):
    """The name of a tensor in nested dicts and lists that holds a number that is not finite, or None."""
    if torch.is_tensor(state):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((found for key, value in items if (found := name_not_finite(value, f"{name} {key}"))), None)


def _launcher():
    """A name of the torchrun process that started this one, or None; with its start, as containers reuse numbers."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    with contextlib.suppress(OSError):
        start = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]  # clock ticks since boot
        return f"{socket.gethostname()} {os.getppid()} {start}"
    return None


def _time_of_checkpoint(folder):
    """When the latest checkpoint was written, in nanoseconds; 0 where there is none."""
    path = folder / CheckpointFolder.LATEST
    return path.stat().st_mtime_ns if path.exists() else 0


def _found_by_launcher(folder):
    """`_time_of_checkpoint` as it was when the torchrun of this process first began here; None where it did not."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        status = json.loads((folder / "status.json").read_text())
        if status["launcher"] is not None and status["launcher"] == _launcher():
            return status["found"]
    return None


class RunStatus:
    """status.json, for scripts that requeue jobs: running, preempted, done, diverged or failed, and details.

    Only the first process writes, and only once `begin` was called: a start that was refused leaves the file of the
    run that it ran into. A process killed outright leaves "running".
    """

    folder = None

    def begin(self, folder):
        self.folder = Path(folder) if folder and rank() == 0 else None
        if self.folder is not None:
            found = _found_by_launcher(self.folder)
            self.found = _time_of_checkpoint(self.folder) if found is None else found
        self.write("running")

    def write(self, status, **facts):
        if self.folder is None:
            return
        facts = {"status": status, **facts, "pid": os.getpid(), "host": socket.gethostname(), "launcher": _launcher()}
        facts |= {"found": self.found, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with warn_of(OSError, "status.json not written"):
            write_atomically(self.folder / "status.json", lambda file: file.write(json.dumps(facts).encode()))


run_status = RunStatus()


def load_checkpoint(path) -> dict:
    """Reads a checkpoint or weights file (ours, DeiT's, the original's, a bare state dict, safetensors) or a URL.

    Every byte is checked against the archive's checksums, which torch.load does not do. Nothing but tensors and plain
    types is unpickled; an argparse.Namespace, which DeiT's files hold, is let through. A URL whose name carries a hash
    (name-0123abcd.pth) is checked against it. All processes must call this for a URL.

    Raises:
        UserError: the file is missing, damaged, or asks for any other class.
    """
    if str(path).startswith(("https://", "http://")):
        path = _download(str(path))
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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = found[1] if found else _first_global(path)
        if found:
            raise UserError(f"{path} asks for {found} and was refused: save tensors and plain types") from None
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no checkpoint: {message}") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint: expected a dict")
    return checkpoint


def _download(url):
    """The path of the file of a URL in torch.hub's cache."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    with main_first(), as_user_error(f"cannot download {url}: ", Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), progress=False)
        wanted = re.search(r"-([0-9a-f]{8,})\.", path.name)
        if wanted:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if not found.startswith(wanted[1]):
                raise ValueError(f"{path} has the hash {found[:8]}, not {wanted[1]}: delete it")
    return path


def _first_global(path):
    """The first class or function that a plain pickle asks for, or None; read without running it."""
    strings = []
    with open(path, "rb") as file, contextlib.suppress(Exception):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return argument.replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _verify_archive(path):
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # files of torch < 1.6 are no archives and carry no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            # A record with the bit of a folder has no content for torch, which then gives whatever is in memory.
            folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
            damaged = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # any byte may be damaged, so any may come
        raise UserError(f"{path} is damaged: {error}") from None
    if damaged:
        raise UserError(f"{path} is damaged: bad checksum in {damaged}")


def stored_args(checkpoint: dict) -> dict:
    """The flags of the run that wrote a checkpoint, by name; none where it does not say."""
    args = checkpoint.get("args") or {}
    return args if isinstance(args, dict) else vars(args)


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
