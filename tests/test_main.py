"""The program from end to end: trained by its command line, scored, fine-tuned, and on real data."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from conftest import STUDENT, distil, run_main, tiny_run
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import builders
import datasets
import main
import samplers
from flags import key_values, parse_args

LOG_KEYS = {
    *("train_lr", "train_loss", "train_loss_base", "train_loss_fft", "train_loss_dist"),
    *("test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"),
}


def run(*flags):
    """Runs main in this process."""
    return main.main(parse_args(list(map(str, flags))))


def scores(text):
    """The accuracies, percent, and counts of right answers that a run printed."""
    return re.findall(r"Accuracy of the network on the (\d+) test images: ([\d.]+)% \((\d+) correct", text)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file):
    """A run of two processes: folder, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    flags = tiny_run(*distil(teacher_file), "--epochs", 2, "--num_workers", 1, "--output_dir", folder)
    done = run_main(*flags, "--gratings-sizes", 96, 49, "--batch-size", 8, processes=2)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_train_and_write_everything(distilled):
    folder, printed = distilled
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(set(line) >= LOG_KEYS for line in lines)
    for line in lines:
        terms = line["train_loss_base"] + line["train_loss_fft"] + line["train_loss_dist"]
        assert line["train_loss"] == pytest.approx(terms, rel=1e-5)
        assert min(line["train_loss_base"], line["train_loss_fft"], line["train_loss_dist"]) > 0
    assert "blocks.3 [24, 4, 4] <- blocks.5 [48, 4, 4]: teacher pooled to [24, 4, 4]" in printed
    assert re.search(r"Epoch: \[0\] +\[6/6\] +eta: .* lr: .* loss: .* loss_base: .* time: .* data: .* img/s: ", printed)
    best = torch.load(folder / "model_best.pth", weights_only=True)
    latest = torch.load(folder / "checkpoint.pth", weights_only=True)
    keys = {"model", "optimizer", "lr_scheduler", "epoch", "scaler", "model_ema", "max_accuracy", "args"}
    assert set(latest) >= keys
    assert set(best) >= keys
    assert latest["epoch"] == 1
    assert best["epoch"] == best["best_epoch"]
    assert best["max_accuracy"] == max(line["test_acc1"] for line in lines)
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["w_fft"] == 0.2
    assert arguments["world_size"] == 2


@pytest.mark.slow
def test_tensorboard_holds_every_number_of_the_log(distilled):
    folder, _ = distilled
    events = EventAccumulator(str(folder))
    events.Reload()
    last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    for name in ("train_loss", "train_loss_fft", "train_loss_dist", "train_lr", "test_acc1", "images_per_second"):
        scalars = events.Scalars(name.replace("_", "/", 1))
        assert [scalar.step for scalar in scalars] == [0, 1]
        assert scalars[-1].value == pytest.approx(last[name], rel=1e-6)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.slow
def test_eval_prints_the_accuracy_that_training_printed(distilled, processes):
    folder, printed = distilled
    flags = tiny_run("--gratings-sizes", 96, 49, "--eval", "--resume", folder / "checkpoint.pth")
    done = run_main(*flags, processes=processes)
    assert done.returncode == 0, done.stderr
    assert scores(done.stdout) == [scores(printed)[-1]]
    assert scores(printed)[-1][0] == "49"


@pytest.mark.slow
def test_eval_takes_the_training_command_as_it_was(distilled, teacher_file):
    folder, printed = distilled
    flags = tiny_run(*distil(teacher_file), "--gratings-sizes", 96, 49, "--eval", "--resume", folder / "checkpoint.pth")
    assert f"{run(*flags)['acc1']:.3f}" == scores(printed)[-1][1]


@pytest.mark.slow
def test_eval_ema_scores_the_moving_average(distilled):
    folder, _ = distilled
    flags = tiny_run("--gratings-sizes", 96, 49, "--eval", "--resume", folder / "checkpoint.pth")
    assert run(*flags, "--eval-ema")["loss"] != run(*flags)["loss"]


def test_the_copies_of_an_image_are_augmented_differently_on_two_processes():
    args = parse_args(tiny_run())
    batches = []
    for rank in range(2):
        dataset, _ = builders.build_datasets(args)
        order = samplers.RASampler(dataset, 2, rank)
        sampler = samplers.SeededSampler(order, args.seed, rank)
        seeded = datasets.SeededDataset(dataset)
        batches.append([(key[0], seeded[key][0]) for key in list(sampler)[:4]])
    copies = [(a, b) for i, a in batches[0] for j, b in batches[1] if i == j]
    assert copies
    assert not any(np.array_equal(a, b) for a, b in copies)


