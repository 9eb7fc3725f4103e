"""What happens to a run when something breaks: each fault is provoked for real."""

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
from conftest import tiny_run
from PIL import Image
from processes import alive, codes, descendants, fork, strike, torchrun, until
from torch import nn

import datasets
import engine
import main
import utils

pytestmark = pytest.mark.slow


def status(folder):
    return json.loads((folder / "status.json").read_text())


def errors(runs):
    """All lines that begin with error: of all ranks."""
    return [line for run in runs for line in run.text.splitlines() if line.startswith("error:")]


def checkpoint(folder, name="checkpoint.pth"):
    return torch.load(folder / name, weights_only=True)


# Divergence


def poison(what, *, steps, rank):
    """Statements for `fork`'s `before`: on one rank, replace the student's output in these training steps by `what`.

    Each rank also leaves its weights, as evaluation sees them, in rank<r>.pth of its working folder.
    """
    return f"""
import os, sys, torch
rank = int(os.environ.get("RANK", 0))
seen = 0
def replace(module, args, output):
    global seen
    if type(module).__name__ != "VisionTransformer":
        return
    if not module.training:
        folder = sys.argv[sys.argv.index("--output_dir") + 1]
        torch.save(module.state_dict(), folder + f"/rank{{rank}}")
        return
    seen += 1
    if rank == {rank} and seen - 1 in {list(steps)}:
        return {what}
torch.nn.modules.module.register_module_forward_hook(replace)
"""


NAN = "output * float('nan')"
BAD_GRADIENT = "output.register_hook(lambda gradient: gradient * float('inf')) and None"
FOUR_STEPS = tiny_run("--batch-size", 8, "--unscale-lr", "--lr", "1e-3")  # an epoch on two processes


def test_one_rank_without_a_finite_loss_makes_all_skip_the_same_steps(tmp_path):
    runs = fork(
        *FOUR_STEPS, "--epochs", 3, "--output_dir", tmp_path, ranks=2, before=poison(NAN, steps=(2, 3, 5), rank=1)
    )
    assert codes(runs) == [0, 0]
    ranks = [torch.load(tmp_path / f"rank{r}", weights_only=True) for r in (0, 1)]
    torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
    saved = checkpoint(tmp_path)
    assert utils.name_not_finite(saved) is None
    assert {state["step"].item() for state in saved["optimizer"]["state"].values()} == {12 - 3}
    warning = "warning: term loss_base of rank 1 is not finite in epoch 0, step 3; the step was skipped"
    assert warning in runs[0].text
    assert all(line["train_loss"] > 0 for line in map(json.loads, (tmp_path / "log.txt").read_text().splitlines()))


def test_the_third_loss_in_a_row_stops_all_ranks_with_term_epoch_and_step(tmp_path):
    """Counted across epochs: the last step of epoch 0 and the first two of epoch 1."""
    runs = fork(
        *FOUR_STEPS, "--epochs", 3, "--output_dir", tmp_path, ranks=2, before=poison(NAN, steps=(3, 4, 5), rank=1)
    )
    assert codes(runs) == [3, 3]
    assert errors(runs) == ["error: term loss_base of rank 1 was not finite 3 steps in a row, epoch 1, step 1"]
    assert checkpoint(tmp_path)["epoch"] == 0
    assert utils.name_not_finite(checkpoint(tmp_path)) is None
    assert status(tmp_path)["status"] == "diverged"
    assert "term loss_base of rank 1" in status(tmp_path)["reason"]


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float32", "error: 20 steps in a row were skipped for their gradient, up to epoch 4, step 3"),
        ("float16", "error: the gradient scale fell to 0.5 in epoch 2: no step counts"),  # 2^11 halved 12 times
    ],
)
def test_a_run_whose_gradient_never_counts_is_stopped_though_its_loss_is_finite(dtype, message, tmp_path):
    flags = (*FOUR_STEPS, "--epochs", 9, "--amp-dtype", dtype, "--output_dir", tmp_path)
    low_scale = "import torch; torch.amp.GradScaler.__init__.__defaults__ = ('cuda', 2.0**11, 2.0, 0.5, 2000, True)"
    runs = fork(*flags, ranks=2, before=low_scale + poison(BAD_GRADIENT, steps=range(99), rank=0))
    assert codes(runs) == [3, 3]
    assert errors(runs) == [message]
    assert status(tmp_path)["status"] == "diverged"


