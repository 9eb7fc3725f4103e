"""What --export writes is what the checkpoint holds, and timm alone can load it."""

from argparse import Namespace

import pytest
import timm
import torch
from conftest import STUDENT, distil, tiny_run
from families import FAMILIES

import main
import utils

KWARGS = main.key_values(STUDENT)
DEIT = "deit_tiny_patch16_224"


def export(checkpoint, file, *more):
    main.main(main.parse_args(["--export", str(file), "--resume", str(checkpoint), *more]))
    return file


def assert_same_model(name, file, weights, **kwargs):
    """timm builds the model from the exported file alone, with exactly these weights and their logits."""
    model = timm.create_model(name, checkpoint_path=str(file), **kwargs)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    expected = timm.create_model(name, **kwargs)
    expected.load_state_dict(weights)
    size = kwargs.get("img_size", 64)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), expected.eval()(images), rtol=0, atol=0)


def test_weights_and_moving_average_of_a_run_load_in_timm(tmp_path, teacher_file, capsys):
    out = tmp_path / "run"
    main.main(main.parse_args(tiny_run("--output_dir", out, "--model-ema-decay", 0.5, *distil(teacher_file))))
    checkpoint = torch.load(out / "model_best.pth", weights_only=True)
    student = export(out / "model_best.pth", tmp_path / "student.safetensors")
    average = export(out / "model_best.pth", tmp_path / "average.safetensors", "--eval-ema")
    assert f"wrote {len(checkpoint['model'])} tensors to {student}" in capsys.readouterr().out
    assert any(not torch.equal(checkpoint["model"][k], v) for k, v in checkpoint["model_ema"].items())
    for file, key in ((student, "model"), (average, "model_ema")):
        assert_same_model(DEIT, file, checkpoint[key], num_classes=24, **KWARGS)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64}),
        ("cait_s24_224", {"img_size": 64}),
        ("regnety_160", {}),
    ],
)
def test_every_family_of_the_recipes_exports(name, sizes, tmp_path):
    kwargs = {"num_classes": 5, **FAMILIES[name], **sizes}
    weights = timm.create_model(name, **kwargs).state_dict()
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    assert_same_model(name, export(tmp_path / "checkpoint.pth", tmp_path / "model.safetensors"), weights, **kwargs)


def test_a_checkpoint_of_the_original_exports(tmp_path):
    """It holds a Namespace, and names as DistributedDataParallel has them."""
    weights = timm.create_model(DEIT, num_classes=3, **KWARGS).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": weights, "model_ema": wrapped, "args": Namespace(epochs=3)}, tmp_path / "checkpoint.pth")
    for flags in ([], ["--eval-ema"]):
        file = export(tmp_path / "checkpoint.pth", tmp_path / "model.safetensors", *flags)
        assert_same_model(DEIT, file, weights, num_classes=3, **KWARGS)


def test_shared_and_strided_tensors_export(tmp_path):
    weights = timm.create_model(DEIT, num_classes=3, **KWARGS).state_dict()
    weights["norm.weight"] = weights["norm.bias"] = torch.randn(2, 24)[0]
    weights["head.weight"] = torch.randn(24, 3).T
    torch.save(weights, tmp_path / "weights.pth")
    file = export(tmp_path / "weights.pth", tmp_path / "model.safetensors")
    assert_same_model(DEIT, file, weights, num_classes=3, **KWARGS)


@pytest.mark.parametrize(
    ("content", "file", "flags", "message"),
    [
        ({"weight": torch.ones(3)}, "model.pth", [], r"must end in \.safetensors"),
        ({"weight": torch.ones(3)}, "missing/model.safetensors", [], "--export .*No such file or directory"),
        ({"weight": torch.ones(3)}, "folder.safetensors", [], "--export .*[Ii]s a directory"),
        ({"weight": torch.ones(3)}, "model.safetensors", ["--eval-ema"], "no moving average"),
        ({}, "model.safetensors", [], "holds no weights"),
    ],
)
def test_a_refused_export_leaves_no_file(content, file, flags, message, tmp_path):
    torch.save({"model": content, "args": {}}, tmp_path / "checkpoint.pth")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(utils.UserError, match=message):
        export(tmp_path / "checkpoint.pth", tmp_path / file, *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pth", "folder.safetensors"]
