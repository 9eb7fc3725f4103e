"""The program from end to end: trained from its command line, evaluated, fine-tuned, and on real data."""

import json
import re

import pytest
import timm
import torch
from conftest import STUDENT, distil, run_main, tiny_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from flags import key_values, parse_args

pytestmark = pytest.mark.slow
LOG_KEYS = {
    *("train_lr", "train_loss", "train_loss_base", "train_loss_fft", "train_loss_dist"),
    *("test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"),
}
CHECKPOINT_KEYS = {"model", "optimizer", "lr_scheduler", "epoch", "scaler", "model_ema", "max_accuracy", "args"}


def run(*flags):
    """Run main in this process."""
    return main.main(parse_args(list(map(str, flags))))


def load(path):
    return torch.load(path, weights_only=True)


def scores(text):
    """Return (images, accuracy in percent, correct) of each evaluation in an output."""
    return re.findall(r"Accuracy of the network on the (\d+) test images: ([\d.]+)% \((\d+) correct", text)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file):
    """A run of two processes: its folder and output."""
    folder = tmp_path_factory.mktemp("run")
    flags = tiny_run(*distil(teacher_file), "--epochs", 2, "--num_workers", 1, "--output_dir", folder)
    done = run_main(*flags, "--gratings-sizes", 96, 49, "--batch-size", 8, processes=2)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def lines(distilled):
    """The lines of the run's log.txt."""
    return [json.loads(line) for line in (distilled[0] / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluation(distilled):
    """Flags that evaluate the run."""
    return tiny_run("--gratings-sizes", 96, 49, "--eval", "--resume", distilled[0] / "checkpoint.pth")


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
    arguments = json.loads((distilled[0] / "args.json").read_text())
    assert (arguments["w_fft"], arguments["world_size"]) == (0.2, 2)


def test_tensorboard_holds_every_number_of_the_log(distilled, lines):
    events = EventAccumulator(str(distilled[0]))
    events.Reload()
    for name in set(lines[-1]) - {"epoch"}:
        scalars = events.Scalars(name.replace("_", "/", 1))
        assert [scalar.step for scalar in scalars] == [0, 1]
        assert scalars[-1].value == pytest.approx(lines[-1][name], rel=1e-6)


@pytest.mark.parametrize("processes", [0, 2])
def test_eval_prints_the_accuracy_of_training(distilled, evaluation, processes):
    done = run_main(*evaluation, processes=processes)
    assert done.returncode == 0, done.stderr
    assert scores(done.stdout) == [scores(distilled[1])[-1]]
    assert scores(done.stdout)[0][0] == "49"


@pytest.mark.parametrize("whole", [False, True])
def test_eval_takes_the_whole_training_command_or_none(whole, distilled, evaluation, teacher_file):
    """Model and data are those of the checkpoint."""
    short = ["--eval", "--resume", distilled[0] / "checkpoint.pth", "--device", "cpu", "--num_workers", 0]
    stats = run(*distil(teacher_file), *evaluation) if whole else run(*short)
    assert f"{stats['acc1']:.3f}" == scores(distilled[1])[-1][1]


def test_eval_ema_evaluates_the_ema(evaluation):
    assert run(*evaluation, "--eval-ema")["loss"] != run(*evaluation)["loss"]


def test_a_dry_run_reports_its_cost_and_writes_nothing(teacher_file, tmp_path, capsys):
    run(*tiny_run(*distil(teacher_file), "--dry-run", "--output_dir", tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "blocks.0 [24, 4, 4] <- teacher blocks.0 [48, 4, 4]" in printed
    assert "loss_fft: " in printed
    assert re.search(r"dry run: \d+ MiB per process, [\d.]+ s per step", printed)
    assert not (tmp_path / "run").exists()


def test_two_heads_learn_from_labels_and_teacher(teacher_file, tmp_path):
    """A distilled DeiT trains its heads apart and evaluates their mean."""
    name = "deit_tiny_distilled_patch16_224"
    flags = tiny_run(*distil(teacher_file), "--model", name, "--output_dir", tmp_path)
    run(*flags, "--distillation-type", "hard", "--lr", "0.01")
    weights = load(tmp_path / "checkpoint.pth")["model"]
    assert not torch.equal(weights["head.bias"], weights["head_dist.bias"])
    model = timm.create_model(name, num_classes=24, **key_values(STUDENT)).eval()
    model.load_state_dict(weights)
    images = torch.rand(2, 3, 32, 32)
    features = model.forward_features(images)
    mean = (model.head(features[:, 0]) + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(model(images), mean)


def test_a_float32_student_learns_from_a_float16_teacher(teacher_file, tmp_path):
    run(*tiny_run(*distil(teacher_file, "--teacher-dtype", "float16"), "--output_dir", tmp_path))
    terms = json.loads((tmp_path / "log.txt").read_text())
    assert terms["train_loss_fft"] > 0
    assert terms["train_loss_dist"] > 0
