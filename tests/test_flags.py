"""No flag is ignored: a run with another value of it trains other weights than the run without.

The runs are of seconds, so this says that a flag is heard, not that it does the right thing; the tests of the module
that it ends in say that.
"""

import pytest
import timm
import torch
from conftest import distil, tiny_run

import builders
import main
import utils
from flags import parse_args

BASE = ("--epochs", "3", "--warmup-epochs", "1", "--batch-size", "8", "--gratings-sizes", "32", "8", "--lr", "0.05")

# A flag with its value, and what has to be there for it to matter. Both runs have the latter.
SIZE_64 = "--input-size 64 --model-kwargs img_size=64 patch_size=16 embed_dim=24 depth=4 num_heads=3"
STEP = "--sched step --decay-epochs 1 --warmup-epochs 0"

# Flags with values, and flags that both runs need for them to matter.
TRAINING = [
    ("--batch-size 16", ""),
    ("--epochs 4", ""),
    (SIZE_64, ""),
    ("--no-repeated-aug", ""),
    ("--seed 1", ""),
    ("--model-kwargs img_size=32 patch_size=8 embed_dim=24 depth=4 num_heads=6", ""),
    ("--drop 0.5", ""),
    ("--drop-path 0.5", ""),
    ("--no-train-mode", "--drop 0.5"),
    ("--attn-only", ""),
    ("--accum-steps 2", ""),
    ("--amp-dtype bfloat16", ""),
    ("--bce-loss", "--smoothing 0"),
    ("--smoothing 0.3", ""),
    ("--opt sgd", ""),
    ("--opt-eps 0.1", ""),
    ("--opt-betas 0.5 0.9", ""),
    ("--momentum 0.1", "--opt sgd"),
    ("--clip-grad 0.001", "--opt sgd"),
    ("--weight-decay 0.5", ""),
    ("--lr 0.1", ""),
    ("--unscale-lr", ""),
    (STEP, "--warmup-epochs 0"),
    ("--decay-epochs 2", STEP),
    ("--decay-rate 0.5", STEP),
    ("--lr-noise 0.0 1.0", "--warmup-epochs 0"),
    ("--lr-noise-pct 0.1", "--lr-noise 0.0 1.0 --warmup-epochs 0"),
    ("--warmup-lr 0.001", ""),
    ("--warmup-epochs 0", ""),
    ("--min-lr 0.001", ""),
    ("--cooldown-epochs 1", ""),
    ("--color-jitter 0", "--aa none"),
    ("--aa none", ""),
    ("--train-interpolation bilinear", SIZE_64),
    ("--ThreeAugment", ""),
    ("--src", SIZE_64),
    ("--reprob 0", ""),
    ("--remode const", "--reprob 1"),
    ("--recount 4", "--reprob 1"),
    ("--mixup 0.8", ""),
    ("--cutmix 1.0", ""),
    ("--cutmix-minmax 0.2 0.8", ""),
    ("--mixup-prob 0.5", "--mixup 0.8"),
    ("--mixup-switch-prob 1.0", "--mixup 0.8 --cutmix 1.0"),
    ("--mixup-mode elem", "--mixup 0.8"),
    ("--num-classes 30", ""),
]
DISTILLING = [
    "--distillation-type hard",
    "--distillation-type fft",
    "--distillation-alpha 0.1",
    "--distillation-beta 3",
    "--distillation-tau 3",
    "--w-fft 2",
    "--s-id 3 1 0",
    "--t-id 5 1 0",
    "--s-id 0 1 1",
    "--feature-loss mse",
    "--spectral-impl fft",  # by rounding
]


def trained(folder, *flags):
    """The checkpoint that a run leaves."""
    main.main(parse_args(tiny_run(*BASE, "--output_dir", str(folder), *flags)))
    return torch.load(folder / "checkpoint.pth", weights_only=True)


def differ(one, other):
    return any(one[key].shape != other[key].shape or not torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Runs each set of common flags once."""
    runs = {}

    def run(*common):
        if common not in runs:
            runs[common] = trained(tmp_path_factory.mktemp("base"), *common)
        return runs[common]

    return run


@pytest.mark.parametrize(("flags", "common"), TRAINING)
@pytest.mark.slow
def test_a_training_flag_changes_the_weights(flags, common, base, tmp_path):
    common = common.split()
    assert differ(trained(tmp_path, *common, *flags.split())["model"], base(*common)["model"])


@pytest.mark.parametrize(("flags", "common"), DISTILLING)
@pytest.mark.slow
def test_a_distillation_flag_changes_the_weights(flags, common, base, tmp_path, teacher_file):
    common = [*distil(teacher_file), *common.split()]
    assert differ(trained(tmp_path, *common, *flags.split())["model"], base(*common)["model"])


@pytest.mark.slow
def test_the_same_flags_give_the_same_weights(base, tmp_path):
    assert not differ(trained(tmp_path)["model"], base()["model"])


@pytest.mark.parametrize("flags", ["--num_workers 2 --loader-timeout 60", "--eval-ema", "--spectra-every 1"])
@pytest.mark.slow
def test_a_flag_of_the_machinery_leaves_the_weights_alone(flags, base, tmp_path):
    assert not differ(trained(tmp_path, *flags.split())["model"], base()["model"])


@pytest.mark.slow
def test_the_moving_average_follows_its_decay_and_can_be_left_out(base, tmp_path):
    assert differ(trained(tmp_path / "decay", "--model-ema-decay", "0.5")["model_ema"], base()["model_ema"])
    assert not differ(trained(tmp_path / "cpu", "--model-ema-force-cpu")["model_ema"], base()["model_ema"])
    assert trained(tmp_path / "none", "--no-model-ema")["model_ema"] is None


def test_milestones_are_kept(tmp_path):
    trained(tmp_path, "--save-every", "2")
    assert [path.name for path in tmp_path.glob("checkpoint_0*")] == ["checkpoint_0001.pth"]


def test_noise_of_the_learning_rate_begins_at_its_part_of_the_epochs():
    args = parse_args(tiny_run("--epochs", "20", "--lr-noise", "0.5"))
    _, scheduler, _ = builders.build_optimizer(args, torch.nn.Linear(1, 1), torch.nn.Module())
    assert scheduler.noise_range_t == 10


def test_plateau_without_a_warm_up_begins_and_goes_on_at_the_full_rate():
    args = parse_args(tiny_run("--epochs", "4", "--sched", "plateau", "--lr", "0.5"))
    optimizer, scheduler, _ = builders.build_optimizer(args, torch.nn.Linear(1, 1), torch.nn.Module())
    rates = []
    for epoch in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch, 10.0 + epoch)
    assert rates == [0.5 * 16 / 512] * 3


@pytest.mark.slow
def test_the_deviation_of_the_noise_is_heard_or_refused(base, tmp_path):
    """timm 1.0.11 takes it and never reads it."""
    common = ["--lr-noise", "0.0", "1.0", "--warmup-epochs", "0"]
    if timm.__version__ == "1.0.11":
        with pytest.raises(utils.UserError, match="--lr-noise-std has no effect without a later timm"):
            trained(tmp_path, *common, "--lr-noise-std", "0.1")
    else:
        assert differ(trained(tmp_path, *common, "--lr-noise-std", "0.1")["model"], base(*common)["model"])
