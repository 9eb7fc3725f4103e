"""Feature hooks against blocks run by hand, alignment, feature losses and spectral analysis against numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from families import build, images

import spectral
from spectral import (
    SPECTRAL_IMPLEMENTATIONS,
    FeatureHooks,
    SpectralProfile,
    align,
    layerwise_spectrum,
    power_spectrum,
    radial_average,
)

LOSSES = SPECTRAL_IMPLEMENTATIONS | {"mse": spectral.mse_loss}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_implementation = pytest.mark.parametrize("loss", SPECTRAL_IMPLEMENTATIONS.values(), ids=SPECTRAL_IMPLEMENTATIONS)


DEPTH = {"depth": 4}
MODELS = {
    "deit_tiny_patch16_224": DEPTH,
    "deit_tiny_distilled_patch16_224": DEPTH,
    "vit_small_patch14_reg4_dinov2": DEPTH | {"embed_dim": 24, "num_heads": 3, "img_size": (56, 84)},
    "cait_s24_224": DEPTH,
    # As many channels as rows, so that only the model's layout tells NHWC from NCHW.
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
    "convnext_atto": {},
    "resnet18": {},
    "regnety_160": {},
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_maps_are_the_raw_block_outputs(name):
    """Exactly those of timm, on images that are not square, without the prefix tokens (0, 1, 2 or 5 of them)."""
    kwargs = MODELS[name]
    model, x = build(name, input_size=(64, 96), **kwargs), images(*kwargs.get("img_size", (64, 96)))
    blocks = spectral.describe_blocks(model)
    expected = model.forward_intermediates(x, intermediates_only=True)
    hooks = FeatureHooks(model, range(len(blocks)))
    model(x)
    maps = hooks.pop()
    assert [each.shape[1] for each in maps] == [block["num_chs"] for block in blocks]
    # timm 1.0.11 also returns ConvNeXt's stem.
    torch.testing.assert_close(maps, expected[-len(blocks) :], rtol=0, atol=0)


@pytest.fixture
def deit():
    return build("deit_tiny_patch16_224", depth=4)


@torch.no_grad()
def test_ids_keep_their_order_and_repeats(deit):
    ids = [3, 0, 3, 1, 0]
    every, hooks = FeatureHooks(deit, range(4)), FeatureHooks(deit, ids)
    deit(images())
    maps = every.pop()
    torch.testing.assert_close(hooks.pop(), [maps[i] for i in ids], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [4, -1])
def test_an_id_out_of_range_is_refused_with_the_range(bad, deit):
    with pytest.raises(ValueError, match=rf"block id {bad} is out of range.*0\.\.3"):
        FeatureHooks(deit, [0, bad])


def test_outputs_with_other_channels_are_refused(deit):
    deit.feature_info[1]["num_chs"] = 25
    FeatureHooks(deit, [1])
    with pytest.raises(ValueError, match=r"blocks\.1.* 24 channels, but its feature_info says 25"):
        deit(images())


def test_a_model_without_feature_info_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no map of any block: .*no feature_info"):
        FeatureHooks(torch.nn.Linear(2, 2), [0])


@torch.no_grad()
def test_pop_returns_and_forgets_the_latest_forward(deit):
    hooks, none = FeatureHooks(deit, [1, 2]), FeatureHooks(deit)
    deit(images())
    deit(images()[:1])
    assert [len(each) for each in hooks.pop()] == [1, 1]
    with pytest.raises(RuntimeError, match="no forward pass since the last pop"):
        hooks.pop()
    assert none.pop() == []


@torch.no_grad()
def test_hooks_leave_forward_and_state_dict_alone():
    model, x = build("cait_s24_224"), images()
    before, keys, forward = model(x), list(model.state_dict()), model.forward
    hooks = FeatureHooks(model, [0, 1])
    assert list(model.state_dict()) == keys
    assert model.forward == forward
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    hooks.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        hooks.pop()


def test_gradients_flow_from_a_map_to_earlier_blocks_only(deit):
    hooks = FeatureHooks(deit, [1])
    deit(images())
    hooks.pop()[0].sum().backward()
    assert [block.mlp.fc2.weight.grad is not None for block in deit.blocks] == [True, True, False, False]


def naive_pool(x, shape):
    """Means over the bins [floor(i n / m), ceil((i + 1) n / m)) along C, H and W, in float64."""
    for dim, size in enumerate(shape, 1):
        n = x.shape[dim]
        bins = [x.double().narrow(dim, i * n // size, -(-(i + 1) * n // size) - i * n // size) for i in range(size)]
        x = torch.cat([each.mean(dim, keepdim=True) for each in bins], dim)
    return x


def pair(student, teacher):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(student, generator=generator), torch.randn(teacher, generator=generator)


POOLED = [
    ((2, 6, 3, 5), (2, 12, 3, 5)),  # wider teacher: means of adjacent channels
    ((2, 6, 4, 4), (2, 10, 4, 4)),  # no integer ratio
    ((2, 6, 8, 8), (2, 6, 4, 4)),  # finer student
    ((2, 6, 4, 4), (2, 6, 7, 9)),  # finer teacher, no integer ratio
    ((2, 12, 3, 8), (2, 6, 6, 4)),  # each is larger in one dimension
    ((2, 6, 1, 1), (2, 6, 5, 5)),  # a 1 x 1 grid must not be broadcast
]


@pytest.mark.parametrize("shapes", POOLED, ids=str)
def test_the_larger_side_is_pooled_in_each_dimension(shapes):
    maps = pair(*shapes)
    for got, x in zip(align(*maps), maps, strict=True):
        expected = naive_pool(x, map(min, *(shape[1:] for shape in shapes)))
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-6)


def test_maps_of_different_batch_sizes_are_refused():
    with pytest.raises(ValueError, match="2 images and the teacher's 3"):
        align(*pair((2, 4, 3, 3), (3, 4, 3, 3)))


SHAPES = [
    *((2, 3, 4, 4), (3, 2, 5, 7), (2, 4, 7, 6), (1, 1, 1, 1), (2, 3, 1, 4), (2, 3, 4, 1)),
    *((9, 3, 3, 3), (17, 2, 2, 2), (1, 4, 14, 14)),  # batches around the eight pieces of the closed form
]


def dft(n, rows):
    """The first rows of the orthonormal transform's matrix, complex128."""
    k, x = torch.arange(rows).double()[:, None], torch.arange(n).double()
    return torch.polar(torch.full((rows, n), n**-0.5, dtype=torch.float64), -2 * torch.pi * k * x / n)


