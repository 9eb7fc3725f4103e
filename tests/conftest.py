"""Shared by the test files: one thread, tiny models and images, and flags of short runs."""

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
STUDENT = ["img_size=32", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=3"]
TEACHER = ["img_size=32", "patch_size=8", "embed_dim=48", "depth=6", "num_heads=4"]

os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that the tests start
torch.set_num_threads(1)


def tiny_run(*more):
    """Return flags of a run that takes seconds: a tiny DeiT on a small GRATINGS. Flags in `more` override them."""
    return [
        *("--data-set", "GRATINGS", "--gratings-sizes", "64", "48", "--input-size", "32", "--num_workers", "0"),
        *("--model", "deit_tiny_patch16_224", "--model-kwargs", *STUDENT),
        *("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--device", "cpu", *map(str, more)),
    ]


def distil(teacher_file, *more):
    """Return flags that distill the tiny CaiT into the tiny DeiT."""
    return [
        *("--distillation-type", "soft", "--distillation-alpha", "0.9"),
        *("--s-id", "0", "1", "3", "--t-id", "0", "1", "5"),
        *("--teacher-path", str(teacher_file), "--teacher-kwargs", *TEACHER, *map(str, more)),
    ]


def run(*flags):
    """Run main in this process and return what it returns."""
    import main
    from flags import parse_args

    return main.main(parse_args(list(map(str, flags))))


def jpeg_folder(root, classes=("ant", "bee"), splits=("train", "val"), images=4, size=(40, 30)):
    """Write JPEG files in ImageNet's layout, each image of its own color, and return the folder."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                color = (60 * i % 256, (90 + 20 * label) % 256, 120)
                Image.new("RGB", size, color).save(root / split / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A file of random weights of the tiny CaiT teacher, for 24 classes."""
    import timm

    from flags import key_values

    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.manual_seed(1)
    torch.save(timm.create_model("cait_s24_224", num_classes=24, **key_values(TEACHER)).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def unchanged_signal_handlers():
    """Restore the signal handlers that a run in this process replaced."""
    from faults import STOP_SIGNALS

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
