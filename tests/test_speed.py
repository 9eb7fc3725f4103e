"""Fast paths compute what the reference implementation does: the closed form, compile, whole steps."""

import copy
import json

import pytest
import timm
import torch
import torch._inductor.config
from conftest import distil, tiny_run
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import main
import models
import spectral
import utils
from benchmarks import reference
from builders import build_optimizer
from checkpoint import TrainState
from engine import ConstantScaler, DivergenceWatch, train_one_epoch
from flags import parse_args

TERMS = ("loss", *losses.TERMS)


class CountOps(TorchDispatchMode):
    """Count how often the operator `op` runs."""

    def __init__(self, op):
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.op
        return func(*args, **(kwargs or {}))


# Closed form


def peak_of(function):
    """Return the peak memory of the function in bytes, beyond what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return torch.tensor([event.nbytes() for event in events]).cumsum(0).max().item()


@pytest.mark.parametrize("teacher_channels", [48, 96])
def test_the_closed_form_takes_less_memory_than_two_maps(teacher_channels):
    """Value and gradient together; the transform needs more than three."""
    student = torch.randn(16, 196, 48).transpose(1, 2).unflatten(2, (14, 14)).requires_grad_()
    teacher = torch.randn(16, 196, teacher_channels).transpose(1, 2).unflatten(2, (14, 14))
    map_bytes = 4 * student.numel()
    assert peak_of(lambda: spectral.spectral_loss(student, teacher).backward()) > 3 * map_bytes
    student.grad = None
    assert map_bytes < peak_of(lambda: spectral.closed_spectral_loss(student, teacher).backward()) < 2 * map_bytes


@pytest.mark.skipif(torch.__version__ < "2.6", reason="fake CUDA tensors need a GPU there")
def test_the_closed_form_runs_in_one_piece_on_a_gpu():
    """In eight pieces the feature loss would be a third of a training step's kernel launches."""
    pieces = {}
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            student, teacher = torch.empty(2, 16, 48, 14, 14, device=device)
            with CountOps(torch.ops.aten.sum.dim_IntList) as sums:
                spectral.closed_spectral_loss(student, teacher)
            pieces[device] = sums.count
    assert pieces == {"cpu": 8, "cuda": 1}


def test_the_gradient_of_the_closed_form_is_available_once():
    student, teacher = torch.randn(2, 2, 3, 4, 4)
    loss = spectral.closed_spectral_loss(student.requires_grad_(), teacher)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


# Whole runs


def run_terms(folder, *flags):
    """Run main.py in this process and return its logged terms (epochs, terms)."""
    main.main(main.parse_args(tiny_run(*flags, "--output_dir", folder)))
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return torch.tensor([[line[f"train_{name}"] for name in TERMS] for line in lines])


@pytest.mark.slow
def test_a_closed_form_run_has_the_terms_of_the_transform(teacher_file, tmp_path):
    """4 epochs of 5 steps; float32 rounding, which training amplifies."""
    flags = [*distil(teacher_file), "--lr", 0.01, "--gratings-sizes", 80, 8, "--epochs", 4, "--spectral-impl"]
    closed, by_transform = (run_terms(tmp_path / impl, *flags, impl) for impl in ("closed", "fft"))
    assert len(closed) == 4
    torch.testing.assert_close(closed, by_transform, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_compiled_run_has_the_terms_of_an_eager_one(tmp_path):
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}  # quick to compile
    teacher = timm.create_model("deit_tiny_patch16_224", num_classes=24, **kwargs)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    flags = ["--distillation-type", "soft", "--teacher-model", "deit_tiny_patch16_224", "--teacher-path"]
    flags += [tmp_path / "teacher.pth", "--teacher-kwargs", *(f"{name}={value}" for name, value in kwargs.items())]
    flags += ["--s-id", 3, "--t-id", 0, "--gratings-sizes", 32, 8, "--compile"]
    eager, compiled = (run_terms(tmp_path / what, *flags, what) for what in ("none", "teacher"))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)
    keys = torch.load(tmp_path / "teacher" / "checkpoint.pth", weights_only=True)["model"]
    assert not [key for key in keys if "_orig" in key]


