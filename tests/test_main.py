"""The program from end to end: trained from its command line, evaluated, fine-tuned, and on real data."""

import json
import re

import pytest
import torch
from conftest import distil, run, tiny_run
from processes import finish
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import build_dataset

pytestmark = pytest.mark.slow
LOG_KEYS = {
    *("train_lr", "train_loss", "train_loss_base", "train_loss_fft", "train_loss_dist"),
    *("test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"),
}
CHECKPOINT_KEYS = {"model", "optimizer", "lr_scheduler", "epoch", "scaler", "model_ema", "max_accuracy", "args"}
SIZES = ["--gratings-sizes", 96, 49]


def load(path):
    return torch.load(path, weights_only=True)


def scores(text):
    """Return (images, accuracy in percent, correct) of each evaluation in an output."""
    return re.findall(r"Accuracy of the network on the (\d+) test images: ([\d.]+)% \((\d+) correct", text)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file):
    """A run of two processes: its folder and output."""
    folder = tmp_path_factory.mktemp("run")
    flags = tiny_run(*distil(teacher_file), "--epochs", 2, "--num_workers", 1, "--output_dir", folder, *SIZES)
    return folder, finish(0, *flags, "--batch-size", 8, ranks=2)[0].text


@pytest.fixture(scope="module")
def lines(distilled):
    """The lines of the run's log.txt."""
    return [json.loads(line) for line in (distilled[0] / "log.txt").read_text().splitlines()]


def test_log_holds_deits_keys_and_the_terms_of_the_loss(lines):
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert set(line) >= LOG_KEYS
        terms = [line[f"train_loss_{name}"] for name in ("base", "fft", "dist")]
        assert min(terms) > 0
        assert line["train_loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_output_shows_the_pairs_and_the_progress(distilled):
    assert "blocks.3 [24, 4, 4] <- teacher blocks.5 [48, 4, 4]: teacher pooled to [24, 4, 4]" in distilled[1]
    assert re.search(r"Epoch: \[0\] +\[6/6\] +eta: .* loss_dist: ", distilled[1])


def test_checkpoints_hold_deits_keys_and_the_best_epoch(distilled, lines):
    best, latest = (load(distilled[0] / name) for name in ("model_best.pth", "checkpoint.pth"))
    assert set(best) & set(latest) >= CHECKPOINT_KEYS
    assert latest["epoch"] == 1
    assert best["epoch"] == best["best_epoch"]
    assert best["max_accuracy"] == max(line["test_acc1"] for line in lines)
    assert best["classes"] == latest["classes"] == build_dataset("GRATINGS", "val", None).classes
    arguments = json.loads((distilled[0] / "args.json").read_text())
    assert (arguments["w_fft"], arguments["world_size"]) == (0.2, 2)


def test_tensorboard_holds_every_number_of_the_log(distilled, lines):
    events = EventAccumulator(str(distilled[0]))
    events.Reload()
    for name in set(lines[-1]) - {"epoch"}:
        scalars = events.Scalars(name.replace("_", "/", 1))
        assert [scalar.step for scalar in scalars] == [0, 1]
        assert scalars[-1].value == pytest.approx(lines[-1][name], rel=1e-6)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_eval_prints_the_accuracy_of_training(distilled, teacher_file, whole, ranks):
    """With the whole training command, or with model and data of the checkpoint, which it finds in the folder."""
    flags = ["--eval", "--device", "cpu", "--num_workers", 0, "--resume", "auto", "--output_dir", distilled[0]]
    flags = tiny_run(*distil(teacher_file), *SIZES, *flags) if whole else flags
    runs = finish(0, *flags, ranks=ranks)
    found = scores((runs if ranks == 1 else runs[0]).text)
    assert found == [scores(distilled[1])[-1]]
    assert found[0][0] == "49"


def test_eval_ema_evaluates_the_ema(distilled):
    flags = ["--eval", "--device", "cpu", "--num_workers", 0, "--resume", distilled[0] / "checkpoint.pth"]
    assert run(*flags, "--eval-ema")["loss"] != run(*flags)["loss"]


def test_a_dry_run_reports_its_cost_and_writes_nothing(teacher_file, tmp_path, capsys):
    run(*tiny_run(*distil(teacher_file), "--dry-run", "--output_dir", tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "blocks.0 [24, 4, 4] <- teacher blocks.0 [48, 4, 4]" in printed
    assert "loss_fft: " in printed
    assert re.search(r"dry run: \d+ MiB per process, [\d.]+ s per step", printed)
    assert not (tmp_path / "run").exists()


def test_two_heads_learn_from_labels_and_teacher(teacher_file, tmp_path):
    flags = tiny_run(*distil(teacher_file), "--model", "deit_tiny_distilled_patch16_224", "--output_dir", tmp_path)
    run(*flags, "--distillation-type", "hard", "--lr", "0.01")
    weights = load(tmp_path / "checkpoint.pth")["model"]
    assert not torch.equal(weights["head.bias"], weights["head_dist.bias"])
