"""The attention of frozen teachers equals timm's, in half precision as well."""

import copy
import sys

import pytest
import timm
import torch

import models
import utils

SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4)}


def build(name, **kwargs):
    """Build a frozen model whose biases and layer scales are large enough for the attention to matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim < 2 or "proj_" in key else 0.0)
    return model


def small_cait():
    return build("cait_s24_224", img_size=64, embed_dim=48, depth=3, num_heads=4)


def relative_error(logits, expected):
    return ((logits - expected).abs().max() / expected.abs().max()).item()


MODELS = [("cait_s24_224", {"img_size": 64}), ("swin_tiny_patch4_window7_224", SWIN)]


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_fast_attention_equals_timm_at_full_depth(name, kwargs):
    """State dicts do not change."""
    model, images = build(name, **kwargs), torch.randn(3, 3, 64, 64)
    expected, weights = model(images), copy.deepcopy(model.state_dict())
    before = [(type(module), getattr(module, "fused_attn", None)) for module in model.modules()]
    models.fast_attention(model)
    assert [(type(module), getattr(module, "fused_attn", None)) for module in model.modules()] != before
    assert relative_error(model(images), expected) < 1e-5
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "choice"), [("deit_tiny_patch16_224", "auto"), ("cait_s24_224", "timm")])
def test_other_models_and_timm_stay_unchanged(name, choice):
    model = timm.create_model(name, img_size=32, embed_dim=24, depth=2, num_heads=3)
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in models.fast_attention(model, choice).modules()] == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_timm(dtype):
    """Both are compared with timm's float32 logits under CPU autocast."""
    model, images = small_cait(), torch.randn(4, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", dtype=dtype):
        by_timm = relative_error(model(images).float(), expected)
        own = relative_error(models.fast_attention(copy.deepcopy(model))(images).float(), expected)
    assert own < 2 * by_timm


def test_float32_and_cpu_never_use_the_kernel():
    block = models.TalkingHeads(small_cait().blocks[0].attn, kernel=pytest.fail)
    assert block(torch.randn(2, 16, 48)).shape == (2, 16, 48)


def test_missing_triton_names_the_flag(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(utils.UserError, match=r"--teacher-attention triton needs .* use eager"):
        models.fast_attention(small_cait(), "triton")
