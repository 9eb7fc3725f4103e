"""What was made faster still computes the same: the closed form of the loss, and the attention of frozen teachers."""

import json

import pytest
import timm
import torch
from conftest import distil, tiny_run

import attention
import losses
import main
import spectral

SHAPES = [
    *((2, 3, 4, 4), (1, 1, 1, 1), (3, 2, 5, 7), (2, 4, 7, 5), (1, 5, 1, 6), (2, 2, 6, 1), (9, 3, 3, 3)),
    *((17, 2, 2, 2), (4, 6, 14, 14), (2, 8, 7, 7), (5, 2, 8, 9)),
]


def value_and_gradients(loss, student, teacher):
    student, teacher = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    value = loss(student, teacher)
    return value, *torch.autograd.grad(3 * value, (student, teacher))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_closed_form_has_value_and_gradients_of_the_transform(shape):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape, dtype=torch.float64)
    closed = value_and_gradients(spectral.closed_spectral_loss, student, teacher)
    by_transform = value_and_gradients(spectral.spectral_loss, student, teacher)
    torch.testing.assert_close(closed, by_transform, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "shapes", [((3, 4, 6, 6), (3, 8, 6, 6)), ((3, 8, 6, 6), (3, 4, 3, 3)), ((2, 3, 7, 7), (2, 5, 14, 14))]
)
def test_the_closed_form_pools_as_the_transform_does(shapes):
    torch.manual_seed(0)
    student, teacher = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    closed = value_and_gradients(spectral.closed_spectral_loss, student, teacher)
    by_transform = value_and_gradients(spectral.spectral_loss, student, teacher)
    torch.testing.assert_close(closed, by_transform, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["tokens", "channels last", "half"])
def test_the_closed_form_takes_maps_as_they_lie(layout):
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, 49, 6)
    student, teacher = tokens.transpose(2, 3).unflatten(3, (7, 7))
    if layout == "channels last":
        student, teacher = student.contiguous(memory_format=torch.channels_last), teacher.contiguous()
    if layout == "half":
        student, teacher = student.half(), teacher.half()
    value = spectral.closed_spectral_loss(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, spectral.spectral_loss(student, teacher), rtol=1e-5, atol=0)


def test_the_closed_form_gives_no_gradient_to_a_teacher_that_wants_none():
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    student.requires_grad_()
    spectral.closed_spectral_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cait_s24_224", {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 4}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 4, "embed_dim": 12, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 3, 4)},
        ),
    ],
)
@torch.no_grad()
def test_the_attention_of_a_teacher_gives_the_numbers_of_timm_under_the_same_names(name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(3, 3, 64, 64)
    expected, weights = model(images), {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    fused = [getattr(module, "fused_attn", None) for module in model.modules()]
    attention.speed_up(model)
    changed = [type(module) for module in model.modules()] != kinds
    assert changed or [getattr(module, "fused_attn", None) for module in model.modules()] != fused
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)


@torch.no_grad()
def test_other_models_are_left_alone():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3)
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in attention.speed_up(model).modules()] == before


def test_twenty_steps_by_the_closed_form_have_the_terms_of_the_transform(teacher_file, tmp_path):
    """Terms averaged over each epoch of 4 x 5 steps; rounding of float32, which training makes larger."""
    terms = {}
    for impl in ("closed", "fft"):
        flags = ["--gratings-sizes", 80, 8, "--epochs", 4, "--spectral-impl", impl, "--output_dir", tmp_path / impl]
        main.main(main.parse_args(tiny_run(*distil(teacher_file), "--lr", 0.01, *flags)))
        lines = [json.loads(line) for line in (tmp_path / impl / "log.txt").read_text().splitlines()]
        terms[impl] = torch.tensor([[line[f"train_{name}"] for name in ("loss", *losses.TERMS)] for line in lines])
    assert len(terms["closed"]) == 4
    torch.testing.assert_close(terms["closed"], terms["fft"], rtol=1e-5, atol=0)


def test_a_compiled_run_has_the_terms_of_one_that_is_not(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}  # a compiler takes its time
    teacher = timm.create_model("deit_tiny_patch16_224", num_classes=24, **kwargs)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    shape = [f"{name}={value}" for name, value in kwargs.items()]
    distilled = ["--distillation-type", "soft", "--teacher-model", "deit_tiny_patch16_224", "--teacher-kwargs", *shape]
    distilled += ["--teacher-path", tmp_path / "teacher.pth", "--s-id", 3, "--t-id", 0]
    terms = {}
    for compiled in ("none", "teacher"):
        folder = tmp_path / compiled
        flags = ["--gratings-sizes", 32, 8, "--compile", compiled, "--output_dir", folder]
        main.main(main.parse_args(tiny_run(*distilled, *flags)))
        line = json.loads((folder / "log.txt").read_text())
        terms[compiled] = torch.tensor([line[f"train_{name}"] for name in ("loss", *losses.TERMS)])
        assert not [key for key in torch.load(folder / "checkpoint.pth", weights_only=True)["model"] if "_orig" in key]
    torch.testing.assert_close(terms["teacher"], terms["none"], rtol=1e-4, atol=0)