def naive_loss(student, teacher):
    """The definition, in float64: both spectra by matrix products."""
    height, width = student.shape[-2:]
    columns = dft(width, width // 2 + 1).transpose(0, 1)
    spectra = [dft(height, height) @ x.double().to(torch.complex128) @ columns for x in (student, teacher)]
    return torch.view_as_real(spectra[0] - spectra[1]).square().mean()


@each_implementation
@pytest.mark.parametrize("shapes", [*((shape, shape) for shape in SHAPES), *POOLED], ids=str)
def test_loss_and_gradients_equal_a_naive_transform(shapes, loss):
    maps = [x.double().requires_grad_() for x in pair(*shapes)]
    pooled = [naive_pool(x, list(map(min, *(shape[1:] for shape in shapes)))) for x in maps]
    got, expected = ((value, *torch.autograd.grad(3 * value, maps)) for value in (loss(*maps), naive_loss(*pooled)))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-14)


@each_implementation
def test_golden_pairs_have_the_original_loss_and_gradient(loss):
    golden = np.load(ROOT / "tests/golden/layer_loss.npz")
    for case in {key.split("/")[0] for key in golden}:
        student, teacher, expected = (
            torch.from_numpy(golden[f"{case}/{name}"]) for name in ("student", "teacher", "grad_student")
        )
        student.requires_grad_()
        value = loss(student, teacher)
        (grad,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(value.item(), float(golden[f"{case}/loss"]), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_loss_is_weighted_mse_plus_a_penalty_on_row_means(shape):
    student, teacher = pair(shape, shape)
    width = shape[-1]
    d = (student - teacher).double()
    rows = d.sum(-1).square().sum() / width
    if width % 2 == 0:
        rows = rows + (d * (-1.0) ** torch.arange(width)).sum(-1).square().sum() / width
    penalty = rows / (4 * d.numel() / width * (width // 2 + 1))
    mse = spectral.mse_loss(student, teacher).double()
    torch.testing.assert_close(mse, d.square().mean() * width / (4 * (width // 2 + 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(spectral.spectral_loss(student, teacher).double(), mse + penalty, rtol=1e-6, atol=0)


@each_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 1])
def test_one_bad_value_in_a_map_makes_the_loss_not_finite(loss, bad, position):
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
    assert_close(result["intensity_corrected"], result["rms"] * math.sqrt(math.pi) / 2, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_profile_has_what_its_names_promise(dtype):
    """In float64, for maps of any precision in batches of any size."""
    maps = maps_of((8, 6, 5, 3), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = result_of(*maps.split((1, 5, 2)))
    maps = maps.double()
    intensity = layerwise_spectrum(maps).mean()
    radius, power = radial_average(power_spectrum(maps))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    expected = {
        "intensity": intensity,
        "intensity_shuffled": layerwise_spectrum(maps[:, order]).mean(),
        "intensity_corrected": intensity * math.sqrt(6),
        "rms": maps.square().mean().sqrt(),
        "spectrum": layerwise_spectrum(maps),
        "radial_frequency": radius,
        "radial_power": power,
    }
    assert_close(result, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5)


def test_shuffling_changes_only_features_with_ordered_channels():
    unordered = result_of(maps_of((4, 64, 4, 4)) * torch.linspace(0.5, 2, 64)[torch.randperm(64)].view(-1, 1, 1))
    assert_close(unordered["intensity_shuffled"], unordered["intensity"], rtol=0.05)
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(64, dtype=torch.float64) / 64)
    ordered = maps_of((4, 1, 4, 4)) * wave.view(-1, 1, 1)
    shuffled = [result_of(*ordered.split(1), seed=seed)["intensity_shuffled"] for seed in (0, 1, 0)]
    assert shuffled[0] > 2 * result_of(ordered)["intensity"]
    assert shuffled[0] == shuffled[2] != shuffled[1]
