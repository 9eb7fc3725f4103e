"""Runs of main.py in separate processes, in which the tests cause faults.

`fork` starts a run in a tenth of a second: a server process has imported everything, and each run is a fork of it that
executes main.py as `python main.py` would. `torchrun` starts the real launcher, which takes seconds.
"""

import json
import multiprocessing
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
HOME = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # of the outputs, for the time of the tests
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["main"])  # the slow part
# For the server and for torchrun. Hubs are offline and their caches empty; their libraries read this when imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
ENVIRONMENT |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HOME.name, "TORCH_HOME": HOME.name}


class Run:
    """A process that executes main.py. Its output is in `text`."""

    def __init__(self, output, process):
        self.output, self.process = Path(output), process

    @property
    def text(self):
        return self.output.read_text(errors="replace")

    @property
    def pid(self):
        return self.process.pid

    def send(self, number):
        os.kill(self.pid, number)

    def says(self, words, timeout=180):
        """Wait for words in the output; return the run."""

        def said():
            ended = self.code(0) is not None  # looked at first: what is said before the end is seen
            if words in self.text:
                return True
            assert not ended, f"ended without saying {words}: {self.text}"
            return False

        until(said, timeout, self)
        return self

    def code(self, timeout=90):
        """Return the exit code, negative for a signal; None if it still runs after `timeout` seconds."""
        self.process.join(timeout)
        return self.process.exitcode


class LauncherRun(Run):
    """A run under torch.distributed.run, whose process is a subprocess.Popen."""

    def code(self, timeout=90):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def workers(self):
        """Return the process ids by rank."""
        pids = [pid for pid in descendants(self.pid) if "main.py" in _proc(pid, "cmdline")]
        return {re.search(r"\bRANK=(\d+)", _proc(pid, "environ"))[1]: pid for pid in pids}


def until(condition, timeout=60, run=None):
    """Wait until condition() is true; return its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout} s in vain; the run printed: {run and run.text}")
        time.sleep(0.01)
    return value


def fork(*flags, ranks=1, before="", env=None):
    """Start main.py in `ranks` processes that connect as under a launcher.

    `before` holds Python statements to execute first, which prepare a fault; `env` further environment variables.
    Returns a Run, or a list of them for several ranks.
    """
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    runs = []
    for rank in range(ranks):
        handle, output = tempfile.mkstemp(dir=HOME.name)
        os.close(handle)
        variables = {**(launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}), **(env or {})}
        job = output, [*map(str, flags)], before, variables
        process = SERVER.Process(target=become, args=job, daemon=True)  # daemons end with the tests
        with mock.patch.dict(os.environ, ENVIRONMENT):  # the first start takes the server along
            process.start()
        runs.append(Run(output, process))
    return runs if ranks > 1 else runs[0]


def ranks_of(runs):
    return runs if isinstance(runs, list) else [runs]


def codes(runs, timeout=90):
    return [run.code(timeout) for run in ranks_of(runs)]


def finish(code, *flags, timeout=90, **options):
    """Run main.py, started by `fork`, until all ranks ended with this exit code; return what `fork` returns."""
    runs = fork(*flags, **options)
    assert set(codes(runs, timeout)) == {code}, [run.text for run in ranks_of(runs)]
    return runs


def torchrun(*flags, ranks=2, launcher=(), before="", env=None):
    """Start main.py under torch.distributed.run, whose own flags are `launcher`; `before` and `env` as in `fork`."""
    folder = Path(tempfile.mkdtemp(dir=HOME.name))
    workers_only = f"import os\nif 'RANK' in os.environ:\n    exec({before!r}, {{}})\n"
    (folder / "sitecustomize.py").write_text(workers_only)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *launcher]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [*command, str(ROOT / "main.py"), *map(str, flags)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(folder), **(env or {})},
        )
    return LauncherRun(folder / "output", process)


def status(folder):
    return json.loads((folder / "status.json").read_text())


def epochs(folder):
    """Return the epochs of log.txt, line by line."""
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def errors(runs):
    """Return the lines of all ranks that report an error."""
    lines = [line for run in ranks_of(runs) for line in run.text.splitlines()]
    return [line for line in lines if re.match(r"(\[rank \d+\] )?error: ", line)]


def on_student(body, *, training=True, anytime=True):
    """Return statements for `before`, which execute `body` before each forward of the student in this mode.

    `body` may use `module`, `args`, `rank`, and `step`, which counts these forwards from 0. With anytime=False those
    before the first training batch do not count.
    """
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    code = f"""
import os, signal, sys, time, torch
rank, step, trained = int(os.environ.get("RANK", 0)), -1, {anytime}
def hook(module, args):
    global step, trained
    if type(module).__name__ not in ("VisionTransformer", "Lift", "WideLast"):
        return
    trained |= module.training
    if not trained or module.training != {training}:
        return
    step += 1
{lines}
torch.nn.modules.module.register_module_forward_pre_hook(hook)
"""
    return f"exec({code!r}, {{}})\n"


def strike(number, *, step, training=True, rank=None):
    """Return statements for `before`: the process sends itself a signal in this forward of the student.

    Those of validation count after the first training batch. `rank` is the only rank that does it, or None for all.
    """
    when = f"step == {step} and rank in {(0, 1) if rank is None else (rank,)}"
    return on_student(f"if {when}:\n    os.kill(os.getpid(), {int(number)})", training=training, anytime=False)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _proc(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""


def descendants(pid):
    """Return all processes below a process."""
    parents = {int(path.name): stat(path.name)[1:2] for path in Path("/proc").glob("[0-9]*") if alive(path.name)}
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == [str(parent)]]
    return found[1:]


def stat(pid):
    """Return the state of a process, the process id of its parent, and more, as strings."""
    return _proc(pid, "stat").rpartition(")")[2].split()


def alive(pid):
    return stat(pid)[:1] not in ([], ["Z"])


def become(output, flags, before, env):
    """Execute main.py in this process."""
    multiprocessing.current_process()._config["daemon"] = False  # it may have loader workers
    os.setsid()
    for target, file, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_APPEND)):
        os.dup2(os.open(file, mode), target)
    os.dup2(1, 2)
    os.environ.update(env)
    sys.argv = [str(ROOT / "main.py"), *flags]
    try:
        exec(before, {})
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
