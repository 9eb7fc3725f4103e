"""The original program's numbers: learning rates, a whole training run, and its checkpoint, in our own program."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import ModelEmaV3
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

import builders
import main
import models
import spectral
from checkpoint import TrainState
from engine import ConstantScaler, DivergenceWatch, evaluate, train_one_epoch
from flags import parse_args
from weights import load_checkpoint

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = GOLDEN / "reference_checkpoint.pth"
CPU = torch.device("cpu")


# Learning rates


@pytest.mark.parametrize("name", ["deit_tiny", "swin_tiny", "batch_2048"])
def test_every_epoch_has_the_learning_rate_of_the_original(name):
    case = json.loads((GOLDEN / "learning_rate.json").read_text())[name]
    flags = ["--data-set", "GRATINGS", *case["args"].split(), "--batch-size", str(case["global_batch"])]
    args = parse_args(flags)
    optimizer, scheduler, num_epochs = builders.build_optimizer(args, nn.Linear(2, 2), nn.Module())
    used = []
    for epoch in range(num_epochs):
        used.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch, 0.0)
    assert len(used) == len(case["lr_used_in_epoch"])
    assert used == pytest.approx(case["lr_used_in_epoch"], rel=1e-12, abs=0)


# The trajectory


@pytest.fixture(scope="module")
def golden():
    run = json.loads((GOLDEN / "trajectory.json").read_text())
    arrays = np.load(GOLDEN / "trajectory.npz")
    for part in ("student_init", "teacher"):
        weights = {key: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"{part}/")}
        run[f"{part}_weights"] = {key.split("/")[1]: value for key, value in weights.items()}
    run["batches"] = list(zip(torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]), strict=True))
    return run


def model_flags(run):
    pairs = [f"{key}={value}" for key, value in run["student_kwargs"].items()]
    return ["--model", run["student"], "--model-kwargs", *pairs, "--input-size", "64"]


def trajectory_flags(run):
    """The run's command line, from the arguments that the original stored; it stores the scaled learning rate."""
    asked = run["args"]
    flags = [*model_flags(run), "--teacher-model", run["teacher"], "--unscale-lr"]
    flags += ["--teacher-kwargs", *(f"{key}={value}" for key, value in run["teacher_kwargs"].items())]
    for name in ("s_id", "t_id"):
        flags += [f"--{name.replace('_', '-')}", *map(str, asked[name])]
    for name in (
        *("batch_size", "epochs", "w_fft", "distillation_type", "distillation_alpha", "distillation_tau"),
        *("distillation_beta", "drop", "drop_path", "model_ema_decay", "opt", "opt_eps", "momentum", "weight_decay"),
        *("sched", "lr", "warmup_lr", "min_lr", "warmup_epochs", "decay_epochs", "decay_rate", "smoothing"),
    ):
        flags += [f"--{name.replace('_', '-')}", str(asked[name])]
    return flags


class Recorder:
    """Return a criterion's terms and keep them."""

    def __init__(self, criterion):
        self.criterion, self.steps = criterion, []

    def __call__(self, *args):
        terms = self.criterion(*args)
        self.steps.append({name: value.item() for name, value in terms.items()})
        return terms


@pytest.fixture(scope="module")
def replay(golden):
    """Train on the run's images with what `main` builds, in the same order; return terms, statistics, final state."""
    args = parse_args(["--data-set", "GRATINGS", *trajectory_flags(golden)])
    model = builders.build_student(args, golden["num_classes"])
    models.load_weights(model, golden["student_init_weights"])
    ema = ModelEmaV3(model, args.model_ema_decay)
    teacher = builders.build_teacher(args, golden["teacher_weights"], list("abcdefghij"), CPU, model)
    hooks = spectral.FeatureHooks(model, builders.feature_ids(args, model, teacher.model)[0])
    criterion = Recorder(builders.build_criterion(args, model, teacher))
    optimizer, scheduler, num_epochs = builders.build_optimizer(args, model, nn.Module())
    common = {"device": CPU, "prepare": nn.Identity()}  # the images are stored as the models see them
    state, epochs = TrainState(model, optimizer, scheduler, ConstantScaler("cpu"), ema, main.TERMS), []
    for epoch in range(num_epochs):
        train_one_epoch(state, golden["batches"], criterion, hooks, watch=DivergenceWatch(), **common)
        train = {"lr": optimizer.param_groups[0]["lr"], **state.meter.averages()}
        test = evaluate(model, golden["batches"], **common)
        scheduler.step(epoch)
        state.finish_epoch(test["acc1"])
        epochs.append({"train": train, "test": test})
    return {"steps": criterion.steps, "epochs": epochs, "model": model, "ema": ema.module}


def test_every_step_has_the_terms_of_the_original(golden, replay):
    assert len(replay["steps"]) == len(golden["steps"]) == 12
    for step, (got, wanted) in enumerate(zip(replay["steps"], golden["steps"], strict=True)):
        wanted = {"loss" if name == "total" else f"loss_{name}": value for name, value in wanted.items()}
        assert got == pytest.approx(wanted, rel=5e-6), f"step {step}"


def test_every_epoch_has_the_statistics_of_the_original(golden, replay):
    assert len(replay["epochs"]) == len(golden["epochs"]) == 3
    for got, wanted in zip(replay["epochs"], golden["epochs"], strict=True):
        assert got["train"] == pytest.approx(wanted["train"], rel=2e-6)
        assert {name: got["test"][name] for name in wanted["test"]} == pytest.approx(wanted["test"], rel=2e-6)


