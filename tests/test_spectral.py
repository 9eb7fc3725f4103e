"""Feature hooks against blocks run by hand, alignment, feature losses and spectral analysis against numpy."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from spectral import (
    FEATURE_LOSSES,
    SPECTRAL_IMPLEMENTATIONS,
    FeatureHooks,
    SpectralProfile,
    align,
    describe_blocks,
    layerwise_spectrum,
    mse_loss,
    power_spectrum,
    radial_average,
    spectral_loss,
)

GOLDEN = Path(__file__).parent / "golden"
VIT = {"img_size": (64, 96), "embed_dim": 24, "depth": 4, "num_heads": 3}
CAIT = {"img_size": (64, 96), "embed_dim": 48, "depth": 4, "num_heads": 4}
SWIN = {"img_size": (64, 96), "window_size": 2, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
LOSSES = SPECTRAL_IMPLEMENTATIONS | {"mse": FEATURE_LOSSES["mse"]}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_implementation = pytest.mark.parametrize("loss", SPECTRAL_IMPLEMENTATIONS.values(), ids=SPECTRAL_IMPLEMENTATIONS)


def build(name, **kwargs):
    """An untrained timm model whose layer scales are large enough to tell its blocks apart."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def random_images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# Hooks


def vit_maps(model, x):
    """Run the blocks by hand; the prefix tokens come before the patch tokens."""
    size = [side // model.patch_embed.patch_size[0] for side in x.shape[-2:]]
    x = model.patch_embed(x)
    extra = [getattr(model, name, None) for name in ("cls_token", "dist_token", "reg_token")]
    prefix = torch.cat([token for token in extra if token is not None], dim=1).expand(len(x), -1, -1)
    if model.pos_embed.shape[1] == x.shape[1]:  # DeiT III and registers: no position for the prefix
        x = torch.cat([prefix, x + model.pos_embed], dim=1)
    else:
        x = torch.cat([prefix, x], dim=1) + model.pos_embed
    maps = []
    for block in model.blocks:
        x = block(x)
        maps.append(x[:, prefix.shape[1] :].reshape(len(x), *size, -1).permute(0, 3, 1, 2))
    return maps


def cait_maps(model, x):
    """The self-attention blocks see patch tokens only; the class token enters after them."""
    size = [side // 16 for side in x.shape[-2:]]
    x = model.patch_embed(x) + model.pos_embed
    maps = []
    for block in model.blocks:
        x = block(x)
        maps.append(x.reshape(len(x), *size, -1).permute(0, 3, 1, 2))
    return maps


def swin_maps(model, x):
    x = model.patch_embed(x)
    maps = []
    for stage in model.layers:
        x = stage(x)
        maps.append(x.permute(0, 3, 1, 2))
    return maps


def timm_maps(model, x):
    maps = model.forward_intermediates(x, intermediates_only=True)
    return maps[-len(describe_blocks(model)) :]  # timm 1.0.11 also returns ConvNeXt's stem


FAMILIES = {
    "deit_tiny_patch16_224": (VIT, vit_maps),
    "deit_tiny_distilled_patch16_224": (VIT, vit_maps),
    "deit3_small_patch16_224": (VIT, vit_maps),
    "vit_tiny_patch16_224": (VIT, vit_maps),
    "vit_small_patch14_reg4_dinov2": (VIT | {"img_size": (56, 84)}, vit_maps),
    "cait_s24_224": (CAIT, cait_maps),
    "swin_tiny_patch4_window7_224": (SWIN, swin_maps),
    "convnext_atto": ({}, timm_maps),
    "resnet18": ({}, timm_maps),
    "regnety_002": ({}, timm_maps),
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_maps_are_the_raw_block_outputs(name):
    """Exactly, on images that are not square, without the prefix tokens (0, 1, 2 or 5 of them)."""
    kwargs, walk = FAMILIES[name]
    model, x = build(name, **kwargs), random_images(*kwargs.get("img_size", (64, 96)))
    expected = walk(model, x)
    hooks = FeatureHooks(model, range(len(expected)))
    model(x)
    maps = hooks.pop()
    for got, wanted, block in zip(maps, expected, describe_blocks(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert got.shape[1] == block["num_chs"]
        assert got.shape[3] * 2 == got.shape[2] * 3
    for one, other in itertools.pairwise(maps):
        assert one.shape != other.shape or not torch.equal(one, other)


@torch.no_grad()
def test_ids_keep_their_order_and_repeats():
    model = build("deit_tiny_patch16_224", **VIT)
    every, hooks = FeatureHooks(model, range(4)), FeatureHooks(model, [3, 0, 3, 1, 0])
    model(random_images(64, 96))
    maps, got = every.pop(), hooks.pop()
    for i, each in zip([3, 0, 3, 1, 0], got, strict=True):
        torch.testing.assert_close(each, maps[i], rtol=0, atol=0)


@pytest.mark.parametrize("ids", [[4], [-1], [0, 7]])
def test_an_id_out_of_range_is_refused_with_the_range(ids):
    with pytest.raises(ValueError, match=rf"block id {ids[-1]} is out of range.*0\.\.3"):
        FeatureHooks(build("deit_tiny_patch16_224", **VIT), ids)


def test_outputs_with_other_channels_are_refused():
    model = build("deit_tiny_patch16_224", **VIT)
    model.feature_info[1]["num_chs"] = 25
    FeatureHooks(model, [1])
    with pytest.raises(ValueError, match=r"blocks\.1.* 24 channels, but its feature_info says 25"):
        model(random_images(64, 96))


def test_a_model_without_feature_info_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no map of any block: .*no feature_info"):
        FeatureHooks(nn.Linear(2, 2), [0])


@torch.no_grad()
def test_pop_returns_and_forgets_the_latest_forward():
    model = build("deit_tiny_patch16_224", **VIT)
    hooks = FeatureHooks(model, [1, 2])
    with pytest.raises(RuntimeError, match="no forward pass since the last pop"):
        hooks.pop()
    model(random_images(64, 96))
    model(random_images(64, 96)[:1])
    assert [len(each) for each in hooks.pop()] == [1, 1]
    with pytest.raises(RuntimeError, match="no forward pass since the last pop"):
        hooks.pop()


@torch.no_grad()
def test_hooks_without_ids_return_an_empty_list():
    model = build("deit_tiny_patch16_224", **VIT)
    hooks = FeatureHooks(model)
    assert hooks.pop() == []
    model(random_images(64, 96))
    assert hooks.pop() == []


@torch.no_grad()
def test_hooks_leave_forward_and_state_dict_alone():
    model, x = build("cait_s24_224", **CAIT), random_images(64, 96)
    before, keys, forward = model(x), list(model.state_dict()), model.forward
    hooks = FeatureHooks(model, [0, 3])
    assert list(model.state_dict()) == keys
    assert model.forward == forward
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    hooks.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        hooks.pop()


def test_gradients_flow_from_a_map_to_earlier_blocks_only():
    model = build("deit_tiny_patch16_224", **VIT)
    hooks = FeatureHooks(model, [1])
    model(random_images(64, 96))
    hooks.pop()[0].sum().backward()
    assert model.blocks[1].mlp.fc2.weight.grad is not None
    assert model.blocks[2].mlp.fc2.weight.grad is None


# Alignment


def naive_pool(x, size, dim):
    """Mean over the bins [floor(i n / m), ceil((i + 1) n / m)) along one dimension, in float64."""
    n = x.shape[dim]
    bins = [x.double().narrow(dim, i * n // size, -(-(i + 1) * n // size) - i * n // size) for i in range(size)]
    return torch.cat([each.mean(dim, keepdim=True) for each in bins], dim)


def pair(student, teacher):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(student, generator=generator), torch.randn(teacher, generator=generator)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 6, 3, 5), (2, 12, 3, 5)),  # wider teacher: means of adjacent channels
        ((2, 12, 4, 4), (2, 6, 4, 4)),  # wider student
        ((2, 6, 4, 4), (2, 10, 4, 4)),  # no integer ratio
        ((2, 6, 8, 8), (2, 6, 4, 4)),  # finer student
        ((2, 6, 4, 4), (2, 6, 7, 9)),  # finer teacher, no integer ratio
        ((2, 12, 3, 8), (2, 6, 6, 4)),  # each is larger in one dimension
        ((2, 6, 1, 1), (2, 6, 5, 5)),  # a 1 x 1 grid must not be broadcast
    ],
)
def test_the_larger_side_is_pooled_in_each_dimension(student, teacher):
    student, teacher = pair(student, teacher)
    for got, x in zip(align(student, teacher), (student, teacher), strict=True):
        for dim in (1, 2, 3):
            x = naive_pool(x, min(student.shape[dim], teacher.shape[dim]), dim)
        torch.testing.assert_close(got, x.float(), rtol=1e-5, atol=1e-6)


def test_maps_of_different_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="2 images and the teacher's 3"):
        align(*pair((2, 4, 3, 3), (3, 4, 3, 3)))


# Losses

SHAPES = [
    *((2, 3, 4, 4), (2, 3, 5, 5), (1, 2, 3, 6), (3, 2, 6, 3)),
    *((2, 5, 1, 1), (2, 3, 1, 4), (2, 3, 4, 1), (1, 4, 14, 14)),
]


def dft(n, rows):
    """The first rows of the orthonormal transform's matrix, complex128."""
    k, x = torch.arange(rows).double()[:, None], torch.arange(n).double()
    return torch.polar(torch.full((rows, n), n**-0.5, dtype=torch.float64), -2 * torch.pi * k * x / n)


def naive_loss(student, teacher):
    """The definition, in float64: both spectra by matrix products, then the mean over 2 B C H K numbers."""
    height, width = student.shape[-2:]
    columns = dft(width, width // 2 + 1).transpose(0, 1)
    spectra = [dft(height, height) @ x.double().to(torch.complex128) @ columns for x in (student, teacher)]
    difference = spectra[0] - spectra[1]
    return (difference.real**2 + difference.imag**2).sum() / (2 * difference.numel())


@each_implementation
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_a_naive_transform(shape, loss):
    student, teacher = pair(shape, shape)
    student.requires_grad_()
    got, expected = loss(student, teacher), naive_loss(student, teacher)
    assert got.dtype == torch.float32
    assert got.shape == ()
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(value, student)[0] for value in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@each_implementation
def test_pooled_pairs_have_the_loss_of_their_pooled_maps(loss):
    student, teacher = pair((2, 6, 4, 4), (2, 12, 8, 8))
    pooled = naive_pool(naive_pool(naive_pool(teacher, 6, 1), 4, 2), 4, 3)
    torch.testing.assert_close(loss(student, teacher).double(), naive_loss(student, pooled), rtol=1e-6, atol=0)


@each_implementation
def test_golden_pairs_have_the_original_loss_and_gradient(loss):
    golden = np.load(GOLDEN / "layer_loss.npz")
    cases = sorted({key.split("/")[0] for key in golden})
    assert len(cases) == 8
    for case in cases:
        student, teacher, expected = (
            torch.from_numpy(golden[f"{case}/{name}"]) for name in ("student", "teacher", "grad_student")
        )
        student.requires_grad_()
        value = loss(student, teacher)
        (grad,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(value.item(), float(golden[f"{case}/loss"]), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_is_weighted_mse_plus_a_penalty_on_row_means(shape):
    student, teacher = pair(shape, shape)
    width = shape[-1]
    d = (student - teacher).double()
    rows = d.sum(-1).square().sum() / width
    if width % 2 == 0:
        rows = rows + (d * (-1.0) ** torch.arange(width)).sum(-1).square().sum() / width
    penalty = rows / (4 * d.numel() / width * (width // 2 + 1))
    mse = mse_loss(student, teacher).double()
    torch.testing.assert_close(mse, d.square().mean() * width / (4 * (width // 2 + 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(spectral_loss(student, teacher).double(), mse + penalty, rtol=1e-6, atol=0)


@each_loss
def test_equal_maps_have_no_loss_and_others_do(loss):
    student, teacher = pair((2, 3, 4, 5), (2, 3, 4, 5))
    assert loss(student, student.clone()) == 0
    assert loss(student, teacher) > 0


@each_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_in_a_map_makes_the_loss_not_finite(loss, bad):
    for position in (0, 1):
        maps = pair((2, 6, 4, 4), (2, 12, 4, 4))
        maps[position][1, 2, 3, 0] = bad
        assert not loss(*maps).isfinite()


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 6])
def test_loss_is_float32_in_autocast_and_for_half_maps(loss, dtype, width):
    """With equal widths nothing is pooled; autocast's own pooling would return float32."""
    student, teacher = (x.to(dtype) for x in pair((2, 3, 7, 7), (2, width, 7, 7)))
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss(student, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@each_loss
def test_memory_layout_does_not_matter(loss):
    """Token maps are channels-last views."""
    student, teacher = pair((2, 6, 4, 4), (2, 12, 4, 4))
    views = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (student, teacher)]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(loss(*views), loss(student, teacher), rtol=1e-6, atol=0)


# Spectral analysis


def maps_of(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def result_of(*batches, seed=0):
    profile = SpectralProfile(seed)
    for maps in batches:
        profile.add(maps)
    return profile.result()


def assert_close(found, expected, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (1, 7, 3, 5), (3, 1, 2, 2), (2, 8, 1, 1)])
def test_spectra_are_numpys(shape):
    maps = maps_of(shape)
    expected = np.abs(np.fft.fft(maps.numpy(), axis=1) / shape[1]).mean(axis=(0, 2, 3))
    assert_close(layerwise_spectrum(maps), torch.from_numpy(expected), atol=1e-14)
    expected = (np.abs(np.fft.fft2(maps.numpy(), norm="ortho")) ** 2).mean(axis=(0, 1))
    assert_close(power_spectrum(maps), torch.from_numpy(expected), atol=1e-14)


@pytest.mark.parametrize("size", [(4, 4), (3, 8), (1, 1), (14, 14)])
def test_radial_average_is_the_mean_over_each_ring(size):
    power = maps_of(size).abs()
    rings = {}
    for y, x in itertools.product(*map(range, size)):
        cycles = [min(k, n - k) / n for k, n in zip((y, x), size, strict=True)]
        rings.setdefault(round(math.hypot(*cycles) * min(size)), []).append(power[y, x].item())
    radius, mean = radial_average(power)
    assert sorted(rings) == list(range(len(mean)))
    assert_close(mean.tolist(), [float(np.mean(rings[r])) for r in range(len(mean))])
    assert_close(radius.tolist(), [r / min(size) for r in range(len(mean))])


def test_intensity_of_gaussian_features_follows_their_rms():
    result = result_of(3.0 * maps_of((4, 192, 8, 8)))
    ratio = result["intensity_corrected"] / result["rms"]
    assert_close(ratio.item(), math.sqrt(math.pi) / 2, rtol=0.02)


@pytest.mark.parametrize("parts", [(1,) * 8, (5, 3)])
def test_streaming_equals_one_batch(parts):
    maps = maps_of((8, 6, 5, 3))
    whole, streamed = result_of(maps), result_of(*maps.split(parts))
    for name, value in whole.items():
        assert_close(streamed[name], value)


def test_results_are_what_their_names_promise():
    maps = maps_of((4, 6, 3, 3))
    result = result_of(maps)
    assert_close(result["intensity"], layerwise_spectrum(maps).mean())
    assert_close(result["rms"], maps.square().mean().sqrt())
    assert_close(result["intensity_corrected"], result["intensity"] * math.sqrt(6))


def test_shuffling_changes_only_features_with_ordered_channels():
    unordered = result_of(maps_of((4, 64, 4, 4)) * torch.linspace(0.5, 2, 64)[torch.randperm(64)].view(-1, 1, 1))
    assert_close(unordered["intensity_shuffled"], unordered["intensity"], rtol=0.05)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(64, dtype=torch.float64) / 64)
    ordered = result_of(maps_of((4, 1, 4, 4)) * wave.view(-1, 1, 1))
    assert ordered["intensity_shuffled"] > 2 * ordered["intensity"]


def test_the_seed_fixes_one_permutation_for_all_batches():
    maps = maps_of((4, 16, 2, 2))
    assert result_of(*maps.split(1))["intensity_shuffled"] == result_of(*maps.split(1))["intensity_shuffled"]
    assert result_of(maps, seed=1)["intensity_shuffled"] != result_of(maps)["intensity_shuffled"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_results_are_float64_for_maps_of_any_precision(dtype):
    maps = maps_of((2, 6, 3, 3), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = result_of(maps)
    exact = result_of(maps.double())
    for name, value in result.items():
        assert value.dtype == torch.float64
        assert_close(value, exact[name], rtol=1e-5, atol=1e-6)


def test_a_profile_without_images_has_no_result():
    with pytest.raises(RuntimeError, match="no maps"):
        SpectralProfile().result()
