"""Faults of every kind, caused in real processes."""

import json
import os
import random
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
import torch
from conftest import jpeg_folder, tiny_run
from PIL import Image
from processes import (
    alive,
    codes,
    descendants,
    epochs,
    errors,
    finish,
    fork,
    on_student,
    ranks_of,
    status,
    strike,
    torchrun,
    until,
)

import checkpoint
import datasets
import faults

pytestmark = pytest.mark.slow

STOPPED = 128 + signal.SIGTERM
FOUR_STEPS = tiny_run("--batch-size", 8, "--unscale-lr", "--lr", "1e-3")  # per epoch, on two processes


def flags_of(folder, *more):
    return tiny_run("--epochs", 2, "--batch-size", 8, "--output_dir", folder, "--resume", "auto", *more)


def saved(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


def assert_same_state(one, other):
    for part in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def assert_all_end(processes, seconds=5):
    until(lambda: not any(map(alive, processes)), seconds)


# Divergence

OUTPUT = "sys.argv[sys.argv.index('--output_dir') + 1]"
LEAVE_WEIGHTS = on_student(f"torch.save(module.state_dict(), {OUTPUT} + f'/rank{{rank}}')", training=False)


def poison(*, steps, rank):
    """Return statements for `before`: on one rank, the student's images are NaN in these training steps."""
    return on_student(f"if rank == {rank} and step in {steps}:\n    return (args[0] * torch.nan,)")


def test_one_bad_loss_makes_all_ranks_skip_the_step(tmp_path):
    before = poison(steps=(2, 3, 5), rank=1) + LEAVE_WEIGHTS
    runs = finish(0, *FOUR_STEPS, "--epochs", 3, "--output_dir", tmp_path, ranks=2, before=before)
    ranks = [saved(tmp_path, f"rank{r}") for r in (0, 1)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    state = saved(tmp_path)
    assert checkpoint.first_not_finite(state) is None
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {12 - 3}
    warning = "warning: term loss_base of rank 1 is not finite in epoch 0, step 3; all ranks skipped the step"
    assert warning in runs[0].text
    assert all(line["train_loss"] > 0 for line in map(json.loads, (tmp_path / "log.txt").read_text().splitlines()))


def test_third_bad_loss_in_a_row_stops_all_ranks(tmp_path):
    """They are counted across epochs: the last step of epoch 0 and the first two of epoch 1."""
    before = poison(steps=(3, 4, 5), rank=1)
    runs = finish(3, *FOUR_STEPS, "--epochs", 3, "--output_dir", tmp_path, ranks=2, before=before)
    message = "error: term loss_base of rank 1 was not finite in 3 steps in a row, up to epoch 1, step 1"
    assert errors(runs) == [message, f"[rank 1] {message}"]
    assert saved(tmp_path)["epoch"] == 0
    assert checkpoint.first_not_finite(saved(tmp_path)) is None
    assert status(tmp_path)["status"] == "diverged"
    assert "term loss_base of rank 1" in status(tmp_path)["reason"]


def test_bad_weights_are_never_saved(tmp_path):
    """They break in the last backward pass of epoch 1, so no loss shows it."""
    break_weights = on_student("""
if step == 7:
    bias = module.head.bias
    bias.register_post_accumulate_grad_hook(lambda bias: [bias.data.fill_(torch.inf)].clear())
""")
    runs = finish(3, *FOUR_STEPS, "--epochs", 2, "--output_dir", tmp_path, ranks=2, before=break_weights)
    message = "error: checkpoint model head.bias is not finite: not saved, the previous checkpoint is kept"
    assert errors(runs)[0] == message
    assert saved(tmp_path)["epoch"] == 0
    assert checkpoint.first_not_finite(saved(tmp_path)) is None


def test_buffers_infinite_by_design_are_saved_and_averaged(tmp_path):
    """Some of timm's families have such masks."""
    mask = """
import timm, torch
build = timm.create_model
def create(*args, **kwargs):
    model = build(*args, **kwargs)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    return model
timm.create_model = create
"""
    flags = flags_of(tmp_path, "--eval-ema", "--model-ema-decay", 0.9)
    finish(STOPPED, *flags, before=mask + strike(signal.SIGTERM, step=9))
    finish(0, *flags, before=mask)
    for part in ("model", "model_ema"):
        assert saved(tmp_path)[part]["mask"].tolist() == [0.0, -torch.inf]
    averaged, trained = (saved(tmp_path)[part]["head.bias"] for part in ("model_ema", "model"))
    assert not torch.equal(averaged, trained)


# Signals


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", faults.STOP_SIGNALS, ids=lambda number: number.name)
def test_signal_to_one_rank_stops_all_at_the_same_step(number, ranks, tmp_path):
    """Of 8 steps for one process and 4 for two, which stop one step later."""
    before = strike(number, step=8 // ranks + 1, rank=ranks - 1)
    runs = finish(128 + number, *flags_of(tmp_path), ranks=ranks, before=before)
    lines = [line for run in ranks_of(runs) for line in run.text.splitlines() if "stopped" in line]
    assert lines == [f"stopped by {number.name} in epoch 1 after step {ranks + 1}: --resume auto continues here"]
    assert (saved(tmp_path)["epoch"], saved(tmp_path)["step"]) == (0, ranks + 1)
    assert status(tmp_path)["status"] == "preempted"


def test_signal_in_evaluation_stops_it_and_keeps_the_epoch(tmp_path):
    """Shards of 25 and 24 images have 3 and 2 batches of 12; the rank with the shorter one gets the signal."""
    flags = flags_of(tmp_path, "--gratings-sizes", 64, 49)
    runs = finish(STOPPED, *flags, ranks=2, before=strike(signal.SIGTERM, step=0, training=False, rank=1))
    assert "in epoch 0 after step 4" in runs[0].text
    assert not (tmp_path / "log.txt").exists()
    finish(0, *flags, ranks=2)
    assert epochs(tmp_path) == [0, 1]


def test_signal_during_start_up_stops_at_once(tmp_path):
    build = "import os, timm; build = timm.create_model\n"
    build += "timm.create_model = lambda *a, **k: (os.kill(os.getpid(), 15), build(*a, **k))[1]"
    run = finish(STOPPED, *flags_of(tmp_path), before=build)
    assert run.text.splitlines()[-1] == "stopped by SIGTERM"
    assert status(tmp_path)["status"] == "preempted"


def test_signal_while_a_rank_waits_for_another_to_start(tmp_path):
    """Rank 0 waits in DDP for rank 1, which is the first to end: an error and the signal reach rank 0 together."""
    wait = """
import os, time, torch
parallel = torch.nn.parallel.DistributedDataParallel
begin = parallel.__init__
def init(*args, **kwargs):
    print("waits", flush=True)
    time.sleep(60 * int(os.environ["RANK"]))
    begin(*args, **kwargs)
parallel.__init__ = init
"""
    runs = fork(*flags_of(tmp_path), ranks=2, before=wait)
    for run in runs:
        run.says("waits")
    time.sleep(1)
    for run in runs:
        run.send(signal.SIGTERM)
    assert codes(runs) == [STOPPED, STOPPED]
    assert "Traceback" not in runs[0].text
    assert status(tmp_path)["status"] == "preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["torchrun's", "Ctrl-C"])
def test_signal_to_the_group_leaves_workers_to_their_process(number, tmp_path):
    """A worker that acted on the signal would end the run with an error."""
    run = fork(*flags_of(tmp_path, "--epochs", 50, "--num_workers", 2)).says("Epoch: [1]")
    workers = descendants(run.pid)
    assert len(workers) == 4  # those of training and those of evaluation
    os.killpg(run.pid, number)
    assert run.code() == 128 + number
    assert "--resume auto continues here" in run.text
    assert_all_end(workers)


def test_loader_workers_end_with_their_killed_process(tmp_path):
    run = fork(*flags_of(tmp_path, "--epochs", 50, "--num_workers", 2)).says("Epoch: [1]")
    workers = descendants(run.pid)
    run.send(signal.SIGKILL)
    assert run.code() == -signal.SIGKILL
    assert_all_end(workers, 2)


def test_start_stopped_by_another_failure_is_not_preempted(tmp_path):
    """Otherwise a script would requeue the job again and again."""
    fail = "if rank == 1:\n    raise LookupError('the sky fell')\n"
    wait_or_fail = on_student(f"{fail}print('waits', flush=True)\ntime.sleep(60)", training=False)
    first, second = fork(*flags_of(tmp_path), ranks=2, before=wait_or_fail)
    assert second.code() == 1
    first.says("waits").send(signal.SIGTERM)
    assert first.code() == STOPPED
    assert (status(tmp_path)["status"], status(tmp_path)["reason"]) == ("failed", "the sky fell")


@pytest.mark.parametrize(("workers", "hung"), [(0, 1), (1, 0)])
def test_signal_during_a_hung_batch_ends_the_run(workers, hung, images, tmp_path):
    """An image of one rank is a named pipe that nobody writes to; the other rank waits for its gradients."""
    root = with_a_pipe(images, tmp_path)
    fast = "import faults; faults.GRACE = 3.0\n" + on_student("print('waits', flush=True)", anytime=False)
    seeds = ("--seed", [0, 8][hung])  # the image is in the first batch of this rank
    runs = fork(*imagenet_flags(root, tmp_path / "out", "--num_workers", workers, *seeds), ranks=2, before=fast)
    runs[1 - hung].says("waits")
    time.sleep(1)
    began = time.monotonic()
    for run in runs:
        run.send(signal.SIGTERM)
    assert set(codes(runs, 10)) <= {STOPPED, 1}
    assert time.monotonic() - began < 6
    assert runs[0].text.splitlines()[-1].startswith("stopped by SIGTERM: no step ended within 3 s")
    assert status(tmp_path / "out")["status"] == "preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU], ids=lambda number: number.name)
def test_signal_to_torchrun_is_saved_by_its_processes(number, tmp_path):
    """torchrun passes on some signals; others end it, which its processes notice."""
    flags = flags_of(tmp_path, "--epochs", 500, "--num_workers", 1)
    run = torchrun(*flags).says("Epoch: [1]")
    processes = descendants(run.pid)
    assert len(processes) == 2 + 4
    began = time.monotonic()
    run.send(number)
    assert run.code(25) not in (0, None)
    assert_all_end(processes)
    assert time.monotonic() - began < 25
    assert '"status": "preempted"' in (tmp_path / "status.json").read_text()  # what recipes/*.slurm look for
    done = saved(tmp_path)["epoch"] + 1
    assert done > 0
    if number == signal.SIGTERM:
        finish(0, *flags, "--epochs", done + 1, ranks=2)
        assert status(tmp_path)["status"] == "done"


def test_processes_end_within_five_seconds_of_the_launcher(tmp_path):
    """Rank 1 is stopped and cannot answer, so rank 0 waits until its timeout."""
    run = torchrun(*flags_of(tmp_path, "--epochs", 500, "--num_workers", 1)).says("Epoch: [1]")
    processes = descendants(run.pid)
    os.kill(run.workers()["1"], signal.SIGSTOP)
    run.send(signal.SIGKILL)
    assert_all_end(processes)


def test_processes_end_if_the_launcher_is_killed_while_they_start(tmp_path):
    """Rank 0 kills it when it begins to import torch, which takes seconds."""
    kill = f"""
import os, sys
rank = os.environ["RANK"]
open({str(tmp_path)!r} + "/pid" + rank, "w").write(str(os.getpid()))
class Finder:
    def find_spec(self, name, *_):
        if name == "torch" and rank == "0":
            sys.meta_path.remove(self)
            os.kill(os.getppid(), 9)
sys.meta_path.insert(0, Finder())
"""
    run = torchrun(*flags_of(tmp_path / "run", "--epochs", 500), before=kill)
    assert run.code(60) == -signal.SIGKILL
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    processes = [int(until(lambda file=file: file.exists() and file.read_text())) for file in files]
    assert_all_end(processes, 30)


# Ranks that end, and restarts


def test_restarts_of_torchrun_end_with_a_straight_run(tmp_path):
    crashes = [strike(signal.SIGKILL, step=4 + 1, rank=1), strike(signal.SIGSEGV, step=2, rank=0), ""]
    before = f"import os; exec({crashes}[int(os.environ['TORCHELASTIC_RESTART_COUNT'])], {{}})"
    flags = flags_of(tmp_path / "crashed")
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = torchrun(*flags, launcher=["--max-restarts=2"], before=before, env=own_store)
    assert run.code(120) == 0, run.text
    finish(0, *flags_of(tmp_path / "straight"), ranks=2)
    assert_same_state(saved(tmp_path / "crashed"), saved(tmp_path / "straight"))
    assert run.text.count("--resume auto: ") == 3
    assert status(tmp_path / "crashed")["status"] == "done"


CRASHES = {
    "raised": (
        on_student("if rank == 1:\n    raise LookupError('the sky fell')", training=False),
        r"rank *: 1 .*exitcode *: 1 .*LookupError: the sky fell",
    ),
    "killed": (strike(signal.SIGKILL, step=1, rank=1), r"rank *: 1 .*exitcode *: -9 "),
    "rank 0 killed": (strike(signal.SIGKILL, step=1, rank=0), r"rank *: 0 .*exitcode *: -9 "),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_torchrun_names_the_rank_that_failed_and_its_error(crash, tmp_path):
    before, cause = CRASHES[crash]
    run = torchrun(*flags_of(tmp_path), before=before)
    assert run.code() not in (0, None)
    assert re.search(cause, run.text[run.text.index("Root Cause") :], re.DOTALL)
    assert status(tmp_path)["status"] == "failed"
    assert status(tmp_path)["reason"] == "the sky fell" or crash != "raised"


def test_a_slow_status_of_rank_0_does_not_hide_a_failure(tmp_path):
    """On a network file system, a write may take long."""
    slow = """
import os, time
replace = os.replace
def slow(source, target):
    if os.environ["RANK"] == "0" and str(target).endswith("status.json"):
        time.sleep(2)
    replace(source, target)
os.replace = slow
"""
    codes(fork(*flags_of(tmp_path), ranks=2, before=slow + CRASHES["raised"][0]))
    assert status(tmp_path)["reason"] == "the sky fell"


@pytest.mark.parametrize("silent", [0, 1])
def test_hung_rank_ends_the_others_at_the_timeout(silent, tmp_path):
    """There is no launcher, which would end the stopped process after 30 seconds."""
    runs = fork(*flags_of(tmp_path, "--dist-timeout", 3), ranks=2, before=strike(signal.SIGSTOP, step=1, rank=silent))
    other = runs[1 - silent]
    assert other.code(20) == 1
    assert re.match(r"(\[rank 1\] )?error: lost another process: .*gloo", errors([other])[0])
    assert "Traceback" not in other.text
    runs[silent].send(signal.SIGKILL)
    assert status(tmp_path)["status"] == "failed"


# The disk and the folder


def full_disk(*, until_step=10**9):
    """Return statements for `before`: files cannot grow over 100 kB until the run has done so many training steps.

    A checkpoint has about 600 kB, all other files have less than 10.
    """
    lift = "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
    return limit + on_student(f"if step >= {until_step}:\n    import resource; {lift}")


def test_full_disk_keeps_the_previous_checkpoint_and_the_run(tmp_path):
    """Both saves of epoch 1 fail; those of epoch 2 succeed."""
    finish(0, *flags_of(tmp_path, "--epochs", 1), ranks=2)
    (tmp_path / ".checkpoint.pth.abcd1234.tmp").write_bytes(b"half a checkpoint")  # of a save that was killed
    runs = finish(0, *flags_of(tmp_path, "--epochs", 3), ranks=2, before=full_disk(until_step=4))
    warning = "warning: checkpoint not written; the previous one is kept: [Errno 27] File too large\n"
    assert runs[0].text.count(warning) == 2
    assert "Traceback" not in runs[0].text + runs[1].text
    assert saved(tmp_path)["epoch"] == 2
    assert not list(tmp_path.glob(".*.tmp"))


FULL_LOG = f"if step == 0:\n    os.symlink('/dev/full', {OUTPUT} + '/log.txt')"
# A full disk has no room for a new file, but lets an existing one be overwritten.
NO_ROOM = """
import tempfile
def refuse(*args, **kwargs):
    raise OSError(28, "No space left on device")
tempfile.mkstemp = refuse
"""
# The exit code, the epochs to train, the statements before the run, and what it reports.
FULL_DISKS = {
    "third save in a row": (2, 9, full_disk(), "^error: 3 checkpoints in a row could not be written to .*Errno 27"),
    "last save": (2, 1, full_disk(), "^error: the run's last checkpoint could not be written to /"),
    "log": (2, 2, on_student(FULL_LOG), r"^error: epochs \[0, 1\] are missing from log.txt, because they could not be"),
    # Both saves of epoch 0, the best so far, fail; the next one is the first of epoch 1.
    "best epoch": (
        STOPPED,
        2,
        full_disk(until_step=9) + strike(signal.SIGTERM, step=8 + 3),
        "^warning: the weights of the best epoch, 0, are not in model_best.pth",
    ),
    "preemption": (
        STOPPED,
        2,
        on_student(NO_ROOM) + strike(signal.SIGTERM, step=1),
        "after step 2: this state was not saved",
    ),
}


@pytest.mark.parametrize("what", FULL_DISKS)
def test_what_a_full_disk_loses_is_reported(what, tmp_path):
    code, number, before, message = FULL_DISKS[what]
    ranks = 2 if "third" in what else 1
    runs = finish(code, *flags_of(tmp_path, "--epochs", number), ranks=ranks, before=before)
    assert re.search(message, ranks_of(runs)[0].text, re.MULTILINE)
    assert status(tmp_path)["status"] == ("failed" if code == 2 else "preempted")
    assert not (tmp_path / "model_best.pth").exists() or what == "log"
    assert "third" not in what or epochs(tmp_path) == [0]


def test_second_run_in_the_same_folder_is_refused(tmp_path):
    first = fork(*flags_of(tmp_path, "--epochs", 500)).says("Epoch: [0]")
    second = finish(2, *flags_of(tmp_path))
    holder = f"pid {first.pid} on {socket.gethostname()}"
    message = f"error: --output_dir {tmp_path} is in use by {holder}: wait for it, or give another folder"
    assert errors(second) == [message]
    assert (status(tmp_path)["status"], status(tmp_path)["pid"]) == ("running", first.pid)
    first.send(signal.SIGKILL)
    finish(0, *flags_of(tmp_path, "--epochs", 1))


def test_ranks_that_see_different_folders_are_refused(tmp_path):
    """A relative path from a different folder on each rank simulates nodes without a shared disk."""
    apart = f"import os; home = {str(tmp_path)!r} + '/' + os.environ['RANK']; os.makedirs(home); os.chdir(home)"
    runs = finish(2, *flags_of("out"), ranks=2, before=apart, timeout=30)
    reason = "is not the folder of rank 0: give one that all nodes share"
    message = f"error: --output_dir out on {socket.gethostname()} {reason}"
    assert errors(runs) == [message, f"[rank 1] {message}"]


# Output that cannot be written


def test_closed_stdout_does_not_end_two_processes(tmp_path):
    closed = "import os, sys; os.close(1); sys.stdout = None"
    finish(0, *flags_of(tmp_path, "--epochs", 1), ranks=2, before=closed)
    assert status(tmp_path)["status"] == "done"


STRICT = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"  # as PYTHONIOENCODING=ascii:strict
FULL = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stdout", [STRICT, FULL], ids=["ascii", "full"])
def test_warning_that_cannot_be_printed_does_not_end_the_run(stdout, workers, images, tmp_path):
    """An unreadable image whose name is Latin-1 under a UTF-8 locale, in an output folder with a Chinese name."""
    root = shutil.copytree(images, tmp_path / "images")
    os.rename(root / "train" / "ant" / "3.jpg", os.fsencode(root / "train" / "ant") + b"/caf\xe9.jpg")
    folder = tmp_path / "模型"
    run = finish(0, *imagenet_flags(root, folder, "--num_workers", workers, "--skip-bad-images", 1), before=stdout)
    assert stdout != STRICT or re.search(r"caf\\udce9.jpg.*0 more allowed", run.text)
    assert status(folder)["status"] == "done"


def test_output_folder_whose_name_is_not_unicode_works(tmp_path):
    """Written, resumed and finished."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    finish(STOPPED, *flags_of(folder), before=strike(signal.SIGTERM, step=9))
    assert "model_best.pth" not in finish(0, *flags_of(folder)).text  # nothing is amiss with it
    assert len(os.listdir(folder)) >= 7


# Images and loader workers


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return an IMNET folder of 2 classes x 16 images; train/ant/3.jpg is text."""
    root = jpeg_folder(tmp_path_factory.mktemp("images"), images=16)
    (root / "train" / "ant" / "3.jpg").write_text("no image")
    return root


def with_a_pipe(images, folder):
    """Return a copy whose unreadable image is a named pipe, to which nobody writes."""
    root = shutil.copytree(images, folder / "images")
    os.unlink(root / "train" / "ant" / "3.jpg")
    os.mkfifo(root / "train" / "ant" / "3.jpg")
    return root


def imagenet_flags(root, folder, *more):
    flags = tiny_run("--batch-size", 4, "--epochs", 1, "--no-repeated-aug", "--output_dir", folder, *more)
    start = flags.index("--gratings-sizes")
    return [*flags[:start], *flags[start + 3 :], "--data-set", "IMNET", "--data-path", root]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (1, 2)])
def test_unreadable_image_ends_the_run_with_its_path(workers, ranks, images, tmp_path):
    """One of two ranks reads it, and must not leave the other one waiting."""
    runs = fork(*imagenet_flags(images, tmp_path, "--num_workers", workers), ranks=ranks)
    assert sorted(codes(runs, 30)) == [1, 2][-ranks:]
    text = "".join(run.text for run in ranks_of(runs))
    assert f"error: cannot read image {images / 'train' / 'ant' / '3.jpg'}: cannot identify image file" in text
    assert "Traceback" not in text


def test_failure_in_validation_keeps_the_trained_epoch(images, tmp_path):
    root = shutil.copytree(images, tmp_path / "images")
    shutil.copy(root / "train" / "ant" / "4.jpg", root / "train" / "ant" / "3.jpg")
    image = root / "val" / "bee" / "9.jpg"
    break_image = on_student(f"open({str(image)!r}, 'w').close()")  # after any check at the start
    content = image.read_bytes()
    flags = imagenet_flags(root, tmp_path / "out", "--resume", "auto")
    failed = finish(2, *flags, before=break_image)
    assert errors(failed)[0].startswith(f"error: cannot read image {image}")
    assert saved(tmp_path / "out")["trained"]
    image.write_bytes(content)
    assert "Epoch: [0]" not in finish(0, *flags).text  # no step is repeated
    finish(0, *imagenet_flags(root, tmp_path / "straight"))
    assert_same_state(saved(tmp_path / "out"), saved(tmp_path / "straight"))
    lines = [json.loads((tmp_path / name / "log.txt").read_text()) for name in ("out", "straight")]
    assert len({(line["train_loss"], line["test_loss"]) for line in lines}) == 1


def test_unreadable_validation_image_is_found_before_training(images, tmp_path):
    root = shutil.copytree(images, tmp_path / "images")
    (root / "val" / "bee" / "9.jpg").write_text("no image")
    run = finish(2, *imagenet_flags(root, tmp_path / "out"))
    assert errors(run)[0].startswith(f"error: cannot read image {root / 'val' / 'bee' / '9.jpg'}")
    assert "Epoch: [0]" not in run.text


KILL_WORKERS = """
import os, signal, time
from multiprocessing import active_children
def kill():
    for worker in active_children():
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(0.5)
"""
MOMENTS = {
    "in an epoch": "",
    "when another is forked": KILL_WORKERS + "os.register_at_fork(after_in_parent=kill)",
    # its sockets close before it counts as ended
    "while it hands over a batch": """
from multiprocessing import resource_sharer
def break_off(_):
    raise ConnectionResetError(104, "Connection reset by peer")
resource_sharer._resource_sharer.get_connection = break_off
""",
}


@pytest.mark.parametrize("before", MOMENTS.values(), ids=MOMENTS)
def test_killed_loader_worker_ends_the_run_with_one_line(before, tmp_path):
    """The kernel does this when memory is short."""
    run = fork(*flags_of(tmp_path, "--epochs", 500, "--num_workers", 1), before=before)
    if not before:
        os.kill(min(descendants(run.says("Epoch: [0]").pid)), signal.SIGKILL)
    assert run.code() == 2
    assert re.fullmatch(r"error: lost a data loading worker: .*: use fewer --num_workers.*", run.text.splitlines()[-1])
    assert "Traceback" not in run.text


def test_lost_loader_worker_does_not_spoil_a_checkpoint(tmp_path):
    kill_in_save = """
import torch
save = torch.save
def save_and_kill(state, file):
    kill()
    save(state, file)
torch.save = save_and_kill
"""
    run = finish(2, *flags_of(tmp_path, "--num_workers", 1), before=KILL_WORKERS + kill_in_save)
    assert len(errors(run)) == 1
    assert saved(tmp_path)["epoch"] == 0


def test_signal_while_a_loader_is_built_is_one_line(tmp_path):
    """The half-built loader would complain when it is deleted."""
    finish(0, *flags_of(tmp_path, "--epochs", 1))
    before = """
import os
from torch.utils.data._utils import signal_handling
signal_handling._set_SIGCHLD_handler = lambda: os.kill(os.getpid(), 15)
"""
    flags = tiny_run("--eval", "--resume", tmp_path / "checkpoint.pth", "--num_workers", 1)
    run = finish(STOPPED, *flags, before=before)
    assert run.text.splitlines()[-1] == "stopped by SIGTERM"
    assert "Traceback" not in run.text


def test_hung_loader_worker_ends_the_run_at_the_timeout(images, tmp_path):
    root = with_a_pipe(images, tmp_path)
    run = fork(*imagenet_flags(root, tmp_path / "out", "--num_workers", 1, "--loader-timeout", 2))
    workers = until(lambda: descendants(run.pid))
    assert run.code(20) == 2
    assert errors(run)[0].startswith("error: lost a data loading worker: DataLoader timed out after 2.0 seconds: use")
    assert "Traceback" not in run.text
    assert_all_end(workers)


# How it was started


def test_missing_teacher_ends_all_ranks_and_names_the_way_out():
    """All runs here are offline, with empty caches."""
    flags = tiny_run("--distillation-type", "soft", "--w-fft", 0, "--teacher-model", "cait_s24_224")
    runs = finish(2, *flags, ranks=2, timeout=20)
    assert all("--teacher-path" in line and "cait_s24_224" in line for line in errors(runs))
    assert len(errors(runs)) == 2


def test_mistake_of_the_second_rank_alone_is_printed():
    wrong = "import os, sys\nif os.environ['RANK'] == '1':\n    sys.argv += ['--lr', 'nan']\n"
    first, second = fork(*tiny_run(), ranks=2, before=wrong)
    assert second.code(20) == 2
    first.send(signal.SIGKILL)  # it waits for the second, as long as no launcher ends it
    assert errors(second) == ["[rank 1] error: argument --lr: expected a number in [0, inf), got nan"]


RESTARTED = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
OWN_STORE = "--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the launcher's env"
# Flags, the launcher's variables, and the error.
STARTS = {
    "slurm": ("", {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "SLURM started 4 tasks, but RANK .*srun python -m torch"),
    "no world size": ("", {"RANK": "0"}, "RANK is 0 and WORLD_SIZE is unset: expected 0 <= RANK < WORLD_SIZE"),
    "no rank": ("", {"WORLD_SIZE": "2"}, "RANK is unset and WORLD_SIZE is 2: expected 0 <= RANK < WORLD_SIZE"),
    "rank too high": ("", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2: expected"),
    "not a number": ("", {"RANK": "zero", "WORLD_SIZE": "1"}, "RANK is zero and WORLD_SIZE is 1: expected"),
    "no address": ("", {"RANK": "0", "WORLD_SIZE": "1"}, "the processes cannot connect: .*MASTER_ADDR"),
    "no resume": ("", RESTARTED, "--max-restarts would start the run from the beginning each time: add --resume auto"),
    "old store": ("--resume auto", RESTARTED, OWN_STORE),
}


@pytest.mark.parametrize("name", STARTS)
def test_start_that_contradicts_itself_is_refused(name, tmp_path):
    flags, env, message = STARTS[name]
    run = finish(2, *tiny_run("--output_dir", tmp_path, *flags.split()), env=env)
    assert re.fullmatch(rf"(\[rank 2\] )?error: .*{message}.*", run.text.strip())


def test_one_task_of_slurm_needs_no_launcher():
    finish(0, *tiny_run("--world_size", 8), env={"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})


# Sweeps, on request


@pytest.mark.sweep
def test_twenty_preemptions_lose_no_step_and_leave_no_process(tmp_path):
    generator, times = random.Random(0), []
    flags = flags_of(tmp_path / "preempted", "--epochs", 150, "--num_workers", 1)
    for _ in range(20):
        run = torchrun(*flags).says("Epoch: [")
        processes = descendants(run.pid)
        time.sleep(generator.random())
        began = time.time()
        run.send(signal.SIGTERM)
        assert run.code(25) == 1
        times.append((tmp_path / "preempted" / "status.json").stat().st_mtime - began)
        assert status(tmp_path / "preempted")["status"] == "preempted"
        assert_all_end(processes)
    stopped_at = saved(tmp_path / "preempted")["epoch"]
    finish(0, *flags, ranks=2, timeout=300)
    finish(0, *flags_of(tmp_path / "straight", "--epochs", 150), ranks=2, timeout=300)
    assert_same_state(saved(tmp_path / "preempted"), saved(tmp_path / "straight"))
    print(f"20 preemptions up to epoch {stopped_at}: from SIGTERM to saved at most {max(times):.2f} s; no process left")


@pytest.mark.sweep
def test_twenty_thousand_augmentations():
    """Pillow has changed what RandAugment's operations accept."""
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(20)]
    transform = datasets.train_transform(64, aa="rand-m9-mstd0.5-inc1", color_jitter=0.4)
    for seed in range(20_000):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        assert transform(images[seed % 20]).shape == (3, 64, 64)