def test_a_dry_run_says_what_was_built_and_writes_nothing(teacher_file, tmp_path, capsys):
    run(*tiny_run(*distil(teacher_file), "--dry-run", "--output_dir", tmp_path / "run"))
    printed = capsys.readouterr().out
    assert "blocks.0 [24, 4, 4] <- blocks.0 [48, 4, 4]" in printed
    assert "loss_fft: " in printed
    assert re.search(r"dry run: \d+ MiB a process, [\d.]+ s a step", printed)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_finetune_replaces_a_head_of_another_class_count(distilled, tmp_path, capsys):
    folder, _ = distilled
    run(*tiny_run("--finetune", folder / "model_best.pth", "--num-classes", 30, "--output_dir", tmp_path, "--lr", 0))
    assert "the file's head has 24 classes, not 30" in capsys.readouterr().out
    before = torch.load(folder / "model_best.pth", weights_only=True)["model"]
    after = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    torch.testing.assert_close(after["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"], rtol=0, atol=1e-3)
    assert len(after["head.weight"]) == 30


@pytest.mark.slow
def test_a_distilled_student_learns_from_labels_on_one_head_and_the_teacher_on_the_other(teacher_file, tmp_path):
    flags = tiny_run(*distil(teacher_file), "--model", "deit_tiny_distilled_patch16_224", "--output_dir", tmp_path)
    run(*flags, "--distillation-type", "hard", "--lr", "0.01")
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    assert not torch.equal(weights["head.bias"], weights["head_dist.bias"])
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=24, **key_values(STUDENT)).eval()
    model.load_state_dict(weights)
    images = torch.rand(2, 3, 32, 32)
    features = model.forward_features(images)
    mean = (model.head(features[:, 0]) + model.head_dist(features[:, 1])) / 2
    torch.testing.assert_close(model(images), mean)


@pytest.mark.parametrize(
    ("student", "teacher", "ids"),
    [
        ("swin_tiny_patch4_window7_224 embed_dim=12 depths=(1,1,1,1) num_heads=(1,2,2,3) window_size=2",) * 2
        + ("0 1 2 3",),
        ("resnet18 channels=(8,8,8,16)", "deit_tiny_patch16_224 patch_size=8 embed_dim=24 depth=4 num_heads=3", "0 3"),
        (
            "deit3_small_patch16_224 patch_size=8 embed_dim=24 depth=4 num_heads=3",
            "cait_xxs24_224 patch_size=8 embed_dim=48 depth=4 num_heads=4",
            "0 3",
        ),
    ],
)
@pytest.mark.slow
def test_any_pair_of_families_trains(student, teacher, ids, tmp_path, capsys):
    flags = []
    for kind, (name, *kwargs) in (("", student.split()), ("teacher-", teacher.split())):
        name_flag, kwargs_flag = f"--{kind}model", "--teacher-kwargs" if kind else "--model-kwargs"
        torch.manual_seed(0)
        fixed = ["img_size=64"] if "resnet" not in name else []
        model = timm.create_model(name, num_classes=24, **key_values(kwargs + fixed))
        flags += [name_flag, name, kwargs_flag, *kwargs]
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    ids = ids.split()
    run(
        *tiny_run("--input-size", 64, *flags, "--teacher-path", tmp_path / "teacher.pth"),
        *("--distillation-type", "soft", "--s-id", *ids, "--t-id", *ids, "--gratings-sizes", 32, 8),
    )
    assert "Max accuracy" in capsys.readouterr().out


# Real data


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """scikit-learn's handwritten digits as JPEG files in ImageNet's layout; every fifth is for validation."""
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("digits")
    data = load_digits()
    for i, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        folder = root / ("val" if i % 5 == 0 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        image.convert("RGB").save(folder / f"{i}.jpg", quality=95)
    return root


@pytest.mark.slow
def test_a_teacher_and_a_spectral_student_learn_real_handwritten_digits(digits, tmp_path):
    common = ["--data-path", digits, "--input-size", 32, "--num_workers", 0, "--device", "cpu", "--batch-size", 16]
    common += ["--model", "resnet18", "--epochs", 4, "--warmup-epochs", 0, "--lr", 0.1, "--no-repeated-aug"]
    common += ["--aa", "none", "--color-jitter", 0, "--reprob", 0, "--no-model-ema"]
    wide, narrow = "channels=(16,16,32,32)", "channels=(8,8,16,16)"
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    run(*common, "--model-kwargs", wide, "--output_dir", teacher)
    run(
        *(*common, "--model-kwargs", narrow, "--output_dir", student, "--distillation-type", "soft"),
        *("--teacher-model", "resnet18", "--teacher-kwargs", wide, "--teacher-path", teacher / "model_best.pth"),
        *("--distillation-alpha", 0.9, "--w-fft", 0.2, "--s-id", 1, 2, 3, 4, "--t-id", 1, 2, 3, 4),
    )
    for folder in (teacher, student):
        best = torch.load(folder / "model_best.pth", weights_only=True)["max_accuracy"]
        assert best > 60, f"{folder.name}: {best} %, where chance is 10 %"
