"""A run can be repeated, described and shared: run.args, checkpoints, exported models, Weights & Biases."""

import json
import re
import shlex
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import STUDENT, distil, run, tiny_run
from families import FAMILIES, assert_same_function, build

import models
import utils
from export import card_facts, export_model
from flags import complete_args, key_values, parse_args, to_arg_lines
from model_names import CONFIG_READERS

KWARGS = key_values(STUDENT)
DEIT = "deit_tiny_patch16_224"
ON_CPU = ["--device", "cpu", "--num_workers", "0"]
has_local_dir = pytest.mark.skipif("local-dir" not in CONFIG_READERS, reason="old timm")


def export(checkpoint, folder, *more):
    run(*tiny_run("--export", folder, "--resume", checkpoint, *more))
    return folder / "model.safetensors"


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
    old = {"model_kwargs": ["channels=(8,8,16,16)"]}  # version 0.1 stored text
    for kwargs in ({}, old):
        found = vars(complete_args(args, stored | kwargs))
        assert {name: found[name] for name in stored} == stored | {"input_size": 96, "lr": args.lr}
    with pytest.raises(utils.UserError, match="--data-path gone is not a folder"):
        complete_args(args, stored | {"data_path": "gone"})


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file):
    """The folders of a distilled run of two epochs and of its export, which names neither file nor model."""
    root = tmp_path_factory.mktemp("card")
    run(*tiny_run(*distil(teacher_file), "--epochs", 2, "--output_dir", root / "run", "--no-model-ema"))
    run("--export", root / "model", "--resume", "auto", "--output_dir", root / "run", "--device", "cpu")
    return root / "run", root / "model"


@pytest.mark.slow
def test_the_run_of_run_args_has_the_same_weights(distilled, tmp_path):
    run(f"@{distilled[0] / 'run.args'}", "--output_dir", tmp_path / "again")
    folders = distilled[0], tmp_path / "again"
    first, again = (torch.load(folder / "checkpoint.pth", weights_only=True) for folder in folders)
    torch.testing.assert_close(again["model"], first["model"], rtol=0, atol=0)


@pytest.mark.slow
def test_a_resumed_file_needs_no_model(distilled, tmp_path):
    flags = ["--resume", distilled[0] / "checkpoint.pth", "--epochs", 3, "--batch-size", 16, "--warmup-epochs", 0]
    run(*flags, *ON_CPU, "--output_dir", tmp_path)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [2]


@pytest.mark.slow
def test_the_card_of_a_distilled_run_repeats_it(distilled):
    folder, exported = distilled
    card = (exported / "README.md").read_text()
    line = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    assert f"**Accuracy:** top-1 {line['test_acc1']:.2f}%, top-5 {line['test_acc5']:.2f}% on GRATINGS, epoch 1" in card
    blocks = "student blocks [0, 1, 3], teacher blocks [0, 1, 5]"
    assert f"**Teacher:** cait_s24_224 (soft distillation; {blocks})" in card
    command = shlex.split(re.search(r"\*\*Command line:\*\* `(.*)`", card)[1])
    assert command[:2] == ["python", "main.py"]
    assert vars(parse_args(command[2:])) == vars(parse_args([f"@{folder / 'run.args'}"]))


