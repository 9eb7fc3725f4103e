"""Feature hooks on every family, alignment of maps, and the spectral loss against a naive transform."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from spectral import FEATURE_LOSSES, SPECTRAL_LOSSES, FeatureHooks, align, describe_blocks, mse_loss, spectral_loss

GOLDEN = Path(__file__).parent / "golden"
VIT = {"img_size": 64, "embed_dim": 24, "depth": 4, "num_heads": 3}
CAIT = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 4}
SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}


def build(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with torch.no_grad():  # fresh layer scales are near zero, and a map would hardly tell a block from the next
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# Hooks


def vit_maps(model, x):
    """Every block's output after the class token, walked by hand; the prefix stands before the patches."""
    height, width = (size // 16 for size in x.shape[-2:])
    x = model.patch_embed(x)
    if hasattr(model, "dist_token") and model.dist_token is not None:
        prefix = torch.cat([model.cls_token, model.dist_token], dim=1)
    else:
        prefix = model.cls_token
    prefix = prefix.expand(len(x), -1, -1)
    if model.pos_embed.shape[1] == x.shape[1]:  # DeiT III adds no position to the class token
        x = torch.cat([prefix, x + model.pos_embed], dim=1)
    else:
        x = torch.cat([prefix, x], dim=1) + model.pos_embed
    maps = []
    for block in model.blocks:
        x = block(x)
        maps.append(x[:, prefix.shape[1] :].reshape(len(x), height, width, -1).permute(0, 3, 1, 2))
    return maps


def cait_maps(model, x):
    """The self-attention blocks see patch tokens alone; the class token enters behind them."""
    height, width = (size // 16 for size in x.shape[-2:])
    x = model.patch_embed(x) + model.pos_embed
    maps = []
    for block in model.blocks:
        x = block(x)
        assert x.shape[1] == height * width
        maps.append(x.reshape(len(x), height, width, -1).permute(0, 3, 1, 2))
    return maps


def swin_maps(model, x):
    x = model.patch_embed(x)
    maps = []
    for stage in model.layers:
        x = stage(x)
        maps.append(x.permute(0, 3, 1, 2))
    return maps


def convnext_maps(model, x):
    x = model.stem(x)
    maps = []
    for stage in model.stages:
        x = stage(x)
        maps.append(x)
    return maps


def resnet_maps(model, x):
    x = model.act1(model.bn1(model.conv1(x)))
    maps = [x]
    x = model.maxpool(x)
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def regnet_maps(model, x):
    maps = []
    for stage in (model.stem, model.s1, model.s2, model.s3, model.s4):
        x = stage(x)
        maps.append(x)
    return maps


FAMILIES = {
    "deit_tiny_patch16_224": (VIT, vit_maps),
    "deit_tiny_distilled_patch16_224": (VIT, vit_maps),
    "deit3_small_patch16_224": (VIT, vit_maps),
    "vit_tiny_patch16_224": (VIT, vit_maps),
    "cait_s24_224": (CAIT, cait_maps),
    "swin_tiny_patch4_window7_224": (SWIN, swin_maps),
    "convnext_atto": ({}, convnext_maps),
    "resnet18": ({}, resnet_maps),
    "regnety_002": ({}, regnet_maps),
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_maps_are_the_raw_block_outputs_of_every_family(name):
    kwargs, walk = FAMILIES[name]
    model, x = build(name, **kwargs), images(64, 64)
    expected = walk(model, x)
    ids = range(len(expected))
    hooks = FeatureHooks(model, ids)
    model(x)
    maps = hooks.pop()
    for i in ids:
        # the same operations in the same order: no rounding to allow for
        torch.testing.assert_close(maps[i], expected[i], rtol=0, atol=0)
        assert maps[i].shape[1] == describe_blocks(model)[i]["num_chs"]
    for one, other in itertools.pairwise(maps):
        assert one.shape != other.shape or not torch.equal(one, other)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "cait_s24_224", "swin_tiny_patch4_window7_224", "resnet18"])
@torch.no_grad()
def test_images_need_not_be_square(name):
    kwargs, walk = FAMILIES[name]
    kwargs = kwargs | ({"img_size": (64, 96)} if "img_size" in kwargs else {})
    model, x = build(name, **kwargs), images(64, 96)
    expected = walk(model, x)
    hooks = FeatureHooks(model, range(len(expected)))
    model(x)
    for got, wanted in zip(hooks.pop(), expected, strict=True):
        assert got.shape[3] * 2 == got.shape[2] * 3
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@torch.no_grad()
def test_the_prefix_is_what_the_grid_leaves_over():
    """One class token in DeiT, two tokens in a distilled DeiT, none in CaiT's blocks, one and four registers."""
    cases = {
        "deit_tiny_patch16_224": (VIT, 1),
        "deit_tiny_distilled_patch16_224": (VIT, 2),
        "cait_s24_224": (CAIT, 0),
        "vit_small_patch14_reg4_dinov2": (VIT | {"img_size": 56}, 5),
    }
    for name, (kwargs, prefix) in cases.items():
        model = build(name, **kwargs)
        tokens = []
        model.blocks[1].register_forward_hook(lambda module, inputs, output, to=tokens: to.append(output))
        hooks = FeatureHooks(model, [1])
        model(images(kwargs["img_size"], kwargs["img_size"]))
        assert tokens[0].shape[1] == 16 + prefix, name
        torch.testing.assert_close(hooks.pop()[0].flatten(2).transpose(1, 2), tokens[0][:, prefix:], rtol=0, atol=0)


@torch.no_grad()
def test_ids_keep_their_order_and_repeats():
    model = build("deit_tiny_patch16_224", **VIT)
    by_id, hooks = FeatureHooks(model, range(4)), FeatureHooks(model, [3, 0, 3, 1, 0])
    model(images(64, 64))
    maps = by_id.pop()
    got = hooks.pop()
    assert len(got) == 5
    for i, each in zip([3, 0, 3, 1, 0], got, strict=True):
        torch.testing.assert_close(each, maps[i], rtol=0, atol=0)


@pytest.mark.parametrize("ids", [[4], [-1], [0, 7]])
def test_an_id_out_of_range_is_refused_with_the_range(ids):
    with pytest.raises(ValueError, match=rf"block id {ids[-1]} is out of range.*0\.\.3"):
        FeatureHooks(build("deit_tiny_patch16_224", **VIT), ids)


def test_a_model_without_feature_info_is_refused():
    with pytest.raises(ValueError, match=r"Linear has no feature_info.*timm"):
        FeatureHooks(nn.Linear(2, 2), [0])


@torch.no_grad()
def test_maps_are_forgotten_on_read_and_belong_to_the_latest_forward():
    model = build("deit_tiny_patch16_224", **VIT)
    hooks = FeatureHooks(model, [1, 2])
    with pytest.raises(RuntimeError, match=r"\[1, 2\].*has not run"):
        hooks.pop()
    model(images(64, 64))
    model(images(64, 64)[:1])
    assert [len(each) for each in hooks.pop()] == [1, 1]
    with pytest.raises(RuntimeError, match="has not run since the last pop"):
        hooks.pop()


@torch.no_grad()
def test_hooks_without_ids_give_an_empty_list_at_any_time():
    model = build("deit_tiny_patch16_224", **VIT)
    hooks = FeatureHooks(model)
    assert hooks.pop() == []
    model(images(64, 64))
    assert hooks.pop() == []


@torch.no_grad()
def test_hooks_change_neither_forward_nor_state_dict_and_come_off():
    model = build("cait_s24_224", **CAIT)
    x = images(64, 64)
    before, keys, forward = model(x), list(model.state_dict()), model.forward
    hooks = FeatureHooks(model, [0, 3])
    assert list(model.state_dict()) == keys
    assert model.forward == forward
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert len(hooks.pop()) == 2
    hooks.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model(x)
    with pytest.raises(RuntimeError):
        hooks.pop()


def test_gradients_flow_from_the_maps_into_the_blocks_before():
    model = build("deit_tiny_patch16_224", **VIT)
    hooks = FeatureHooks(model, [1])
    model(images(64, 64))
    hooks.pop()[0].sum().backward()
    assert model.blocks[1].mlp.fc2.weight.grad is not None
    assert model.blocks[2].mlp.fc2.weight.grad is None


# Alignment


def naive_pool(x, size, dim):
    """Mean over the bins [floor(i n / m), ceil((i + 1) n / m)) along one dimension, in float64."""
    n = x.shape[dim]
    bins = [x.double().narrow(dim, i * n // size, -(-(i + 1) * n // size) - i * n // size) for i in range(size)]
    return torch.cat([each.mean(dim, keepdim=True) for each in bins], dim)


def pair(student, teacher, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(student, generator=generator), torch.randn(teacher, generator=generator)


def test_a_wider_teacher_gives_the_means_of_adjacent_channels():
    student, teacher = pair((2, 6, 3, 5), (2, 12, 3, 5))
    s, t = align(student, teacher)
    torch.testing.assert_close(s, student, rtol=0, atol=0)
    torch.testing.assert_close(t, (teacher[:, 0::2] + teacher[:, 1::2]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 12, 4, 4), (2, 6, 4, 4)),  # wider student
        ((2, 6, 4, 4), (2, 10, 4, 4)),  # no whole ratio
        ((2, 6, 8, 8), (2, 6, 4, 4)),  # finer student
        ((2, 6, 4, 4), (2, 6, 7, 9)),  # finer teacher, no whole ratio
        ((2, 12, 3, 8), (2, 6, 6, 4)),  # each is larger in one dimension
        ((2, 6, 1, 1), (2, 6, 5, 5)),  # a 1 x 1 grid must not be broadcast
    ],
)
def test_the_larger_side_is_pooled_in_each_dimension(student, teacher):
    student, teacher = pair(student, teacher)
    aligned = align(student, teacher)
    for got, x in zip(aligned, (student, teacher), strict=True):
        for dim in (1, 2, 3):
            x = naive_pool(x, min(student.shape[dim], teacher.shape[dim]), dim)
        torch.testing.assert_close(got, x.float(), rtol=1e-5, atol=1e-6)


def test_maps_of_different_batches_are_refused():
    with pytest.raises(ValueError, match="hold 2 and 3 images"):
        align(*pair((2, 4, 3, 3), (3, 4, 3, 3)))


# Loss

SHAPES = [
    (2, 3, 4, 4),
    (2, 3, 5, 5),
    (1, 2, 3, 6),
    (3, 2, 6, 3),
    (2, 5, 1, 1),
    (2, 3, 1, 4),
    (2, 3, 4, 1),
    (1, 4, 14, 14),
]


def dft(n, rows):
    """The first rows of the orthonormal transform's matrix, complex128."""
    k, x = torch.arange(rows).double()[:, None], torch.arange(n).double()
    return torch.polar(torch.full((rows, n), n**-0.5, dtype=torch.float64), -2 * torch.pi * k * x / n)


def naive_loss(student, teacher):
    """The definition word by word, float64: both spectra by matrix products, then the mean over 2 B C H K numbers."""
    height, width = student.shape[-2:]
    columns = dft(width, width // 2 + 1).transpose(0, 1)
    spectra = [dft(height, height) @ x.double().to(torch.complex128) @ columns for x in (student, teacher)]
    difference = spectra[0] - spectra[1]
    return (difference.real**2 + difference.imag**2).sum() / (2 * difference.numel())


@pytest.mark.parametrize("loss_of", SPECTRAL_LOSSES.values(), ids=SPECTRAL_LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_a_naive_transform(shape, loss_of):
    student, teacher = pair(shape, shape)
    student.requires_grad_()
    loss = loss_of(student, teacher)
    (grad,) = torch.autograd.grad(loss, student)
    expected = naive_loss(student, teacher)
    (expected_grad,) = torch.autograd.grad(expected, student)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_of", SPECTRAL_LOSSES.values(), ids=SPECTRAL_LOSSES)
def test_pooled_pairs_have_the_loss_of_their_pooled_maps(loss_of):
    student, teacher = pair((2, 6, 4, 4), (2, 12, 8, 8))
    pooled = naive_pool(naive_pool(naive_pool(teacher, 6, 1), 4, 2), 4, 3)
    torch.testing.assert_close(loss_of(student, teacher).double(), naive_loss(student, pooled), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss_of", SPECTRAL_LOSSES.values(), ids=SPECTRAL_LOSSES)
def test_golden_pairs_have_the_original_loss_and_gradient(loss_of):
    golden = np.load(GOLDEN / "layer_loss.npz")
    cases = sorted({key.split("/")[0] for key in golden})
    assert len(cases) == 8
    for case in cases:
        student, teacher, wanted_grad = (
            torch.from_numpy(golden[f"{case}/{name}"]) for name in ("student", "teacher", "grad_student")
        )
        student.requires_grad_()
        loss = loss_of(student, teacher)
        (grad,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(loss.item(), float(golden[f"{case}/loss"]), rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-8)


def test_the_full_spectrum_would_keep_the_energy_of_the_difference():
    """Parseval: half spectrum with the mirrored columns counted twice is the feature MSE; ours counts them once."""
    for shape in SHAPES:
        student, teacher = pair(shape, shape)
        difference = (student - teacher).double()
        width = shape[-1]
        spectrum = torch.fft.rfft2(difference, norm="ortho").abs().square()
        mirrored = spectrum[..., 1 : (width + 1) // 2]
        torch.testing.assert_close(spectrum.sum() + mirrored.sum(), difference.square().sum(), rtol=1e-12, atol=0)
        loss = spectral_loss(student, teacher).double()
        torch.testing.assert_close(loss, spectrum.sum() / (2 * spectrum.numel()), rtol=1e-6, atol=0)


def test_loss_is_weighted_mse_plus_a_penalty_on_row_means():
    for shape in SHAPES:
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


def test_the_spatial_twin_equals_the_spectral_loss_where_rows_have_no_mean():
    student, teacher = pair((2, 3, 6, 7), (2, 3, 6, 7))
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))  # odd width: no Nyquist column
    torch.testing.assert_close(mse_loss(student, teacher), spectral_loss(student, teacher), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_feature_losses_are_zero_for_equal_maps_and_positive_otherwise(name):
    student, teacher = pair((2, 3, 4, 5), (2, 3, 4, 5))
    assert FEATURE_LOSSES[name](student, student.clone()) == 0
    assert FEATURE_LOSSES[name](student, teacher) > 0


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_gradient_goes_to_the_student_alone(name):
    student, teacher = pair((2, 3, 4, 4), (2, 6, 4, 4))
    student.requires_grad_()
    FEATURE_LOSSES[name](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [3, 6])  # autocast's own pooling makes float32 of what it pools
def test_loss_is_float32_inside_autocast_and_for_half_maps(name, dtype, width):
    student, teacher = (x.to(dtype) for x in pair((2, 3, 7, 7), (2, width, 7, 7)))
    expected = FEATURE_LOSSES[name](student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FEATURE_LOSSES[name](student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(FEATURE_LOSSES))
def test_memory_layout_does_not_matter(name):
    """Hooks hand on views: token maps have their channels last in memory."""
    student, teacher = pair((2, 6, 4, 4), (2, 12, 4, 4))
    views = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (student, teacher)]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(FEATURE_LOSSES[name](*views), FEATURE_LOSSES[name](student, teacher), rtol=1e-6, atol=0)
