"""Exit codes, signals, and the launcher."""

import contextlib
import ctypes
import datetime
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

from utils import Diverged, Stopped, UserError, as_user_error, error_line, one_line, rank, run_status

# Sent by torchrun, SLURM and other batch systems, and by a terminal that closes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_SIGNALS += (signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
GRACE = 20.0  # seconds to wait for a step boundary after a signal; then the run ends without saving
PATIENCE = 10.0  # seconds for the main thread to notice a lost process by itself

# Exit codes


@contextlib.contextmanager
def exit_codes(*user_errors: type[Exception]) -> Iterator[None]:
    """End the process with one line on stderr, status.json and an exit code. `user_errors` count as UserError.

    0: done. 1: a bug, which keeps its traceback, or another process failed. 2: a UserError. 3: Diverged.
    128 + n: stopped by signal n.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a parent may have closed them
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # for odd file names
    try:
        try:
            yield
        except BaseException:
            ignore_signals()  # torchrun sends one when the first rank ends, perhaps before this one has reported
            raise
    except (Stopped, KeyboardInterrupt) as stop:
        stop = stop if isinstance(stop, Stopped) else Stopped(signal.SIGINT)
        finish(128 + stop.number, "preempted", stop)
    except Diverged as error:
        finish(3, "diverged", error)
    except (UserError, *user_errors) as error:
        finish(2, "failed", error)
    except torch.cuda.OutOfMemoryError as error:
        finish(2, "failed", UserError(f"{one_line(error)} Lower --batch-size"))
    except Exception as error:
        if lost_worker(error):
            advice = "use fewer --num_workers, more memory, or a longer --loader-timeout"
            finish(2, "failed", UserError(f"lost a data loading worker: {one_line(error)}: {advice}"))
        if lost_contact(error):
            if "TORCHELASTIC_RUN_ID" in os.environ:
                time.sleep(2)  # torchrun names the process that it sees end first, which should be the lost one
            end_after_loss(error)
        run_status.write("failed", rank=rank(), reason=one_line(error))
        end_loader_workers()
        raise
    end_loader_workers()


def finish(code: int, status: str, error: BaseException) -> None:
    """Print the error, write the status and end the process."""
    sys.unraisablehook = lambda _: None  # a half-built loader complains when deleted
    if rank() == 0 or code < 128:
        with contextlib.suppress(OSError):
            print(error_line(error) if code < 128 else error, file=sys.stderr, flush=True)
    run_status.write(status, reason=one_line(error))
    end_loader_workers()
    leave_distributed(code)
    raise SystemExit(code)


def lost_worker(error: Exception) -> bool:
    """Return whether an error means that a loader worker died, hung, or failed to hand over a batch."""
    frames = traceback.extract_tb(error.__traceback__)
    in_loader = any(frame.filename == torch.utils.data.dataloader.__file__ for frame in frames)
    return str(error).startswith("DataLoader") or (in_loader and isinstance(error, (EOFError, ConnectionError)))


def lost_contact(error: Exception) -> bool:
    """Return whether an error means that another process did not take part in a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def end_after_loss(error: Exception) -> None:
    """End the process because another one did not take part in a collective."""
    finish(1, "failed", UserError(f"lost another process: {one_line(error)}"))


def end_loader_workers() -> None:
    """Kill the loader workers, which ignore signals and would keep this process alive."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave_distributed(code: int = 0) -> None:
    """End a process that has a process group, without the clean-up of Python and torch.

    With the clean-up, 9 of 60 finished runs of two CPU processes aborted ("terminate called without an active
    exception"); if the group was destroyed first, some hung.
    """
    if dist.is_initialized():
        if code == 0:
            dist.all_reduce(torch.zeros(()))  # on gloo; with a bound GPU, dist.barrier would use NCCL
        end_process(code)


def end_process(code: int) -> None:
    """End the process and its loader workers at once, from any thread."""
    end_loader_workers()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
    os._exit(code)


# Signals


class StopRequest:
    """Collect signals that ask the run to stop, so that all ranks stop at the same step.

    Before `between_steps`, there is nothing to save and a signal raises Stopped at once. After it, a call at a step
    boundary returns the number of the signal, or 0, on all ranks. With several processes this is the answer to the
    previous call: ranks exchange it while they compute, so no step waits for it.

    An exchange that fails ends the process, even if the main thread cannot notice: when another rank is lost, NCCL's
    kernel never ends, and the main thread waits for the GPU until NCCL's watchdog aborts the process.

    A process that reaches no boundary within `GRACE`, because it waits for an image or another rank, is ended.
    """

    def __init__(self):
        self.noted, self.number, self.stepping = 0, 0, False
        self.group, self.pending, self.exchanges = None, None, queue.SimpleQueue()
        self.answered = threading.Event()
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()

    def _note(self, number, frame):
        self.noted = number
        if not self.stepping:
            self.answered.set()
            raise Stopped(number)

    def _watch(self, reader: int) -> None:
        """Wait for a signal in a thread, because Python's handlers do not run while the main thread is inside torch."""
        number = os.read(reader, 1)[0]
        if not self.answered.wait(GRACE - (rank() == 0)):  # rank 0 ends first, because it writes the status
            late = f": no step ended within {GRACE:g} s, so nothing was saved after the last checkpoint"
            with contextlib.suppress(SystemExit):
                finish(128 + number, "preempted", Stopped(number, late))
            end_process(128 + number)

    def between_steps(self, timeout: float = 1800.0) -> None:
        """From now on, act on signals at step boundaries only; a collective. `timeout` is as in init_distributed."""
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))
            threading.Thread(target=self._watch_exchanges, daemon=True).start()
        self.stepping = True

    def _watch_exchanges(self) -> None:
        """Wait for each exchange in a thread of our own. A callback would run Python code in gloo's threads.

        At the moment of a fork, one of them may hold a lock for which the child then waits forever (CPython 3.11; with
        callbacks, 2 of 3,000 forks hung).
        """
        while True:
            try:
                self.exchanges.get().wait()
            except RuntimeError as error:
                time.sleep(PATIENCE)
                end_after_loss(error)

    def __call__(self) -> int:
        if self.group is None:
            self.number = self.noted
        else:
            if self.pending is not None:
                work, answer = self.pending
                work.wait()
                self.number = int(answer)
            answer = torch.tensor([self.noted])
            work = dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
            self.exchanges.put(work)
            self.pending = work, answer
        if self.number:
            self.answered.set()
        return self.number


