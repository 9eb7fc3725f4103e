"""Repeating runs, model cards, Weights & Biases, and models of the user."""

import json
import re
import shlex
import signal

import pytest
import torch
from conftest import ROOT, distil, tiny_run
from families import build, mae_file
from processes import finish, strike

import analyze
import main
import utils
from datasets import build_dataset
from flags import complete_args, parse_args, to_arg_lines
from utils import UserError

ANALYZE = ["--device", "cpu", "--num_workers", "0", "--num-images", "4"]


def run(*flags):
    """Run main in this process."""
    return main.main(parse_args(list(map(str, flags))))


# run.args

FLAGS = [
    "--w-fft 0.05 --s-id 0 1 --t-id 2 3 --distillation-type soft --teacher-path {file}",
    "--no-model-ema --no-repeated-aug --ThreeAugment --cutmix-minmax 0.2 0.8 --opt-betas 0.9 0.95",
    "--model-kwargs window_size=(7,7) act_layer=gelu scale=1e-05 flag=True name=\"'3'\" none=None",
    "--output_dir 'a folder # with signs' --aa rand-m9-mstd0.5-inc1 --seed 7 --warmup-epochs 0",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_run_args_reads_back_as_the_same_flags(flags, tmp_path, teacher_file):
    args = parse_args(["--data-set", "GRATINGS", *shlex.split(flags.format(file=teacher_file))])
    (tmp_path / "run.args").write_text("\n".join(to_arg_lines(args)))
    assert vars(parse_args([f"@{tmp_path / 'run.args'}"])) == vars(args)


KEPT = [
    ("--overwrite", ""),
    ("--resume auto", "--resume auto"),
    ("--resume {folder}/checkpoint.pth --start_epoch 2", ""),
    ("--resume {teacher}", "--resume {teacher}"),
]


@pytest.mark.parametrize(("flags", "kept"), KEPT)
def test_run_args_starts_no_run_over_and_continues_none(flags, kept, tmp_path, teacher_file):
    (tmp_path / "checkpoint.pth").touch()
    flags, kept = (text.format(folder=tmp_path, teacher=teacher_file) for text in (flags, kept))
    args = parse_args([*tiny_run(), "--output_dir", str(tmp_path), *flags.split()])
    assert [line for line in to_arg_lines(args) if re.match("--(overwrite|resume|start)", line)] == [kept] * bool(kept)


# What a checkpoint tells


def test_a_checkpoint_fills_in_what_is_not_given(tmp_path):
    stored = {"model": "resnet18", "model_kwargs": {"channels": (8, 8, 16, 16)}, "num_classes": 9, "input_size": 64}
    stored |= {"eval_crop_ratio": 0.9, "data_set": "CIFAR", "data_path": str(tmp_path), "lr": 1.0}
    (tmp_path / "file").touch()
    args = parse_args(["--resume", str(tmp_path / "file"), "--input-size", "96"])
    found = vars(complete_args(args, stored))
    assert {name: found[name] for name in stored} == stored | {"input_size": 96, "lr": args.lr}


# The model card of a distilled run


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file):
    """The folders of a distilled run of two epochs and of its export."""
    root = tmp_path_factory.mktemp("card")
    run(*tiny_run(*distil(teacher_file), "--epochs", 2, "--output_dir", root / "run", "--no-model-ema"))
    run("--export", root / "model", "--resume", root / "run" / "checkpoint.pth", "--device", "cpu")
    return root / "run", root / "model"


