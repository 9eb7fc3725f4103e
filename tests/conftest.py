"""What several test files share: one thread, the tiny models, and running the program as its users do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
STUDENT = ["img_size=32", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=3"]
TEACHER = ["img_size=32", "patch_size=8", "embed_dim=48", "depth=6", "num_heads=4"]

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that the tests start
torch.set_num_threads(1)


def tiny_run(*more):
    """Flags of a run of seconds: a tiny DeiT on a small GRATINGS. A flag in `more` wins."""
    return [
        *("--data-set", "GRATINGS", "--gratings-sizes", "64", "48", "--input-size", "32", "--num_workers", "0"),
        *("--model", "deit_tiny_patch16_224", "--model-kwargs", *STUDENT),
        *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--device", "cpu", *map(str, more)),
    ]


def run_main(*flags, processes=0, timeout=120):
    """Runs main.py as a program, under torch.distributed.run where `processes` says so, and returns what it did."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "main.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A file of random weights of the tiny CaiT teacher, for 24 classes."""
    import timm

    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    kwargs = dict(pair.split("=") for pair in TEACHER)
    torch.manual_seed(1)
    model = timm.create_model("cait_s24_224", num_classes=24, **{key: int(value) for key, value in kwargs.items()})
    torch.save(model.state_dict(), path)
    return path


def distil(teacher_file, *more):
    """Flags that teach the tiny DeiT by the tiny CaiT."""
    return [
        *(
            "--distillation-type",
            "soft",
            "--distillation-alpha",
            "0.9",
            "--s-id",
            "0",
            "1",
            "3",
            "--t-id",
            "0",
            "1",
            "5",
        ),
        *("--teacher-path", str(teacher_file), "--teacher-kwargs", *TEACHER, *map(str, more)),
    ]


@pytest.fixture(autouse=True)
def unchanged_signal_handlers():
    """A run in this process replaces the handlers of signals; the next test gets the old ones back."""
    import signal

    import faults

    before = {number: signal.getsignal(number) for number in faults.STOP_SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
