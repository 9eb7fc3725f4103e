"""No flag is ignored: a short run with another value trains other weights.

Whether the flag does the right thing is tested with the module that implements it.
"""

import functools
from unittest import mock

import pytest
import timm
import torch
from conftest import distil, run, tiny_run

from flags import FEATURE_LOSSES

pytestmark = pytest.mark.slow
BASE = ("--epochs", "2", "--batch-size", "8", "--gratings-sizes", "32", "8", "--lr", "0.05")
SIZE_64 = "--input-size 64 --model-kwargs img_size=64 patch_size=16 embed_dim=24 depth=4 num_heads=3"
STEP = "--epochs 3 --warmup-epochs 1 --sched step --decay-epochs 1"
# Flags for which other flags matter.
BUSY = f"{STEP} --opt sgd --drop 0.5 --aa none --reprob 1 --mixup 0.8 --cutmix 1.0 --lr-noise 0.0 1.0 --smoothing 0"

TRAINING = f"""
    {SIZE_64}, --batch-size 16, --no-repeated-aug, --src, --aa none, --ThreeAugment, --reprob 0, --mixup 0.8,
    --cutmix 1.0, --cutmix-minmax 0.2 0.8, --seed 1, --epochs 3, --accum-steps 2, --num-classes 30, --drop 0.5,
    --drop-path 0.5, --model-kwargs img_size=32 patch_size=8 embed_dim=24 depth=4 num_heads=6, --attn-only,
    --amp-dtype bfloat16, --smoothing 0.3, --opt sgd, --opt-eps 0.1, --opt-betas 0.5 0.9, --weight-decay 0.5, --lr 0.1,
    --unscale-lr, --warmup-epochs 1, --cooldown-epochs 1
"""
BESIDE_OTHERS = """
    --no-train-mode, --bce-loss, --momentum 0.1, --clip-grad 0.001, --sched cosine, --decay-epochs 2, --decay-rate 0.5,
    --warmup-lr 0.001, --lr-noise 0.5, --lr-noise-pct 0.1, --color-jitter 0, --remode const, --recount 4,
    --mixup-prob 0.5, --mixup-switch-prob 1.0, --mixup-mode elem
"""
DISTILLING = """
    --distillation-type hard, --distillation-type fft, --distillation-alpha 0.1, --distillation-beta 3,
    --distillation-tau 3, --w-fft 2, --s-id 3 1 0, --t-id 5 1 0, --spectral-impl fft, --teacher-dtype float16
"""  # the last two by rounding
LOSSES = [f"--feature-loss {name}" for name in FEATURE_LOSSES if name != "spectral"]
MACHINERY = ["--num_workers 2 --loader-timeout 60", "--eval-ema", "--save-every 1 --no-dist-eval"]


def rows(text):
    return [row.strip() for row in text.split(",")]


def train(folder, *flags):
    """Return the checkpoint of a run."""
    with mock.patch("os.fsync"):  # a quarter of the time
        run(*tiny_run(*BASE, "--output_dir", folder, *flags))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def differ(one, other):
    return any(one[key].shape != other[key].shape or not torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a function that runs each set of common flags once."""
    return functools.cache(lambda *common: train(tmp_path_factory.mktemp("base"), *common))


CASES = [(flags, "") for flags in rows(TRAINING)] + [(flags, BUSY) for flags in rows(BESIDE_OTHERS)]
CASES += [("--train-interpolation bilinear", SIZE_64), ("--min-lr 0.001", "--epochs 3")]
if timm.__version__ != "1.0.11":  # which does not read it
    CASES.append(("--lr-noise-std 0.1", BUSY))


@pytest.mark.parametrize(("flags", "common"), CASES)
def test_a_training_flag_changes_the_weights(flags, common, base, tmp_path):
    common = common.split()
    assert differ(train(tmp_path, *common, *flags.split())["model"], base(*common)["model"])


@pytest.mark.parametrize("flags", [*rows(DISTILLING), *LOSSES])
def test_a_distillation_flag_changes_the_weights(flags, base, tmp_path, teacher_file):
    common = distil(teacher_file)
    assert differ(train(tmp_path, *common, *flags.split())["model"], base(*common)["model"])


@pytest.mark.parametrize("flags", ["", *MACHINERY])
def test_a_flag_of_the_machinery_keeps_the_weights(flags, base, tmp_path):
    """Without flags: two equal runs train equal weights."""
    assert not differ(train(tmp_path, *flags.split())["model"], base()["model"])


def test_the_ema_follows_its_flags(base, tmp_path):
    assert differ(train(tmp_path / "decay", "--model-ema-decay", "0.5")["model_ema"], base()["model_ema"])
    assert not differ(train(tmp_path / "cpu", "--model-ema-force-cpu")["model_ema"], base()["model_ema"])
    assert train(tmp_path / "none", "--no-model-ema")["model_ema"] is None