def ignore_signals() -> None:
    """Ignore all stop signals from now on."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def begin_loader_worker(_: int) -> None:
    """Initialize a DataLoader worker: it ends with its parent and ignores signals."""
    ignore_signals()  # sent to the whole process group
    _signal_when_parent_ends(signal.SIGKILL)
    if (parent := multiprocessing.parent_process()) and os.getppid() != parent.pid:  # it ended before the call above
        os._exit(1)


def _signal_when_parent_ends(number: int) -> None:
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG, Linux


# The launcher


def end_with_launcher(launcher: int, grace: float = 4.0) -> None:
    """Under torchrun, end within 5 seconds of the launcher, after a SIGTERM that lets the run save its state.

    `launcher` is the parent's process id when this process started: the parent may have ended during slow imports.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _signal_when_parent_ends(signal.SIGTERM)
    if os.getppid() != launcher:
        os._exit(1)

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.5)
        time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def launched_as() -> tuple[int, int]:
    """Return (rank, number of processes) from the launcher's variables, (0, 1) without one; check them."""
    env = os.environ
    launched = "RANK" in env or "WORLD_SIZE" in env
    if not launched and "SLURM_PROCID" in env and env.get("SLURM_NTASKS", "1") != "1":
        raise UserError(
            f"SLURM started {env['SLURM_NTASKS']} tasks, but RANK and WORLD_SIZE are not set: run `srun python -m "
            "torch.distributed.run` with one task per node, as in recipes/one_node.slurm, or unset SLURM_NTASKS"
        )
    number, size = (env.get("RANK", "unset"), env.get("WORLD_SIZE", "unset")) if launched else ("0", "1")
    if not (number.isdecimal() and size.isdecimal() and int(number) < int(size)):
        raise UserError(f"RANK is {number} and WORLD_SIZE is {size}: expected 0 <= RANK < WORLD_SIZE; use a launcher")
    return int(number), int(size)


def init_distributed(device: str = "auto", dist_url: str = "env://", timeout: float = 1800.0) -> torch.device:
    """Join the launcher's process group, if there is one, and return this process's device.

    `device` is auto, cuda (the GPU of LOCAL_RANK), cuda:N or cpu. A collective that a process does not join ends the
    job after `timeout` seconds.
    """
    number, size = launched_as()
    chosen = _choose_device(device, size)
    if "RANK" not in os.environ:
        return chosen
    env = os.environ
    if env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # After a restart, that store still has the addresses of the old processes (pytorch issue 135712).
        raise UserError("--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the launcher's environment")
    limit = datetime.timedelta(seconds=timeout)
    options: dict = {"backend": "gloo", "timeout": limit}
    if chosen.type == "cuda":
        # NCCL's watchdog aborts the process, so gloo must time out first: it raises an error that we can report.
        later = limit + datetime.timedelta(seconds=120)
        options = {"backend": "cpu:gloo,cuda:nccl", "timeout": later, "device_id": chosen}
    with as_user_error("the processes cannot connect: ", ValueError, dist.DistNetworkError):
        dist.init_process_group(init_method=dist_url, rank=number, world_size=size, **options)
    if chosen.type == "cuda":
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        backend._set_default_timeout(limit)
    return chosen


def _choose_device(name: str, size: int) -> torch.device:
    """Return the device of this name and make it current."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with as_user_error(f"--device {name}: expected cuda, cuda:N or cpu: ", RuntimeError):
        device = torch.device(name)
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"--device {name}: expected cuda, cuda:N or cpu")
    if device.index is not None and size > 1:
        raise UserError(f"--device {name} would put all {size} processes on one GPU: give --device cuda")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= (found := torch.cuda.device_count()):
        raise UserError(f"--device {name}: this machine has {found} GPUs, so there is no GPU {index}: try --device cpu")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