def test_bad_weights_are_never_saved(tmp_path):
    """The weights break after the last step of epoch 1, so that no loss of it tells."""
    break_weights = """
import torch
evaluations = set()
def overwrite(module, args):
    if type(module).__name__ == "VisionTransformer" and module.training:
        evaluations.add(0)
    elif type(module).__name__ == "VisionTransformer" and evaluations == {0}:
        evaluations.add(1)  # of epoch 0
    elif type(module).__name__ == "VisionTransformer" and evaluations == {0, 1}:
        with torch.no_grad():
            module.head.bias[0] = float("inf")
torch.nn.modules.module.register_module_forward_pre_hook(overwrite)
"""
    runs = fork(
        *FOUR_STEPS, "--gratings-sizes", 64, 16, "--epochs", 2, "--output_dir", tmp_path, ranks=2, before=break_weights
    )
    assert codes(runs) == [3, 3]
    assert errors(runs) == ["error: checkpoint model head.bias is not finite: not saved, the checkpoint before is kept"]
    assert checkpoint(tmp_path)["epoch"] == 0
    assert utils.name_not_finite(checkpoint(tmp_path)) is None


class Sum(nn.Module):
    """Float images as they are."""

    def forward(self, images):
        return images


class NoHooks:
    def pop(self):
        return []


def train(batches, criterion=None):
    """Trains a small network with BatchNorm on batches of (float images, labels); returns it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    engine.train_one_epoch(
        model,
        NoHooks(),
        criterion or (lambda images, outputs, maps, labels: {"loss": nn.functional.cross_entropy(outputs, labels)}),
        batches,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        scaler=main.ConstantScaler("cpu"),
        meter=utils.Meter(["loss"]),
        epoch=0,
        device=torch.device("cpu"),
        prepare=Sum(),
        seed_step=lambda epoch, step: None,
        should_stop=lambda: False,
    )
    return model


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 3


def test_a_skipped_step_leaves_no_trace_in_weights_and_batchnorm():
    bad = (torch.full((8, 6), torch.inf), torch.arange(8) % 3)
    found, expected = train([batch(1), bad, batch(2)]).state_dict(), train([batch(1), batch(2)]).state_dict()
    del found["1.num_batches_tracked"], expected["1.num_batches_tracked"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_infinite_loss_is_skipped_though_its_gradient_is_finite():
    def criterion(images, outputs, maps, labels):
        return {"loss": nn.functional.cross_entropy(outputs, labels) + torch.inf}

    initial = train([])
    torch.testing.assert_close(
        train([batch(1)], criterion).state_dict(),
        initial.state_dict() | {"1.num_batches_tracked": torch.tensor(1)},
        rtol=0,
        atol=0,
    )


def test_watching_for_divergence_does_not_wait_for_the_device():
    """Tensors of the meta device have no numbers: whatever asked for one would fail, as the check does."""
    watch, guard = engine.DivergenceWatch(), engine.BufferGuard(nn.BatchNorm1d(3, device="meta"))
    watch.begin(["loss"], 0)
    loss = torch.ones((), device="meta")
    for step in range(5):
        guard.keep()
        engine.spoil_unless_finite(loss)
        guard.put_back_unless(loss.isfinite())
        watch.note([loss[None]], loss, step)
    with pytest.raises((RuntimeError, NotImplementedError)):
        watch.check(None)


# Signals


def flags_of(folder, *more):
    return tiny_run("--epochs", 2, "--batch-size", 8, "--output_dir", folder, "--resume", "auto", *more)


@pytest.mark.parametrize("number", utils.STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_is_saved(number, tmp_path):
    runs = fork(*flags_of(tmp_path), ranks=2, before=strike(number, step=4 + 2, rank=1))
    assert codes(runs) == [128 + number] * 2
    said = [line for run in runs for line in run.text.splitlines() if "stopped" in line]
    assert said == [f"stopped by {number.name} in epoch 1, after step 3 of 4: --resume auto goes on from here"]
    assert (checkpoint(tmp_path)["epoch"], checkpoint(tmp_path)["step"]) == (0, 3)
    assert status(tmp_path)["status"] == "preempted"


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost(tmp_path):
    """It comes after rank 1 has said that there is none, and before the others have answered."""
    meanwhile = """