@pytest.mark.parametrize(("kept", "key"), [("model", "model"), ("ema", "model_ema")])
def test_the_run_ends_with_the_weights_and_the_moving_average_of_the_original(golden, replay, kept, key):
    wanted, start = load_reference()[key], golden["student_init_weights"]
    for name, got in replay[kept].state_dict().items():
        moved = (wanted[name] - start[name]).abs().max()
        assert moved > 1e-3, name
        if name.endswith("qkv.bias"):
            # The softmax does not feel the bias of the keys: its gradient is rounding, which AdamW makes a step of.
            (got, got_key), (want, want_key) = ((torch.cat([x[:24], x[48:]]), x[24:48]) for x in (got, wanted[name]))
            torch.testing.assert_close(got_key, want_key, rtol=0, atol=5e-5, msg=name)
        else:
            want = wanted[name]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=name)


# The checkpoint


def load_reference():
    return load_checkpoint(REFERENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise images of ten classes in ImageNet's layout: per class three for training and two for validation."""
    root = tmp_path_factory.mktemp("imnet")
    generator = np.random.default_rng(0)
    for split, number in (("train", 3), ("val", 2)):
        for label in range(10):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((80, 100)).save(place / f"{i}.png")
    return root


@pytest.fixture
def run(golden, folder):
    """Run the program in this process on the folder, with more flags."""

    def run(*flags, data=folder):
        common = ["--data-path", str(data), "--batch-size", "4", "--num_workers", "0", "--device", "cpu"]
        return main.main(parse_args([*model_flags(golden), *common, *map(str, flags)]))

    return run


def score_by_hand(golden, folder, weights):
    """Return loss and accuracy in percent, computed with timm and torchvision alone."""
    model = timm.create_model(golden["student"], num_classes=10, **golden["student_kwargs"]).eval()
    model.load_state_dict(weights)
    normalise = transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    resize = transforms.Resize(int(64 / 0.875), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, transforms.CenterCrop(64), transforms.ToTensor(), normalise])
    images, labels = zip(*ImageFolder(folder / "val", transform), strict=True)
    labels = torch.tensor(labels)
    with torch.no_grad():
        logits = model(torch.stack(images))
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    return {"loss": loss, "correct1": (logits.argmax(1) == labels).sum().item(), "images": 20}


@pytest.mark.parametrize(("flags", "key"), [([], "model"), (["--eval-ema"], "model_ema")])
@pytest.mark.slow
def test_the_checkpoint_of_the_original_evaluates(golden, folder, run, flags, key):
    stats = run("--eval", "--resume", REFERENCE, *flags)
    wanted = score_by_hand(golden, folder, load_reference()[key])
    assert {name: stats[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_the_checkpoint_of_the_original_restores_weights_average_and_optimizer(golden):
    args = parse_args(["--data-set", "GRATINGS", "--batch-size", "4", *model_flags(golden)])
    model = builders.build_student(args, 10)
    ema = ModelEmaV3(model, args.model_ema_decay)
    optimizer, scheduler, _ = builders.build_optimizer(args, model, nn.Module())
    state = TrainState(model, optimizer, scheduler, ConstantScaler("cpu"), ema, main.TERMS)
    reference = load_reference()
    state.load(reference, args)
    assert (state.epoch, state.step) == (reference["epoch"] + 1, 0)
    for got, key in ((model, "model"), (ema.module, "model_ema")):
        torch.testing.assert_close(dict(got.state_dict()), dict(reference[key]), rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], reference["optimizer"]["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_the_checkpoint_of_the_original_resumes(run, tmp_path):
    run("--resume", REFERENCE, "--epochs", 5, "--output_dir", tmp_path, "--warmup-epochs", 1, "--lr", 0.1)
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [3, 4]
    # Its third epoch is the one just finished when our first begins: the cosine at 2 of 5 epochs.
    peak, lowest = 0.1 * 4 / 512, 1e-5
    expected = [lowest + (peak - lowest) * (1 + math.cos(math.pi * done / 5)) / 2 for done in (2, 3)]
    assert [line["train_lr"] for line in log] == pytest.approx(expected, rel=1e-6)
    written = load_checkpoint(tmp_path / "checkpoint.pth")
    assert {int(state["step"]) for state in written["optimizer"]["state"].values()} == {12 + 2 * 7}
    assert written["epoch"] == 4


@pytest.mark.slow
def test_the_checkpoint_of_the_original_fine_tunes(golden, folder, run, tmp_path):
    stats = run("--eval", "--finetune", REFERENCE)
    assert stats["loss"] == pytest.approx(score_by_hand(golden, folder, load_reference()["model"])["loss"], rel=1e-5)
    run("--finetune", REFERENCE, "--epochs", 1, "--output_dir", tmp_path, "--warmup-epochs", 0, "--lr", 0.1)
    written = load_checkpoint(tmp_path / "checkpoint.pth")
    assert {int(state["step"]) for state in written["optimizer"]["state"].values()} == {7}
    difference = (written["model"]["head.weight"] - load_reference()["model"]["head.weight"]).abs().max()
    assert 0 < difference < 8 * 0.1 * 4 / 512  # seven steps of at most the learning rate


@pytest.mark.slow
def test_the_checkpoint_of_the_original_fine_tunes_to_other_classes(folder, run, tmp_path, capsys):
    few = tmp_path / "few"
    for split in ("train", "val"):
        (few / split).mkdir(parents=True)
        for label in range(3):
            (few / split / f"class{label}").symlink_to(folder / split / f"class{label}")
    output = tmp_path / "output"
    run("--finetune", REFERENCE, "--epochs", 1, "--output_dir", output, "--batch-size", 3, data=few)
    assert "the file's head has 10 classes, not 3" in capsys.readouterr().out
    assert load_checkpoint(output / "checkpoint.pth")["model"]["head.weight"].shape == (3, 24)
