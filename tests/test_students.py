"""Lift and WideLast: the released outputs, names and sizes, and what timm's models can do."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TEACHER, tiny_run
from processes import finish
from torch.utils.flop_counter import FlopCounterMode

import analyze
import models
import students
from spectral import FeatureHooks

GOLDEN = ROOT / "tests" / "golden"
KEYS = json.loads((GOLDEN / "students_keys.json").read_text())
LIFT, WIDELAST = "deit_tiny_lift_patch16_224", "deit_tiny_widelast_patch16_224"
TINY = {"img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 24, "num_heads": 3}
LINEAR = TINY | {"widths": (24, 24, 32, 40, 48), "heads": (3, 3, 4, 5, 6)}


def build(name, **kwargs):
    return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize(("name", "file"), [(LIFT, "lift_tiny"), (WIDELAST, "widelast_tiny")])
@pytest.mark.parametrize(("dtype", "suffix", "rtol"), [(torch.float64, "", 1e-9), (torch.float32, "_f32", 1e-5)])
@torch.no_grad()
def test_outputs_are_those_of_the_released_program(name, file, dtype, suffix, rtol):
    golden, model = np.load(GOLDEN / f"{file}.npz"), build(name, **TINY)
    models.load_weights(model, {key[3:]: torch.tensor(golden[key]) for key in golden if key.startswith("sd/")})
    hooks = FeatureHooks(model, [10, 11])
    logits = model.to(dtype)(torch.tensor(golden["input"], dtype=dtype))
    for value, key in zip((logits, *hooks.pop()), ("logits", "feature_10", "feature_11"), strict=True):
        expected = golden[key + suffix]
        np.testing.assert_allclose(value, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "keys", "kwargs"),
    [(LIFT, "lift", {}), (WIDELAST, "widelast", {}), (WIDELAST, "widelast_linear_tiny", LINEAR)],
)
def test_released_names_and_shapes_load(name, keys, kwargs):
    model = build(name, **kwargs)
    models.load_weights(model, {name: torch.full(shape, 0.5) for name, shape in KEYS[keys]})
    assert all((parameter == 0.5).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "kwargs", "parameters", "macs"),
    [
        (LIFT, {}, 5_983_528, 1_268_325_888),
        (LIFT, {"lift_dim": 256}, 5_830_696, 1_263_380_992),
        (WIDELAST, {}, 7_313_896, 1_544_741_760),
        (WIDELAST, {"widths": [192] * 9 + [256, 320, 384]}, 8_628_264, 1_817_856_256),
        (WIDELAST, {"widths": [192] * 9 + [240, 312, 384], "heads": [3] * 12}, 8_458_816, 1_782_683_088),
        ("deit_tiny_patch16_224", {"embed_dim": 219}, 7_372_759, 1_597_722_384),  # the control for size
    ],
)
def test_parameters_and_operations_are_as_published(name, kwargs, parameters, macs):
    model = build(name, **kwargs)
    for block in model.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert counter.get_total_flops() == 2 * macs


@torch.no_grad()
def test_initialization_is_as_released():
    torch.manual_seed(0)
    lift, widelast = build(LIFT), build(WIDELAST)
    assert widelast.cls_token.std() == pytest.approx(0.02, rel=0.15)
    assert widelast.blocks[11].proj_in.weight.std() == pytest.approx(0.02, rel=0.05)
    assert lift.cls_token.std() == pytest.approx(1e-6, rel=0.15)
    for layer in (lift.blocks[11].lift, lift.head):  # torch's default: uniform up to 1 / sqrt(fan in)
        assert layer.weight.abs().max() == pytest.approx(layer.in_features**-0.5, rel=0.01)
    assert lift.head.bias.std() > 0.02


@pytest.mark.parametrize("name", [LIFT, WIDELAST])
def test_timm_finds_the_blocks_that_the_hooks_find(name):
    model, images = build(name, **TINY | {"depth": 3}), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
        hooks = FeatureHooks(model, range(3))
        model(images)
    assert [m.shape[1] for m in maps] == [24, 24, 48]
    for ours, timms in zip(hooks.pop(), maps, strict=True):
        torch.testing.assert_close(ours, timms, rtol=0, atol=0)


@pytest.mark.parametrize("name", [LIFT, WIDELAST])
def test_own_weights_load_at_another_size_and_class_count(name):
    source, target = build(name, **TINY), build(name, **TINY | {"img_size": 48, "num_classes": 7})
    assert "10 classes" in models.load_weights(target, source.state_dict(), head="fresh")
    assert target(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    torch.testing.assert_close(target.blocks[11].mlp.fc1.weight, source.blocks[11].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("student", "kwargs", "message"),
    [
        (students.WideLast, {"widths": [24, 24, 48], "heads": [3, 6]}, "3 widths and 2 heads for 3 blocks"),
        (students.WideLast, {"widths": [24, 48], "depth": 12}, "2 widths and 2 heads for 12 blocks"),
        (students.Lift, {"reg_tokens": 2}, "no further prefix token"),
    ],
)
def test_arguments_that_do_not_agree_are_refused(student, kwargs, message):
    with pytest.raises(ValueError, match=message):
        student(**kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [LIFT, WIDELAST])
def test_students_train_score_export_and_are_analyzed(name, teacher_file, tmp_path):
    """Two processes, so that DistributedDataParallel meets every parameter; the export loads in plain timm."""
    pairs = ["--s-id", "0", "3", "--t-id", "0", "5", "--teacher-path", teacher_file, "--teacher-kwargs", *TEACHER]
    finish(0, *tiny_run("--model", name, "--distillation-type", "soft", *pairs, "--output_dir", tmp_path), ranks=2)
    own = tiny_run("--model", name, "--resume", tmp_path / "checkpoint.pth")
    logged = json.loads((tmp_path / "log.txt").read_text())["test_acc1"]
    assert f"{logged:.3f}%" in finish(0, *own, "--eval").text
    finish(0, *own, "--export", tmp_path / "exported")
    model = build(name, **TINY | {"depth": 4, "num_classes": 24})
    timm.models.load_checkpoint(model, str(tmp_path / "exported" / "model.safetensors"))
    where = ["--output_dir", str(tmp_path / "analysis"), "--device", "cpu", "--num_workers", "0"]
    analyze.main(analyze.parse_args(["--checkpoint", str(tmp_path), *where]))
    shapes = [
        block["shape"]
        for block in json.loads((tmp_path / "analysis" / "spectra.json").read_text())["models"][0]["blocks"]
    ]
    assert shapes == [[24, 4, 4]] * 3 + [[48, 4, 4]]
