"""Lift and WideLast: the released outputs, names and sizes, and what timm's models can do."""

import json
import zlib

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TEACHER, run_main, tiny_run
from torch.utils.flop_counter import FlopCounterMode

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


def weights_of_names(keys):
    """Perturbed float32 weights that depend on the names and shapes alone."""
    weights = {}
    for name, shape in keys:
        noise = np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape)
        is_norm = "norm" in name and name.endswith("weight")
        weights[name] = torch.tensor(1 + 0.1 * noise if is_norm else 0.05 * noise, dtype=torch.float32)
    return weights


def reference(weights, images, heads):
    """(logits, map of the last block) by the formulas, in float64 numpy, from weights under their released names."""
    lift = "base_model.cls_token" in weights
    base = {name.removeprefix("base_model."): value for name, value in weights.items() if name.startswith("base_model")}
    w = {name: np.float64(value) for name, value in (base | weights).items()}

    def norm(x, name, eps=1e-6):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    kernel = w["patch_embed.proj.weight"]
    batch, grid, size = len(images), images.shape[-1] // kernel.shape[-1], kernel.shape[-1]
    patches = images.reshape(batch, 3, grid, size, grid, size).transpose(0, 2, 4, 1, 3, 5).reshape(batch, grid**2, -1)
    x = patches @ kernel.reshape(len(kernel), -1).T + w["patch_embed.proj.bias"]
    x = np.concatenate((np.repeat(w["cls_token"], batch, 0), x), 1) + w["pos_embed"]
    for i, count in enumerate(heads):
        block = f"blocks.{i}"
        if f"{block}.proj_in.weight" in w:
            x = norm(linear(x, f"{block}.proj_in"), f"{block}.proj_norm")
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, -1, 3, count, x.shape[-1] // count).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{block}.attn.proj")
        hidden = torch.tensor(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(torch.nn.functional.gelu(hidden).numpy(), f"{block}.mlp.fc2")
    last = len(heads) - 1
    feature = norm(linear(x[:, 1:], f"projections.{last}"), f"layer_norms.{last}", 1e-5) if lift else x[:, 1:]
    pooled = feature.mean(1) if lift else norm(x[:, 0], "norm")
    return linear(pooled, "head"), feature.swapaxes(1, 2).reshape(batch, -1, grid, grid)


def run(model, weights, images, *ids):
    """(logits, maps of the blocks) of the model with these weights."""
    models.load_weights(model, weights)
    hooks = FeatureHooks(model, ids)
    with torch.no_grad():
        logits = model.to(images.dtype)(images)
    return logits.numpy(), [maps.numpy() for maps in hooks.pop()]


@pytest.mark.parametrize(("name", "file"), [(LIFT, "lift_tiny"), (WIDELAST, "widelast_tiny")])
@pytest.mark.parametrize(("dtype", "suffix", "rtol"), [(torch.float64, "", 1e-9), (torch.float32, "_f32", 1e-5)])
def test_outputs_are_those_of_the_released_program(name, file, dtype, suffix, rtol):
    golden = np.load(GOLDEN / f"{file}.npz")
    weights = {key[3:]: torch.tensor(golden[key]) for key in golden if key.startswith("sd/")}
    logits, maps = run(build(name, **TINY), weights, torch.tensor(golden["input"], dtype=dtype), 10, 11)
    for value, key in zip((logits, *maps), ("logits", "feature_10", "feature_11"), strict=True):
        expected = golden[key + suffix]
        np.testing.assert_allclose(value, expected, rtol=0, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "keys", "kwargs", "heads"),
    [
        (LIFT, "lift", {}, [3] * 12),
        (WIDELAST, "widelast", {}, [3] * 11 + [6]),
        (WIDELAST, "widelast_linear_tiny", LINEAR, LINEAR["heads"]),
    ],
)
def test_released_names_load_and_give_the_formulas_output(name, keys, kwargs, heads):
    model, weights = build(name, **kwargs), weights_of_names(KEYS[keys])
    size = model.patch_embed.img_size[0]
    images = np.random.RandomState(0).normal(size=(1, 3, size, size))
    expected, expected_map = reference(weights, images, heads)
    logits, (maps,) = run(model, weights, torch.tensor(images, dtype=torch.float32), len(heads) - 1)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(maps, expected_map, rtol=0, atol=1e-5 * np.abs(expected_map).max())


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


@pytest.mark.parametrize("name", [LIFT, WIDELAST])
def test_every_parameter_gets_a_gradient(name):
    """DistributedDataParallel refuses unused parameters, and the optimizer would have no state for them."""
    model = build(name, **TINY | {"depth": 3})
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


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


def test_widths_heads_and_depth_must_agree():
    with pytest.raises(ValueError, match="3 widths and 2 heads for 3 blocks"):
        students.WideLast([24, 24, 48], [3, 6])
    with pytest.raises(ValueError, match="2 widths and 2 heads for 12 blocks"):
        students.WideLast([24, 48], depth=12)
    with pytest.raises(ValueError, match="no further prefix token"):
        students.Lift(reg_tokens=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", [LIFT, WIDELAST])
def test_students_train_score_and_export_like_any_model(name, teacher_file, tmp_path):
    """Two processes, so that DistributedDataParallel meets every parameter; the export loads in plain timm."""
    pairs = ["--s-id", "0", "3", "--t-id", "0", "5", "--teacher-path", teacher_file, "--teacher-kwargs", *TEACHER]
    train = tiny_run("--model", name, "--distillation-type", "soft", *pairs, "--output_dir", tmp_path)
    assert run_main(*train, processes=2).returncode == 0
    best, exported = tmp_path / "checkpoint.pth", tmp_path / "weights.safetensors"
    scored = run_main(*tiny_run("--model", name, "--resume", best, "--eval"))
    logged = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["test_acc1"]
    assert f"{logged:.3f}%" in scored.stdout
    assert run_main(*tiny_run("--model", name, "--resume", best, "--export", exported)).returncode == 0
    model = build(name, **TINY | {"depth": 4, "num_classes": 24})
    timm.models.load_checkpoint(model, str(exported))