import os, torch.distributed as dist
reduce, calls = dist.all_reduce, 0
def strike(tensor, *args, **kwargs):
    global calls
    calls += kwargs.get("op") == dist.ReduceOp.MAX
    if calls == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 15)
    return reduce(tensor, *args, **kwargs)
dist.all_reduce = strike
"""
    runs = fork(*flags_of(tmp_path), ranks=2, before=meanwhile)
    assert codes(runs) == [128 + signal.SIGTERM] * 2
    assert (checkpoint(tmp_path)["epoch"], checkpoint(tmp_path)["step"]) == (-1, 4)


def test_a_signal_in_evaluation_stops_it_and_keeps_the_epoch(tmp_path):
    """Shards of 25 and 24 images in batches of 12 are 3 and 2 batches, and the stop comes to the shorter."""
    flags = flags_of(tmp_path, "--gratings-sizes", 64, 49)
    runs = fork(*flags, ranks=2, before=strike(signal.SIGTERM, step=2, training=False, rank=1))
    assert codes(runs) == [128 + signal.SIGTERM] * 2
    assert "in epoch 0, after step 4 of 4" in "".join(run.text for run in runs)
    assert not (tmp_path / "log.txt").exists()
    assert codes(fork(*flags, ranks=2)) == [0, 0]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]


def test_a_signal_during_start_up_stops_at_once(tmp_path):
    build = "import os, timm; build = timm.create_model\n"
    build += "timm.create_model = lambda *a, **k: (os.kill(os.getpid(), 15), build(*a, **k))[1]"
    run = fork(*flags_of(tmp_path), before=build)
    assert run.code() == 128 + signal.SIGTERM
    assert run.text.splitlines()[-1] == "stopped by SIGTERM"
    assert status(tmp_path)["status"] == "preempted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["torchrun's", "Ctrl-C"])
def test_a_signal_to_the_process_group_leaves_the_loader_workers_to_their_process(number, tmp_path):
    """A worker that took the signal itself would end the run with an error."""
    run = fork(*flags_of(tmp_path, "--epochs", 50, "--num_workers", 2)).says("Epoch: [1]")
    workers = descendants(run.pid)
    assert len(workers) == 4  # those of training and those of evaluation
    os.killpg(run.pid, number)
    assert run.code() == 128 + number
    assert "--resume auto goes on from here" in run.text
    until(lambda: not any(map(alive, workers)), 5)


def test_loader_workers_end_with_their_process_when_it_is_killed(tmp_path):
    run = fork(*flags_of(tmp_path, "--epochs", 50, "--num_workers", 2)).says("Epoch: [1]")
    workers = descendants(run.pid)
    run.send(signal.SIGKILL)
    assert run.code() == -signal.SIGKILL
    until(lambda: not any(map(alive, workers)), 2)
    assert fork(*flags_of(tmp_path)).code() == 0  # the lock went too


def test_a_start_that_is_stopped_because_another_process_failed_is_not_preempted(tmp_path):
    """Else a script would requeue the job again and again."""
    wait_or_fail = (
        raises("the sky fell", rank=1)
        + """
import time
def wait(module, args):
    if type(module).__name__ == "VisionTransformer" and os.environ["RANK"] == "0":
        print("waits", flush=True)
        time.sleep(60)