# Training steps


def train_epoch(model, hooks, criterion, batches, optimizer, meter=None, scaler=None):
    scaler = scaler or torch.amp.GradScaler("cpu")
    state = TrainState(model, optimizer, None, scaler, ModelEmaV3(model), ["loss", *losses.TERMS])
    state.meter = meter or state.meter
    device, prepare = torch.device("cpu"), nn.Identity()
    train_one_epoch(state, batches, criterion, hooks, device=device, prepare=prepare, watch=DivergenceWatch())


def host_reads(num_steps, fused):
    """Return how often an epoch with one console line makes the host wait for a number from the device."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))
    batches = [(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))] * num_steps
    criterion = losses.DistillationLoss(nn.CrossEntropyLoss())
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, fused=fused)
    with CountOps(torch.ops.aten._local_scalar_dense.default) as reads:
        train_epoch(model, spectral.FeatureHooks(model), criterion, batches, optimizer)
    return reads.count


def test_no_step_with_the_default_optimizer_waits():
    """AdamW without its fused kernel does wait, which shows that waits are counted."""
    assert host_reads(8, fused=True) == host_reads(4, fused=True)
    assert host_reads(8, fused=False) > host_reads(4, fused=False)
    optimizer, *_ = build_optimizer(parse_args(tiny_run()), nn.Linear(2, 2), nn.Module())
    assert all(group["fused"] for group in optimizer.param_groups)


class Rows(utils.Meter):
    """A meter that also keeps every row."""

    def __init__(self):
        super().__init__(TERMS)
        self.rows = []

    def add(self, row):
        super().add(row)
        self.rows.append(row)


def reference_terms(student, hooks, criterion, batches):
    """Return the terms (steps, terms) of a hand-written loop with AdamW, one tensor at a time."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0, foreach=False)
    rows = []
    for images, labels in batches:
        terms = criterion(images, student(images), hooks.pop(), labels)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        rows.append([terms[name].item() for name in TERMS])
    return torch.tensor(rows)


def engine_terms(student, hooks, criterion, batches):
    """Return the terms (steps, terms) of `train_one_epoch`."""
    meter = Rows()
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=0.0, fused=True)
    train_epoch(student, hooks, criterion, batches, optimizer, meter, ConstantScaler("cpu"))
    return torch.tensor(meter.rows)


def test_twenty_steps_have_the_terms_of_the_reference():
    """timm's teacher and two stacked transforms; float32 rounding, which training amplifies."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, embed_dim=24, depth=4, num_heads=3, num_classes=5)
    teacher = timm.create_model("cait_s24_224", img_size=64, embed_dim=48, depth=3, num_heads=4, num_classes=5)
    for parameter in teacher.parameters():  # untrained layer scales would hide the attention
        parameter.detach().add_(torch.randn_like(parameter), alpha=0.05)
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(5, (4,))) for _ in range(20)]
    by_hand, fast = (
        train(student := copy.deepcopy(model), spectral.FeatureHooks(student, [0, 3]), criterion_of(*parts), batches)
        for train, *parts in (
            (reference_terms, copy.deepcopy(teacher), reference.spectral_loss),
            (engine_terms, models.fast_attention(copy.deepcopy(teacher)), spectral.closed_spectral_loss),
        )
    )
    assert by_hand.shape == (20, 4)
    assert by_hand[-1, 0] < by_hand[0, 0]
    torch.testing.assert_close(fast, by_hand, rtol=1e-4, atol=0)


def criterion_of(teacher, feature_loss):
    frozen = losses.FrozenTeacher(teacher, [0, 2])
    return losses.DistillationLoss(nn.CrossEntropyLoss(), "soft", frozen, 0.9, feature_loss=feature_loss)
