"""What --export writes is what the checkpoint holds, and timm loads it by itself."""

from argparse import Namespace

import pytest
import timm
import torch
from conftest import STUDENT, distil, tiny_run

import main
import utils
from flags import key_values, parse_args

KWARGS = key_values(STUDENT)


def export(checkpoint, file, *more):
    main.main(parse_args(["--export", str(file), "--resume", str(checkpoint), *more]))
    return file


def assert_same_model(name, file, weights, **kwargs):
    """timm builds the model from the exported file alone, with these very weights and their logits."""
    model = timm.create_model(name, checkpoint_path=str(file), **kwargs)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    expected = timm.create_model(name, **kwargs)
    expected.load_state_dict(weights)
    size = kwargs.get("img_size", 64)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), expected.eval()(images), rtol=0, atol=0)


def test_student_and_moving_average_of_a_run_load_in_timm(tmp_path, teacher_file, capsys):
    out = tmp_path / "run"
    main.main(parse_args(tiny_run("--output_dir", out, "--model-ema-decay", 0.5, *distil(teacher_file))))
    checkpoint = torch.load(out / "model_best.pth", weights_only=True)
    student = export(out / "model_best.pth", tmp_path / "student.safetensors")
    average = export(out / "model_best.pth", tmp_path / "average.safetensors", "--eval-ema")
    assert f"wrote {len(checkpoint['model'])} tensors to {student}" in capsys.readouterr().out
    assert any(not torch.equal(checkpoint["model"][k], v) for k, v in checkpoint["model_ema"].items())
    for file, key in ((student, "model"), (average, "model_ema")):
        assert_same_model("deit_tiny_patch16_224", file, checkpoint[key], num_classes=24, **KWARGS)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("deit_tiny_distilled_patch16_224", KWARGS),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 2, "embed_dim": 12, "num_heads": (1, 1, 2, 2)},
        ),
        ("cait_s24_224", {"img_size": 32, "embed_dim": 24, "num_heads": 2, "depth": 2}),
        ("regnety_160", {"w0": 16, "wa": 16, "wm": 2, "group_size": 8, "depth": 8}),
    ],
)
def test_every_family_of_the_recipes_exports(name, kwargs, tmp_path):
    weights = timm.create_model(name, num_classes=5, **kwargs).state_dict()
    torch.save({"model": weights}, tmp_path / "checkpoint.pth")
    file = export(tmp_path / "checkpoint.pth", tmp_path / "model.safetensors")
    assert_same_model(name, file, weights, num_classes=5, **kwargs)


def test_a_checkpoint_of_the_original_exports(tmp_path):
    """It holds a Namespace, and names as DistributedDataParallel has them."""
    weights = timm.create_model("deit_tiny_patch16_224", num_classes=3, **KWARGS).state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": weights, "model_ema": wrapped, "args": Namespace(epochs=3)}, tmp_path / "checkpoint.pth")
    for flags in ([], ["--eval-ema"]):
        file = export(tmp_path / "checkpoint.pth", tmp_path / "model.safetensors", *flags)
        assert_same_model("deit_tiny_patch16_224", file, weights, num_classes=3, **KWARGS)


def test_tensors_that_share_memory_or_are_not_contiguous_export(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224", num_classes=3, **KWARGS)
    weights = model.state_dict()
    whole = torch.randn(2, *weights["norm.weight"].shape)
    weights["norm.weight"], weights["norm.bias"] = whole[0], whole[0]
    weights["head.weight"] = torch.randn(24, 3).T
    torch.save(weights, tmp_path / "weights.pth")
    file = export(tmp_path / "weights.pth", tmp_path / "model.safetensors")
    assert_same_model("deit_tiny_patch16_224", file, weights, num_classes=3, **KWARGS)


def test_what_cannot_be_exported_is_said_and_leaves_no_file(tmp_path):
    torch.save({"model": {"weight": torch.ones(3)}}, tmp_path / "bare.pth")
    (tmp_path / "folder.safetensors").mkdir()
    cases = [
        (tmp_path / "model.pth", [], r"must end in \.safetensors"),
        (tmp_path / "missing" / "model.safetensors", [], "--export .*No such file or directory"),
        (tmp_path / "folder.safetensors", [], "--export .*[Ii]s a directory"),
        (tmp_path / "model.safetensors", ["--eval-ema"], "no moving average"),
    ]
    for file, more, message in cases:
        with pytest.raises(utils.UserError, match=message):
            export(tmp_path / "bare.pth", file, *more)
    torch.save({"model": {}, "args": {}}, tmp_path / "empty.pth")
    with pytest.raises(utils.UserError, match="holds no weights"):
        export(tmp_path / "empty.pth", tmp_path / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.pth", "empty.pth", "folder.safetensors"]
