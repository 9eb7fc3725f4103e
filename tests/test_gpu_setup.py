"""The set-up of a run on GPUs, tested without one: process groups, DDP, stop requests, precision, errors."""

import datetime
import functools
import inspect
import signal
import time
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_run
from processes import fork

import builders
import faults
import main
from flags import parse_args


@pytest.fixture
def recorded(monkeypatch):
    """{name: keyword arguments} of the process groups that are asked for on a machine with one GPU."""
    calls = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(dist, name, functools.partial(lambda name, **options: calls.update({name: options}), name))
    group = mock.Mock()
    group._get_backend.return_value._set_default_timeout = lambda limit: calls.update(gloo_timeout=limit)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    return calls


def test_nccl_is_bound_to_its_gpu_and_gloo_times_out_first(recorded, monkeypatch):
    """NCCL's watchdog would abort the process; gloo raises, which ends the run with one line."""
    device = faults.init_distributed("auto", timeout=30)
    request = faults.StopRequest()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    request.between_steps(30)
    group, stop = recorded["init_process_group"], recorded["new_group"]
    assert device == group["device_id"] == torch.device("cuda", 0)
    assert group["backend"] == "cpu:gloo,cuda:nccl"
    assert stop["backend"] == "gloo"
    assert group["timeout"] > recorded["gloo_timeout"] == datetime.timedelta(seconds=30)
    assert group["timeout"] > stop["timeout"] == datetime.timedelta(seconds=30)


class Exchange:
    """A collective that takes a second."""

    def __init__(self, tensor, **options):
        self.done = time.perf_counter() + 1
        assert options["async_op"]

    def wait(self):
        time.sleep(max(0, self.done - time.perf_counter()))


def test_a_step_does_not_wait_for_the_stop_request(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", Exchange)
    request = faults.StopRequest()
    request.group, request.noted = object(), 15
    began = time.perf_counter()
    assert request() == 0  # the answer of the call before, of which there is none
    assert time.perf_counter() - began < 0.9
    assert request() == 15


BLOCKED = """
import os, time
import faults
faults.PATIENCE = 0.5
faults.init_distributed("cpu")
stop = faults.StopRequest()
stop.between_steps(2)
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), {})
stop()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_a_process_that_waits_for_its_gpu(number):
    """The main thread never reaches another collective, as when the queue of launches is full."""
    first, lost = fork(ranks=2, before=BLOCKED.format(int(number)))
    assert first.code(40) == 1
    assert first.text.splitlines()[-1].startswith("error: lost another process: ")
    lost.process.kill()


@pytest.mark.parametrize(("name", "constant"), [("swin_tiny_patch4_window7_224", True), ("resnet18", False)])
def test_ddp_broadcasts_buffers_of_batchnorm_only(name, constant, monkeypatch):
    parallel = builders.DistributedDataParallel
    record = mock.Mock(side_effect=lambda model, **options: options, __signature__=inspect.signature(parallel))
    monkeypatch.setattr(builders, "DistributedDataParallel", record)
    monkeypatch.setattr(builders, "world_size", lambda: 2)
    model = timm.create_model(name)
    options = builders.wrap_model(parse_args(tiny_run()), model, None, torch.device("cpu"))
    off = [key for key in ("broadcast_buffers", "forward_sync_buffers") if options.get(key) is False]
    assert len(off) == constant


def test_a_full_gpu_is_not_blamed_on_the_image_size():
    with pytest.raises(torch.cuda.OutOfMemoryError), builders.forward_errors("deit", 32):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_precision_and_kernels_are_chosen_on_purpose():
    try:
        main.set_numerics(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
        main.set_numerics(deterministic=False)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32


def test_the_recipe_for_several_nodes_names_gloos_interface():
    assert "GLOO_SOCKET_IFNAME" in (ROOT / "recipes" / "several_nodes.slurm").read_text()