@pytest.mark.slow
@has_local_dir
def test_an_exported_folder_is_a_model_and_a_teacher(distilled, capsys):
    name, ids = f"local-dir:{distilled[1]}", ["--s-id", "all", "--t-id", "all"]
    flags = ["--teacher-model", name, "--distillation-type", "soft", *ids, "--pretrained", "--dry-run"]
    run(*tiny_run("--model", name, "--model-kwargs", *flags))
    assert "blocks.3 [24, 4, 4] <- teacher blocks.3 [24, 4, 4]" in capsys.readouterr().out


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    """The calls of a stand-in for wandb, which is interrupted when it logs epoch 1 for the first time."""
    calls = []

    def log(stats, step):
        calls.append(("log", step))
        if step == 1 and calls.count(("log", 1)) == 1:
            raise KeyboardInterrupt

    def init(config, **options):
        calls.append(("init", options))
        return SimpleNamespace(log=log, finish=lambda exit_code: calls.append(("finish", exit_code)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return calls


@pytest.mark.slow
def test_wandb_ends_with_a_stopped_run_and_resumes_it(wandb, tmp_path):
    """A run that starts again has a new id."""
    flags = tiny_run("--epochs", 2, "--output_dir", tmp_path / "out", "--wandb", "project")
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    run(*flags, "--resume", "auto")
    run(*flags, "--epochs", 1, "--overwrite")
    first, again = wandb[0][1], wandb[7][1]
    assert wandb[:4] == [("init", first), ("log", 0), ("log", 1), ("finish", 1)]
    assert wandb[4:7] == [("init", first), ("log", 1), ("finish", 0)]
    assert wandb[7:] == [("init", again), ("log", 0), ("finish", 0)]
    assert [first[name] for name in ("project", "name", "resume")] == ["project", "out", "allow"]
    assert first["id"] != again["id"]


def test_a_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(utils.UserError, match=r"^--wandb needs wandb \(pip install wandb\)"):
        utils.RunLog(tmp_path, {}, wandb_project="project")


# Exported models


def test_a_checkpoint_of_the_original_exports(tmp_path):
    """It has a Namespace, and weights with DistributedDataParallel's names."""
    weights = timm.create_model(DEIT, num_classes=3, **KWARGS).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": weights, "model_ema": wrapped, "args": Namespace(epochs=3)}, tmp_path / "checkpoint.pth")
    for flags in ([], ["--eval-ema"]):
        file = export(tmp_path / "checkpoint.pth", tmp_path / "out", *flags)
        model = timm.create_model(DEIT, checkpoint_path=str(file), num_classes=3, **KWARGS)
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        assert "**Recipe:** epochs 3\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_refused_export_leaves_no_file(tmp_path):
    torch.save({"model": {"weight": torch.ones(3)}, "args": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(utils.UserError, match="weights do not fit"):
        export(tmp_path / "checkpoint.pth", tmp_path / "out")
    with pytest.raises(utils.UserError, match=r"cannot export to .*checkpoint.pth: .*exists"):
        export_tiny("resnet18", tmp_path / "checkpoint.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


CLASSES = ["ant", "bee", "cat", "dog", "emu"]
RECIPES = ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "cait_s24_224", "regnety_160"]


def export_tiny(name, folder, **kwargs):
    model = build(name)
    export_model(model, folder, input_size=64, classes=CLASSES, model_args=FAMILIES[name], **kwargs)
    return model


@pytest.mark.parametrize("name", RECIPES)
def test_timm_loads_an_exported_model(name, tmp_path):
    """As a folder where timm has local-dir, and as a file in all releases."""
    model = export_tiny(name, tmp_path, crop_ratio=0.9)
    config = json.loads((tmp_path / "config.json").read_text())
    file, args = str(tmp_path / "model.safetensors"), {"num_classes": 5} | config["model_args"]
    assert_same_function(timm.create_model(config["architecture"], checkpoint_path=file, **args).eval(), model)
    if "local-dir" in CONFIG_READERS:
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert_same_function(loaded, model)
        data = timm.data.resolve_model_data_config(loaded)
        assert models.normalization(loaded) == models.normalization(model)
        assert (tuple(data["input_size"]), data["crop_pct"]) == ((3, 64, 64), 0.9)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the folder of owner/name in an offline cache of the hub."""
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "regnety_160"])
def test_an_exported_model_comes_back_from_the_hub(name, hub):
    with pytest.raises(utils.UserError, match=r"^model hf-hub:owner/name: cannot read its config.json: .*$"):
        models.build_model("hf-hub:owner/name", 5)
    model = export_tiny(name, hub)
    loaded = models.build_model("hf-hub:owner/name", 5, input_size=64, pretrained=True).eval()
    assert_same_function(loaded, model)
    assert models.class_names(loaded, "hf-hub:owner/name", True, 5) == CLASSES
    larger = models.build_model("hf-hub:owner/name", 7, input_size=96, pretrained=True).eval()
    assert larger(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_the_model_card_tells_the_accuracy_of_its_epoch(tmp_path):
    line = '{"epoch": %d, "test_acc1": %d, "test_acc5": 90.0, "test_ema_acc1": 60, "test_ema_acc5": 61}\n'
    (tmp_path / "log.txt").write_text("".join(line % each for each in enumerate((40, 51, 50))))
    log, args = tmp_path / "log.txt", {"data_set": "IMNET", "data_path": "/data/birds", "epochs": 3, "lr": 0.001}
    checkpoint = {"args": args, "epoch": 1}
    facts = card_facts(checkpoint, log)
    export_tiny("resnet18", tmp_path, facts=facts)
    card = (tmp_path / "README.md").read_text()
    for words in ("top-1 51.00%, top-5 90.00% on birds, epoch 1", "epochs 3, lr 0.001", f"timm {timm.__version__}"):
        assert words in card
    assert card_facts(checkpoint, log, ema=True)["Accuracy"] == "top-1 60.00%, top-5 61.00% on birds, epoch 1"
    assert set(card_facts({}, log)) == {"Weights", "Versions"}


@pytest.mark.slow
@has_local_dir
def test_an_exported_model_runs_in_onnx(tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    from timm.utils.onnx import onnx_export, onnx_forward

    model = export_tiny("deit_tiny_patch16_224", tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, exportable=True).eval()
    file, images = str(tmp_path / "model.onnx"), torch.randn(2, 3, 64, 64)
    onnx_export(loaded, file, example_input=images)
    found = torch.from_numpy(onnx_forward(file, images))
    torch.testing.assert_close(found, model(images).detach(), rtol=1e-4, atol=1e-5)