torch.nn.modules.module.register_module_forward_pre_hook(wait)
"""
    )
    first, second = fork(*flags_of(tmp_path), ranks=2, before=wait_or_fail)
    assert second.code() == 1
    first.says("waits").send(signal.SIGTERM)
    assert first.code() == 128 + signal.SIGTERM
    assert status(tmp_path)["status"] == "failed"


def test_torchrun_hands_on_sigterm_and_the_next_start_goes_on(tmp_path):
    flags = flags_of(tmp_path, "--epochs", 500, "--num_workers", 1)
    run = torchrun(*flags).says("Epoch: [1]")
    processes = descendants(run.pid)
    assert len(processes) == 2 + 4
    began = time.monotonic()
    run.send(signal.SIGTERM)
    assert run.code(25) not in (0, None)
    assert time.monotonic() - began < 25
    assert '"status": "preempted"' in (tmp_path / "status.json").read_text()  # what recipes/*.slurm look for
    until(lambda: not any(map(alive, processes)), 5)
    done = checkpoint(tmp_path)["epoch"] + 1
    assert codes(fork(*flags, "--epochs", done + 1, ranks=2)) == [0, 0]
    assert status(tmp_path)["status"] == "done"


def test_without_the_launcher_workers_end_within_five_seconds(tmp_path):
    """Rank 1 is stopped and cannot answer at all, so rank 0 waits for it in vain."""
    run = torchrun(*flags_of(tmp_path, "--epochs", 500, "--num_workers", 1)).says("Epoch: [1]")
    processes = descendants(run.pid)
    os.kill(run.workers()["1"], signal.SIGSTOP)
    run.send(signal.SIGKILL)
    until(lambda: not any(map(alive, processes)), 5)


# Ranks that end, and restarts


def test_each_restart_of_torchrun_resumes_and_ends_with_the_weights_of_a_straight_run(tmp_path):
    first, second = (
        f"import os\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '{count}':\n    exec({crash!r}, {{}})\n"
        for count, crash in enumerate(
            [strike(signal.SIGKILL, step=4 + 1, rank=1), strike(signal.SIGSEGV, step=2, rank=0)]
        )
    )
    flags = [*flags_of(tmp_path / "crashed")[:-2], "--overwrite"]  # in place of --resume auto
    run = torchrun(*flags, launcher=["--max-restarts=2"], before=first + second)
    assert run.code(120) == 0, run.text
    assert codes(fork(*flags_of(tmp_path / "straight"), ranks=2)) == [0, 0]
    crashed, straight = (checkpoint(tmp_path / name) for name in ("crashed", "straight"))
    for part in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(crashed[part], straight[part], rtol=0, atol=0)
    assert run.text.count("--resume auto: ") == 2
    assert status(tmp_path / "crashed")["status"] == "done"


def test_a_restart_before_the_first_save_begins_with_the_same_file_again(tmp_path):
    assert codes(fork(*flags_of(tmp_path / "first", "--epochs", 1), ranks=2)) == [0, 0]
    flags = [*flags_of(tmp_path / "next")[:-2], "--resume", tmp_path / "first" / "checkpoint.pth"]
    crash = "import os\nif os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n    exec({!r}, {{}})\n"
    run = torchrun(*flags, launcher=["--max-restarts=1"], before=crash.format(strike(signal.SIGKILL, step=1, rank=1)))
    assert run.code(120) == 0, run.text
    assert "a fresh run" not in run.text
    assert [json.loads(line)["epoch"] for line in (tmp_path / "next" / "log.txt").read_text().splitlines()] == [1]


def raises(words, *, rank):
    return f"""
import os, torch
def fail(module, args):
    if type(module).__name__ == "VisionTransformer" and os.environ["RANK"] == "{rank}":
        raise ValueError("{words}")
