"""What was made faster still computes the same: the closed form of the loss, and the attention of frozen teachers."""

import copy
import functools
import importlib.util
import json

import pytest
import timm
import torch
import torch._inductor.config
from conftest import ROOT, distil, tiny_run
from timm.optim import create_optimizer_v2
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import losses
import main
import spectral
import utils
from engine import train_one_epoch

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


def peak_of(function):
    """Most bytes that were allocated at one time while the function ran, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = torch.tensor([event.nbytes() for event in events]).cumsum(0)
    return held.max().item()


@pytest.mark.parametrize("teacher_channels", [48, 96])
def test_the_closed_form_and_its_gradient_take_less_than_two_maps(teacher_channels):
    student = torch.randn(16, 196, 48).transpose(1, 2).unflatten(2, (14, 14)).requires_grad_()
    teacher = torch.randn(16, 196, teacher_channels).transpose(1, 2).unflatten(2, (14, 14))
    map_bytes = 4 * student.numel()
    assert peak_of(lambda: spectral.spectral_loss(student, teacher).backward()) > 3 * map_bytes
    student.grad = None
    assert map_bytes < peak_of(lambda: spectral.closed_spectral_loss(student, teacher).backward()) < 2 * map_bytes


def test_the_gradient_of_the_closed_form_is_asked_for_once():
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    loss = spectral.closed_spectral_loss(student.requires_grad_(), teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


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


def test_a_missing_compiler_is_said_in_one_line(capsys):
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent"), "force_disable_caches": True}):
        assert not main.can_compile(torch.device("cpu"))
    torch._dynamo.reset()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("--compile: no compiler works here")
    assert "/nonexistent" in line


class HostReads(TorchDispatchMode):
    """Counts the times that the host asks for a number of the device, for which it would wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_reads(num_steps, fused):
    """Of an epoch with one console line."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with HostReads() as reads:
        train_one_epoch(
            model,
            spectral.FeatureHooks(model),
            losses.DistillationLoss(nn.CrossEntropyLoss()),
            [(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))] * num_steps,
            optimizer=create_optimizer_v2(model, opt="adamw", lr=1e-3, fused=fused),
            scaler=torch.amp.GradScaler("cpu"),
            meter=main.new_meter(),
            epoch=0,
            device=torch.device("cpu"),
            prepare=nn.Identity(),
            seed_step=lambda *where: None,
            should_stop=lambda: False,
            update_ema=functools.partial(main.ModelEmaV3(model).update, model),
        )
    return reads.count


def test_no_step_waits_for_the_device_with_the_default_optimizer():
    """Between console lines; what AdamW asks for without its fused kernel shows that this would be noticed."""
    assert host_reads(8, fused=True) == host_reads(4, fused=True)
    assert host_reads(8, fused=False) > host_reads(4, fused=False)


def test_the_default_optimizer_is_the_fused_one():
    args = main.parse_args(tiny_run())
    optimizer, *_ = main.build_optimizer(args, nn.Linear(2, 2))
    assert all(group["fused"] for group in optimizer.param_groups)


def plain_formulation():
    spec = importlib.util.spec_from_file_location("plain", ROOT / "benchmarks" / "plain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rows(utils.Meter):
    """A meter that also keeps what it was given."""

    def __init__(self, names):
        super().__init__(names)
        self.rows = []

    def add(self, row):
        super().add(row)
        self.rows.append(row)


def terms_by_hand(student, hooks, criterion, batches):
    """(steps, terms) of a loop with AdamW, a tensor at a time."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    rows = []
    for images, labels in batches:
        terms = criterion(images, student(images), hooks.pop(), labels)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        rows.append([terms[name].item() for name in ("loss", *losses.TERMS)])
    return torch.tensor(rows)


def terms_by_engine(student, hooks, criterion, batches):
    """(steps, terms) of the program's own epoch."""
    meter = Rows(["loss", *losses.TERMS])
    train_one_epoch(
        student,
        hooks,
        criterion,
        batches,
        optimizer=create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=0.0, fused=True),
        scaler=main.ConstantScaler("cpu"),
        meter=meter,
        epoch=0,
        device=torch.device("cpu"),
        prepare=nn.Identity(),
        seed_step=lambda *where: None,
        should_stop=lambda: False,
    )
    return torch.tensor(meter.rows)


def test_twenty_steps_have_the_terms_of_the_plain_formulation():
    """timm's teacher and two stacked transforms; rounding of float32, which training enlarges."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    teacher = timm.create_model("cait_s24_224", img_size=64, embed_dim=48, depth=3, num_heads=4, num_classes=5)
    for parameter in teacher.parameters():  # fresh layer scales would hide the attention
        parameter.detach().add_(torch.randn_like(parameter), alpha=0.05)
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(5, (4,))) for _ in range(20)]
    ways = {
        "plain": (plain_formulation().spectral_loss, copy.deepcopy(teacher), terms_by_hand),
        "fast": (spectral.closed_spectral_loss, attention.speed_up(copy.deepcopy(teacher)), terms_by_engine),
    }
    terms = {}
    for name, (feature_loss, frozen, train) in ways.items():
        student = copy.deepcopy(model)
        hooks, frozen = spectral.FeatureHooks(student, [0, 3]), losses.FrozenTeacher(frozen, [0, 2])
        criterion = losses.DistillationLoss(nn.CrossEntropyLoss(), "soft", frozen, 0.9, feature_loss=feature_loss)
        terms[name] = train(student, hooks, criterion, batches)
    assert terms["plain"].shape == (20, 4)
    assert terms["plain"][-1, 0] < terms["plain"][0, 0]
    torch.testing.assert_close(terms["fast"], terms["plain"], rtol=1e-4, atol=0)
