"""An exported model equals the trained one, and timm alone can load it."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from conftest import STUDENT, tiny_run
from families import FAMILIES, assert_same_function, build
from timm.models._hub import has_hf_hub

import main
import models
import utils
from export import card_facts, export_model
from flags import key_values, parse_args
from model_names import CONFIG_READERS

KWARGS = key_values(STUDENT)
DEIT = "deit_tiny_patch16_224"


def export(checkpoint, folder, *more):
    main.main(parse_args(tiny_run("--export", folder, "--resume", checkpoint, *more)))
    return folder / "model.safetensors"


def test_a_checkpoint_of_the_original_exports(tmp_path):
    """It has a Namespace, and weights with DistributedDataParallel's names."""
    weights = timm.create_model(DEIT, num_classes=3, **KWARGS).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": weights, "model_ema": wrapped, "args": Namespace(epochs=3)}, tmp_path / "checkpoint.pth")
    for flags in ([], ["--eval-ema"]):
        file = export(tmp_path / "checkpoint.pth", tmp_path / "out", *flags)
        model = timm.create_model(DEIT, checkpoint_path=str(file), num_classes=3, **KWARGS)
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


def test_a_refused_export_leaves_no_file(tmp_path):
    torch.save({"model": {"weight": torch.ones(3)}, "args": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(utils.UserError, match="weights do not fit"):
        export(tmp_path / "checkpoint.pth", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


# timm's own format


CLASSES = ["ant", "bee", "cat", "dog", "emu"]
RECIPES = ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "cait_s24_224", "regnety_160"]
has_local_dir = pytest.mark.skipif(CONFIG_READERS["local-dir"] is None, reason="old timm")


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
    if CONFIG_READERS["local-dir"]:
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        assert_same_function(loaded, model)
        data = timm.data.resolve_model_data_config(loaded)
        assert models.normalization(loaded) == models.normalization(model)
        assert (tuple(data["input_size"]), data["crop_pct"]) == ((3, 64, 64), 0.9)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return the folder of owner/name in an offline cache of the hub."""
    if not has_hf_hub():
        pytest.skip("this timm does not work with this huggingface_hub")
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "regnety_160"])
def test_an_exported_model_comes_back_from_the_hub(name, hub):
    model = export_tiny(name, hub)
    loaded = models.build_model("hf-hub:owner/name", 5, input_size=64, pretrained=True).eval()
    assert_same_function(loaded, model)
    assert models.class_names(loaded, "hf-hub:owner/name", True, 5) == CLASSES
    larger = models.build_model("hf-hub:owner/name", 7, input_size=96, pretrained=True).eval()
    assert larger(torch.zeros(1, 3, 96, 96)).shape == (1, 7)


def test_a_model_that_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(utils.UserError, match=r"^model hf-hub:owner/none: cannot read its config.json: .*$"):
        models.build_model("hf-hub:owner/none", 5)


def test_the_model_card_tells_the_accuracy_of_its_epoch(tmp_path):
    line = '{"epoch": %d, "test_acc1": %d, "test_acc5": 90.0, "test_ema_acc1": 60.0}\n'
    (tmp_path / "log.txt").write_text("".join(line % each for each in enumerate((40, 51, 50))))
    args = {"data_set": "IMNET", "epochs": 3, "lr": 0.001}
    facts = card_facts(args, tmp_path / "log.txt", epoch=1)
    export_tiny("resnet18", tmp_path, facts=facts)
    card = (tmp_path / "README.md").read_text()
    for words in ("top-1 51.00%, top-5 90.00% on IMNET, epoch 1", "epochs 3, lr 0.001", f"timm {timm.__version__}"):
        assert words in card
    assert card_facts(args, tmp_path / "log.txt", epoch=0, ema=True)["Accuracy"] == "top-1 60.00% on IMNET, epoch 0"
    assert "Accuracy" not in card_facts({}, tmp_path / "log.txt")


def test_an_export_over_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match=r"cannot export to .*file: .*exists"):
        export_tiny("resnet18", tmp_path / "file")


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