torch.nn.modules.module.register_module_forward_pre_hook(fail)
"""


def test_torchrun_names_the_rank_that_raised_first_and_its_error(tmp_path):
    run = torchrun(*flags_of(tmp_path), before=raises("the sky fell", rank=1))
    assert run.code() not in (0, None)
    root_cause = run.text[run.text.index("Root Cause") :]
    assert re.search(r"rank *: 1 .*exitcode *: 1 .*ValueError: the sky fell", root_cause, re.DOTALL)
    assert run.text.count("ValueError: the sky fell") == 2  # rank 1's own traceback and the report
    assert status(tmp_path)["status"] in ("failed", "running")


def test_torchrun_names_the_rank_that_was_killed(tmp_path):
    run = torchrun(*flags_of(tmp_path), before=strike(signal.SIGKILL, step=1, rank=1))
    assert run.code() not in (0, None)
    root_cause = run.text[run.text.index("Root Cause") :]
    assert re.search(r"rank *: 1 .*exitcode *: -9 ", root_cause, re.DOTALL)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_hangs_ends_the_others_at_the_timeout_and_is_named(silent, tmp_path):
    """Without a launcher, which would end the stopped process after its own 30 seconds."""
    runs = fork(*flags_of(tmp_path, "--dist-timeout", 3), ranks=2, before=strike(signal.SIGSTOP, step=1, rank=silent))
    other = runs[1 - silent]
    assert other.code(20) == 1
    assert errors([other])[0].startswith(f"error: rank {1 - silent} lost rank {silent}: ")
    assert "Traceback" not in other.text
    runs[silent].send(signal.SIGKILL)
    assert silent == 0 or status(tmp_path)["status"] == "failed"


def test_workers_that_start_after_their_launcher_has_gone_end_at_once(tmp_path):
    gone = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    runs = fork(*flags_of(tmp_path), ranks=2, env=gone)
    assert codes(runs, 10) == [2, 2]
    assert errors(runs) == ["error: the launcher has gone: [Errno 111] Connection refused"]


# The disk and the folder


def full_disk(*, until_step=10**9):
    """Statements for `fork`'s `before`: files cannot grow over 100 kB until the run has done so many training steps.

    A checkpoint has about 600 kB, all other files have less than 10.
    """
    return f"""
import resource, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
steps = 0
def free(module, args):
    global steps
    steps += type(module).__name__ == "VisionTransformer" and module.training
    if steps > {until_step}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.nn.modules.module.register_module_forward_pre_hook(free)
"""


def test_a_full_disk_keeps_the_checkpoint_before_and_the_run_going(tmp_path):
    assert codes(fork(*flags_of(tmp_path, "--epochs", 1), ranks=2)) == [0, 0]
    before = (tmp_path / "checkpoint.pth").read_bytes()
    # Epochs 1 and 2 cannot be saved, epoch 3 can.
    runs = fork(*flags_of(tmp_path, "--epochs", 4), ranks=2, before=full_disk(until_step=2 * 4))
    runs[0].says("Epoch: [2]")
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    assert codes(runs) == [0, 0]
    warning = "warning: checkpoint not written; the previous one is kept: [Errno 27] File too large\n"
    assert runs[0].text.count(warning) == 2
    assert "Traceback" not in runs[0].text + runs[1].text
    assert checkpoint(tmp_path)["epoch"] == 3
    assert checkpoint(tmp_path, "checkpoint_previous.pth")["epoch"] == 0
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_third_checkpoint_in_a_row_that_cannot_be_written_stops_all_ranks(tmp_path):
    runs = fork(*flags_of(tmp_path, "--epochs", 9), ranks=2, before=full_disk())
    assert codes(runs) == [2, 2]
    assert errors(runs) == [f"error: 3 checkpoints in a row could not be written to {tmp_path}: free space"]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1, 2]
    assert status(tmp_path)["status"] == "failed"


def test_a_second_run_in_the_same_folder_is_refused_by_host_and_process(tmp_path):
    first = fork(*flags_of(tmp_path, "--epochs", 500)).says("Epoch: [0]")
    second = fork(*flags_of(tmp_path))
    assert second.code() == 2
    assert errors([second]) == [
        f"error: --output_dir {tmp_path} is in use by pid {first.pid} on {socket.gethostname()}: "
        "wait for it to end, or give another folder"
    ]
    assert (status(tmp_path)["status"], status(tmp_path)["pid"]) == ("running", first.pid)
    first.send(signal.SIGKILL)
    assert fork(*flags_of(tmp_path, "--epochs", 1)).code() == 0


def test_a_run_that_was_killed_while_it_saved_leaves_nothing_behind(tmp_path):
    (tmp_path / ".checkpoint.pth.abcd1234.tmp").write_bytes(b"half a checkpoint")
    assert fork(*flags_of(tmp_path, "--epochs", 1)).code() == 0
    assert not list(tmp_path.glob(".*.tmp"))


# Images and loader workers


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An IMNET folder of 2 classes x 16 images, one of which is text; and its path."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for i in range(16):
                Image.new("RGB", (40, 30), (16 * i, 90, 120)).save(root / split / name / f"{i}.jpg")
    bad = root / "train" / "ant" / "3.jpg"
    bad.write_text("no image")
    return root, bad


def imagenet_flags(root, folder, *more):
    flags = tiny_run("--batch-size", 4, "--epochs", 1, "--no-repeated-aug", "--output_dir", folder, *more)
    start = flags.index("--gratings-sizes")
    return [*flags[:start], *flags[start + 3 :], "--data-set", "IMNET", "--data-path", root]


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (2, 1), (1, 2)])
def test_a_file_that_is_no_image_ends_the_run_with_its_path(workers, ranks, images, tmp_path):
    """On two ranks one of them meets it, and must not leave the other one waiting."""
    root, bad = images
    runs = fork(*imagenet_flags(root, tmp_path, "--num_workers", workers), ranks=ranks)
    runs = runs if ranks > 1 else [runs]
    assert sorted(codes(runs, 30)) == ([2] if ranks == 1 else [1, 2])
    assert f"error: cannot read image {bad}: cannot identify image file" in "".join(run.text for run in runs)
    assert "Traceback" not in "".join(run.text for run in runs)


@pytest.mark.parametrize(("allowed", "code"), [(0, 2), (1, 0)])
def test_unreadable_images_are_replaced_up_to_a_number(allowed, code, images, tmp_path):
    root, bad = images
    run = fork(*imagenet_flags(root, tmp_path, "--num_workers", 2, "--skip-bad-images", allowed))
    assert run.code() == code
    assert ("0 more allowed" in run.text) == (code == 0)
    assert str(bad) in run.text


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
def test_a_loader_worker_that_is_killed_ends_the_run_with_one_line(before, tmp_path):
    """As the kernel does when memory is short."""
    run = fork(*flags_of(tmp_path, "--epochs", 500, "--num_workers", 1), before=before)
    if not before:
        os.kill(min(descendants(run.says("Epoch: [0]").pid)), signal.SIGKILL)
    assert run.code() == 2
    assert re.fullmatch(r"error: lost a loader worker: .*: give fewer --num_workers.*", run.text.splitlines()[-1])
    assert "Traceback" not in run.text


def test_the_end_of_a_loader_worker_does_not_spoil_the_checkpoint_that_is_being_written(tmp_path):
    kill_in_save = """
