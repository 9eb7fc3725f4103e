"""The GPU path on FakeTensors of cuda:0, which need no GPU: kernels, bytes, and where the host waits."""

import contextlib
import copy
from unittest import mock

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import datasets
import engine
import losses
import models
import spectral
from benchmarks import counting
from checkpoint import TrainState

if not hasattr(torch.library, "triton_op"):
    pytest.skip("before torch 2.6, autograd asks the CUDA driver about FakeTensors", allow_module_level=True)

PAIRS = [0, 1, 6, 7, 8, 9, 10, 11], [0, 1, 18, 19, 20, 21, 22, 23]


@contextlib.contextmanager
def fake_cuda():
    """FakeTensors of cuda:0, also where the engine asks for streams and memory, which need a GPU."""
    absent = {"Stream": mock.MagicMock(), "current_stream": mock.MagicMock(), "stream": contextlib.nullcontext()}
    absent |= {"max_memory_allocated": 0, "max_memory_reserved": 0}
    with counting.fake_cuda() as device, contextlib.ExitStack() as stack:
        for name, value in absent.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", return_value=value))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        yield device
    engine.copy_stream.cache_clear()


def forward(model, choice="eager", batch=256):
    """Return the counts of a frozen CaiT's forward under float16 autocast."""
    with fake_cuda() as device, torch.no_grad():
        model = models.fast_attention(counting.to_fake(model.eval()), choice)
        images = torch.empty(batch, 3, 224, 224, device=device)
        with counting.Count() as count, torch.autocast("cuda", dtype=torch.float16):
            model(images)
    return count


def test_teacher_moves_99_gigabytes_at_most():
    """CaiT-S24 at batch 256; timm's attention moves 152 GB by the same count, ours before moved 122."""
    assert forward(timm.create_model("cait_s24_224")).bytes < 99e9


def test_attention_maps_are_never_float32():
    for choice, expected in (("timm", True), ("eager", False)):
        count = forward(timm.create_model("cait_s24_224", depth=2), choice, batch=4)
        sizes = {torch.Size(shape).numel() for dtype, shape in count.tensors if dtype == torch.float32}
        assert (4 * 8 * 196 * 196 in sizes) == expected


def test_triton_kernel_is_used_under_float16():
    pytest.importorskip("triton")
    count = forward(timm.create_model("cait_s24_224", depth=2), "triton", batch=4)
    assert count.by_operator["mix_softmax_mix"][0] == 2
    assert count.by_operator["bmm"][0] == 2 * 2  # q k^T and the product with v in each block


@pytest.mark.parametrize("shapes", [((256, 192, 14, 14), (256, 384, 14, 14)), ((256, 96, 56, 56), (256, 96, 56, 56))])
def test_feature_loss_takes_20_kernels_per_pair_at_most(shapes):
    with fake_cuda() as device:
        student, teacher = (torch.empty(shape, device=device) for shape in shapes)
        with counting.Count() as count:
            spectral.closed_spectral_loss(student, teacher)
    assert count.kernels <= 20


class Ended(Exception):
    """Raised in place of the console line, whose numbers FakeTensors do not hold."""


def count_steps(number, student, teacher, ids=([0, 1], [0, 1]), batch=4, **optimizer_options):
    """Return the counts of training steps up to the console line."""
    state = TrainState(student, None, None, None, ModelEmaV3(student, 0.99996), ["loss", *losses.TERMS])
    with fake_cuda() as device:
        model = counting.to_fake(student)
        counting.to_fake(state.ema.module)
        hooks = spectral.FeatureHooks(model, ids[0])
        frozen = losses.FrozenTeacher(models.fast_attention(counting.to_fake(teacher)), ids[1])
        base = nn.CrossEntropyLoss(label_smoothing=0.1)
        criterion = losses.DistillationLoss(base, "soft", frozen, feature_loss=spectral.closed_spectral_loss)
        state.optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **optimizer_options)
        state.scaler = torch.amp.GradScaler("cuda")
        state.scaler._lazy_init_scale_growth_tracker(device)
        options = {"device": device, "prepare": datasets.Prepare((0.5,) * 3, (0.5,) * 3, device=device)}
        options |= {"watch": engine.DivergenceWatch(), "amp_dtype": torch.float16, "print_freq": 1000}
        with counting.Count() as count, until_console_line():
            engine.train_one_epoch(state, batches(number, batch), criterion, hooks, **options)
    return count


def batches(number, size):
    return [(torch.empty(size, 3, 224, 224, dtype=torch.uint8), torch.zeros(size, dtype=torch.int64))] * number


@contextlib.contextmanager
def until_console_line():
    with mock.patch.object(FakeTensor, "tolist", side_effect=Ended), contextlib.suppress(Ended):
        yield


def small_models():
    return timm.create_model("deit_tiny_patch16_224", depth=2), timm.create_model("cait_s24_224", depth=2)


def test_training_never_waits_between_console_lines():
    """An optimizer that is not fused reads the scaler's verdict, so a wait would be noticed."""
    assert count_steps(3, *small_models(), fused=True).reads == []
    with pytest.raises(Exception, match="_local_scalar_dense"):
        count_steps(3, *small_models(), fused=False, foreach=False)


def test_evaluation_never_waits_between_batches():
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    with fake_cuda() as device:
        model = counting.to_fake(model)
        prepare = datasets.Prepare((0.5,) * 3, (0.5,) * 3, device=device)
        with counting.Count() as count, until_console_line():
            engine.evaluate(model, batches(3, 4), device=device, prepare=prepare, amp_dtype=torch.float16)
    assert count.reads == []
    assert count.by_operator["linear"][0] == 3 * (2 * 4 + 1)  # all three batches were scored


@pytest.mark.slow
def test_step_stays_within_its_kernels_and_bytes():
    """DeiT-Tiny under CaiT-S24, 8 pairs, batch 256, float16; random erasing would add 128 kernels on average."""
    models = timm.create_model("deit_tiny_patch16_224"), timm.create_model("cait_s24_224")
    # The first step also creates the moments.
    one, two = (count_steps(n, *copy.deepcopy(models), ids=PAIRS, batch=256, fused=True) for n in (1, 2))
    assert two.kernels - one.kernels < 1770
    assert two.bytes - one.bytes < 146e9