@pytest.mark.slow
def test_the_run_of_run_args_has_the_same_weights(distilled, tmp_path):
    run(f"@{distilled[0] / 'run.args'}", "--output_dir", tmp_path / "again")
    folders = distilled[0], tmp_path / "again"
    first, again = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in folders)
    torch.testing.assert_close(again["model"], first["model"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint.pth", "model_best.pth"])
def test_every_checkpoint_of_a_run_names_its_classes(name, distilled):
    classes = build_dataset("GRATINGS", "val", None).classes
    assert torch.load(distilled[0] / name, weights_only=True)["classes"] == classes


@pytest.mark.slow
def test_a_resumed_file_needs_no_model(distilled, tmp_path):
    flags = ["--resume", distilled[0] / "checkpoint.pth", "--epochs", 3, "--batch-size", 16, "--warmup-epochs", 0]
    run(*flags, "--device", "cpu", "--num_workers", 0, "--output_dir", tmp_path)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [2]


@pytest.mark.slow
def test_the_card_of_a_distilled_run_repeats_it(distilled):
    folder, exported = distilled
    card = (exported / "README.md").read_text()
    line = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    assert f"**Accuracy:** top-1 {line['test_acc1']:.2f}%, top-5 {line['test_acc5']:.2f}% on GRATINGS, epoch 1" in card
    assert "**Teacher:** cait_s24_224 (soft distillation; blocks 0 <- 0, 1 <- 1, 3 <- 5)" in card
    command = shlex.split(re.search(r"\*\*Command line:\*\* `(.*)`", card)[1])
    assert command[:2] == ["python", "main.py"]
    assert vars(parse_args(command[2:])) == vars(parse_args([f"@{folder / 'run.args'}"]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--eval", "--export model"])
def test_the_newest_checkpoint_needs_no_name(mode, distilled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*mode.split(), "--resume", "auto", "--output_dir", distilled[0], "--device", "cpu", "--num_workers", 0)
    assert mode == "--eval" or (tmp_path / "model" / "README.md").read_text().count("Accuracy") == 1


def test_a_checkpoint_of_an_older_version_tells_its_model(tmp_path):
    """Before version 0.2 the arguments of a model were stored as text."""
    args = {"model": "vit_tiny_patch16_224", "model_kwargs": ["depth=2", "embed_dim=24", "num_heads=3"]}
    torch.save({"model": build("vit_tiny_patch16_224").state_dict(), "args": args}, tmp_path / "old.pth")
    run("--export", tmp_path / "model", "--resume", tmp_path / "old.pth", "--input-size", 64)
    assert json.loads((tmp_path / "model/config.json").read_text())["model_args"]["depth"] == 2
    words = ["--checkpoint", str(tmp_path / "old.pth"), "--input-size", "64", "--data-set", "GRATINGS", *ANALYZE]
    analyze.main(analyze.get_args_parser().parse_args(words))


# Fine-tuning


def test_finetune_takes_a_self_supervised_file(tmp_path, capsys):
    torch.save({"model": mae_file(build("vit_tiny_patch16_224", input_size=32))}, tmp_path / "mae.pth")
    kwargs = ["--model-kwargs", "embed_dim=24", "depth=2", "num_heads=3"]
    run(*tiny_run("--model", "vit_tiny_patch16_224", *kwargs, "--finetune", tmp_path / "mae.pth", "--dry-run"))
    note = "the file has no head; a fresh head is trained; left out of the file: decoder_blocks, decoder_pos_embed"
    assert f"--finetune: {note}, mask_token\n" in capsys.readouterr().out


# Weights & Biases

STAND_IN = """
import json
def note(*what):
    with open({path!r}, "a") as file:
        print(json.dumps(what), file=file)
class Run:
    def log(self, stats, step):
        note("log", step, stats["test_acc1"])
    def finish(self, exit_code=0):
        note("finish", exit_code)
def init(**options):
    options.pop("config")
    note("init", options)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path):
    """Statements that put a stand-in for wandb first on Python's path, and a function that reads its calls."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STAND_IN.format(path=str(tmp_path / "calls")))
    before = f"import sys; sys.path.insert(0, {str(tmp_path / 'modules')!r})"
    return before, lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.slow
def test_wandb_ends_with_a_stopped_run_and_resumes_it(wandb, tmp_path):
    """A run that starts again has a new id."""
    before, calls = wandb
    flags = tiny_run("--epochs", 2, "--output_dir", tmp_path / "out", "--wandb", "project")
    finish(128 + signal.SIGTERM, *flags, before=f"{before}\n{strike(signal.SIGTERM, step=6)}")
    finish(0, *flags, "--resume", "auto", before=before)
    finish(0, *flags, "--epochs", 1, "--overwrite", before=before)
    first, second, third = calls()[:3], calls()[3:6], calls()[6:]
    (_, options), (_, again) = first[0], third[0]
    assert [call[:2] for call in first[1:]] == [["log", 0], ["finish", 1]]
    assert [call[:2] for call in second] == [first[0], ["log", 1], ["finish", 0]]
    assert [options[name] for name in ("project", "name", "resume")] == ["project", "out", "allow"]
    assert options["id"] != again["id"]


def test_a_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"^--wandb needs wandb \(pip install wandb\)"):
        utils.RunLog(tmp_path, {}, wandb_project="project")


# The user's own loop and models


def test_the_snippet_of_the_readme_runs(monkeypatch):
    """It runs with narrower models of the same depth and without the download."""
    import timm

    create = timm.create_model
    narrow = {"embed_dim": 24, "num_heads": 2}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False: create(name, **narrow))
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(snippet, names)
    assert names["loss"].item() > 0
    names["loss"].backward()
    assert names["student"].blocks[11].mlp.fc2.weight.grad.abs().sum() > 0
    assert names["teacher"].blocks[23].mlp.fc2.weight.grad is None


MY_MODELS = """
import torchvision
from timm.models import register_model

@register_model
def my_resnet18(pretrained=False, num_classes=1000, **kwargs):
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.feature_info = [dict(module=f"layer{i + 1}", num_chs=64 * 2**i, reduction=4 * 2**i) for i in range(4)]
    return model
"""


@pytest.mark.slow
def test_a_model_of_the_users_module_is_distilled(teacher_file, tmp_path, monkeypatch, capsys):
    """It is trained, evaluated from its checkpoint and analyzed."""
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    monkeypatch.chdir(tmp_path)
    own = ["--import", "my_models"]
    flags = tiny_run("--model", "my_resnet18", "--model-kwargs", "--no-model-ema", *distil(teacher_file), *own)
    run(*flags, "--s-id", 0, 3, "--t-id", 0, 5, "--output_dir", tmp_path / "out")
    assert "layer4 [512, 1, 1] <- teacher blocks.5 [48, 4, 4]" in capsys.readouterr().out
    stats = run("--eval", "--resume", tmp_path / "out/checkpoint.pth", *own, "--device", "cpu", "--num_workers", 0)
    line = json.loads((tmp_path / "out/log.txt").read_text())
    assert stats["acc1"] == pytest.approx(line["test_acc1"])
    words = ["--checkpoint", str(tmp_path / "out"), *own, *ANALYZE]
    analyze.main(analyze.get_args_parser().parse_args(words))
    assert "my_resnet18" in capsys.readouterr().out


def test_a_missing_module_of_models_is_one_line():
    with pytest.raises(UserError, match=r"^--import no_such_module: No module named 'no_such_module'$"):
        run(*tiny_run("--import", "no_such_module"))


# Defaults made for ImageNet


def test_an_ema_too_slow_for_the_run_is_a_warning(capsys):
    run(*tiny_run("--epochs", 5, "--dry-run"))  # of 4 steps each
    assert "an EMA decay of 0.99996 is too slow for 20 steps: try --model-ema-decay 0.5" in capsys.readouterr().out