import torch
save = torch.save
def save_and_kill(state, file):
    kill()
    save(state, file)
torch.save = save_and_kill
"""
    run = fork(*flags_of(tmp_path, "--num_workers", 1), before=KILL_WORKERS + kill_in_save)
    assert run.code() == 2
    assert len(errors([run])) == 1
    assert checkpoint(tmp_path)["epoch"] == 0


def test_a_signal_while_a_loader_is_built_ends_an_evaluation_with_one_line(tmp_path):
    """What is left of the loader then has more to say when it is deleted."""
    assert fork(*flags_of(tmp_path, "--epochs", 1)).code() == 0
    before = """
import os
from torch.utils.data._utils import signal_handling
signal_handling._set_SIGCHLD_handler = lambda: os.kill(os.getpid(), 15)
"""
    run = fork(*tiny_run("--eval", "--resume", tmp_path / "checkpoint.pth", "--num_workers", 1), before=before)
    assert run.code() == 128 + signal.SIGTERM
    assert run.text.splitlines()[-1] == "stopped by SIGTERM"
    assert "Traceback" not in run.text


def test_a_loader_worker_that_hangs_ends_the_run_at_the_timeout(images, tmp_path):
    """It waits for an image that is a named pipe, into which nobody writes."""
    root = shutil.copytree(images[0], tmp_path / "images")
    os.unlink(root / "train" / "ant" / "3.jpg")
    os.mkfifo(root / "train" / "ant" / "3.jpg")
    run = fork(*imagenet_flags(root, tmp_path / "out", "--num_workers", 1, "--loader-timeout", 2))
    workers = until(lambda: descendants(run.pid))
    assert run.code(20) == 2
    assert errors([run])[0].startswith(
        "error: lost a loader worker: DataLoader timed out after 2.0 seconds: give fewer --num_workers"
    )
    assert "Traceback" not in run.text
    until(lambda: not any(map(alive, workers)), 5)


# How it was started


def test_a_teacher_that_cannot_be_had_ends_all_ranks_promptly_and_names_the_way_out():
    """The hubs are offline for all runs here, and their caches empty."""
    runs = fork(*tiny_run("--distillation-type", "soft", "--w-fft", 0, "--teacher-model", "cait_s24_224"), ranks=2)
    assert codes(runs, 20) == [2, 2]
    assert len(errors(runs)) == 1
    assert "--teacher-path" in errors(runs)[0]
    assert "cait_s24_224" in errors(runs)[0]


def test_a_mistake_that_the_second_process_meets_first_is_said_once():
    """The launcher would end the first process before it can say it."""
    slow = "import os, time\nif os.environ['RANK'] == '0':\n    time.sleep(2)\n"
    run = torchrun(*tiny_run("--lr", "nan"), before=slow)
    assert run.code() == 1
    assert errors([run]) == ["error: argument --lr: expected a number in [0, inf), got nan"]
    assert re.search(r"exitcode *: 2", run.text)  # torchrun adds its own report and code, and names ours


def test_a_mistake_of_the_second_process_alone_is_said():
    wrong = "import os, sys\nif os.environ['RANK'] == '1':\n    sys.argv += ['--lr', 'nan']\n"
    first, second = fork(*tiny_run(), ranks=2, before=wrong)
    assert second.code(20) == 2
    first.send(signal.SIGKILL)  # it waits for the second, as long as no launcher ends it
    assert errors([first, second]) == ["error: argument --lr: expected a number in [0, inf), got nan"]


STARTS = {
    "slurm": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "SLURM has 4 tasks here, but RANK .*srun python -m torch"),
    "no world size": ({"RANK": "0"}, "RANK is set without its partner"),
    "no rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set without its partner"),
    "rank too high": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 contradict each other"),
    "no number": ({"RANK": "zero", "WORLD_SIZE": "1"}, "RANK=zero and WORLD_SIZE=1 contradict each other"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "1"}, "the processes cannot meet: .*MASTER_ADDR"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_launcher_that_contradicts_itself_is_refused(name):
    env, message = STARTS[name]
    run = fork(*tiny_run(), env=env)
    assert run.code() == 2
    assert re.fullmatch(f"error: .*{message}.*", run.text.strip())


def test_another_number_of_processes_than_expected_is_refused():
    run = fork(*tiny_run("--world_size", 4))
    assert run.code() == 2
    assert re.fullmatch("error: --world_size 4 was expected, but there are 1 processes: .*", run.text.strip())
    assert fork(*tiny_run("--world_size", 1)).code() == 0


def test_one_task_of_slurm_needs_no_launcher():
    assert fork(*tiny_run(), env={"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}).code() == 0


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
        until(lambda processes=processes: not any(map(alive, processes)), 5)
    stopped_at = checkpoint(tmp_path / "preempted")["epoch"]
    assert codes(fork(*flags, ranks=2), 300) == [0, 0]
    assert codes(fork(*flags_of(tmp_path / "straight", "--epochs", 150), ranks=2), 300) == [0, 0]
    preempted, straight = (checkpoint(tmp_path / name) for name in ("preempted", "straight"))
    for part in ("model", "model_ema", "optimizer"):
        torch.testing.assert_close(preempted[part], straight[part], rtol=0, atol=0)
    print(f"20 preemptions up to epoch {stopped_at}: from SIGTERM to saved at most {max(times):.2f} s; no process left")


@pytest.mark.sweep
def test_a_hang_ends_a_job_of_torchrun(tmp_path):
    """At the timeout of 5 seconds plus the 30 that torchrun gives the stopped process."""
    run = torchrun(*flags_of(tmp_path, "--dist-timeout", 5), before=strike(signal.SIGSTOP, step=1, rank=1))
    assert run.code(90) not in (0, None)
    assert errors([run])[0].startswith("error: rank 0 lost rank 1: ")


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
