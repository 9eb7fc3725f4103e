"""The checks of gpu.py. Each takes the flags and returns details, or raises an AssertionError or Skip."""

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jobs
import torch
from common import variant
from torch.profiler import ProfilerActivity, profile

import engine
import losses
import spectral
import utils
from models import fast_attention

ROOT = Path(__file__).resolve().parents[1]
HALVES = (torch.float16, torch.bfloat16)
TINY = ["img_size=32", "patch_size=8", "embed_dim=24", "depth=4", "num_heads=3"]


class Skip(Exception):
    """The machine lacks something that a check needs."""


def outcome(function, args, began):
    """Run a check or measurement; return (PASS, FAIL or SKIP, detail, value)."""
    started = time.perf_counter()
    if started - began > 60 * args.minutes:
        return "SKIP", "time is up", None
    try:
        value = function(args)
    except Skip as reason:
        return "SKIP", str(reason), None
    except (Exception, SystemExit) as error:  # run the next one in any case
        return "FAIL", f"{type(error).__name__}: {utils.one_line(error)[:500]}", None
    return "PASS", f"{value if isinstance(value, str) else ''} ({time.perf_counter() - started:.0f} s)", value


def need_gpu(args):
    if args.cpu:
        raise Skip("needs a GPU")


class Batches(list):
    """Batches that turn a synchronization with the GPU into an error, except during the first and the last one."""

    def __iter__(self):
        set_mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None
        try:
            for i, batch in enumerate(super().__iter__()):
                set_mode("error" if 0 < i < len(self) - 1 else "default")
                yield batch
        finally:
            set_mode("default")


def check_synchronization(args):
    """Check that neither training between console lines nor evaluation between batches waits for the GPU."""
    for dtype in ("bfloat16", "float32") if args.cpu else ("float16", "bfloat16", "float32"):
        options = variant(args, amp_dtype=dtype, batch_size=min(args.batch_size, 16))
        job, batches = jobs.fast_job(options), Batches(jobs.synthetic_batches(options, 10)["fast"])
        job.train(batches[:1])  # allocate moments and load kernels
        job.train(batches, print_freq=100)
        options = {"device": torch.device(args.device), "prepare": job.prepare, "amp_dtype": getattr(torch, dtype)}
        engine.evaluate(job.state.model, batches[:2], **options)
        engine.evaluate(job.state.model, batches, **options)
    return "8 training steps and 8 evaluation batches in each precision"


def check_copies(args):
    """Check that batches are copied correctly, ahead of the computation and on a separate stream."""
    device, shape = torch.device(args.device), (min(args.batch_size, 64), 3, args.input_size, args.input_size)
    work, means = torch.randn(256 if args.cpu else 4096, 256 if args.cpu else 4096, device=device), []
    activities = [ProfilerActivity.CPU if args.cpu else ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        for k in range(40):
            batch = [torch.full(shape, k, dtype=torch.uint8), torch.full(shape[:1], k)]
            batch = batch if args.cpu else [tensor.pin_memory() for tensor in batch]
            images, labels = engine.to_device(batch, device)
            work = (work @ work).clamp(-1, 1)
            means.append(torch.stack([images.double().mean(), labels.double().mean()]))
        found = torch.stack(means).cpu()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    assert torch.equal(found, torch.arange(40.0).double()[:, None].expand(40, 2)), found[:, 0].tolist()
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "HtoD" in event["name"]]
    streams = {event["args"]["stream"] for event in copies}
    kernels = {event["args"]["stream"] for event in events if event.get("cat") == "kernel"}
    assert args.cpu or streams - kernels, f"copies on streams {streams}, kernels on {kernels}"
    return f"40 batches; copies on streams {sorted(streams)}, kernels on {sorted(kernels)}"


@torch.no_grad()
def check_teacher(args):
    """Check that the teacher's attention is as close to timm's float32 outputs as timm's in the same dtype."""
    model, ids = jobs.timm_model(args.teacher_model, args).to(args.device).eval(), jobs.IDS[args.teacher_model][1]
    ids = ids[: args.pairs]
    for key, parameter in model.named_parameters():  # so that the attention matters
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim < 2 or "proj_" in key else 0.0)
    images = torch.randn(4, 3, args.input_size, args.input_size, device=args.device)

    def outputs(choice, weights, dtype):
        teacher = losses.FrozenTeacher(fast_attention(copy.deepcopy(model).to(weights), choice), ids)
        with engine.autocast(images.device, dtype):
            logits, maps = teacher(images)
        return [tensor.float() for tensor in (logits, *maps)]

    def error(*options):
        pairs = zip(outputs(*options), expected, strict=True)
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    expected = outputs("timm", torch.float32, torch.float32)
    by_timm = {dtype: error("timm", torch.float32, dtype) for dtype in HALVES}
    limits = {(torch.float32, torch.float32): 1e-4}
    for dtype in HALVES:  # with weights in half precision, the sums over blocks are also rounded
        limits |= {(torch.float32, dtype): 2 * by_timm[dtype], (dtype, dtype): 8 * by_timm[dtype]}
    details, failed = [], []
    for choice in ("eager",) if args.cpu else ("eager", "triton"):
        errors = {dtypes: error(choice, *dtypes) for dtypes in limits}
        details.append(f"{choice}: {', '.join(f'{value:.1e}' for value in errors.values())}")
        failed += [(choice, *dtypes) for dtypes, value in errors.items() if not value < limits[dtypes]]
    timms = ", ".join(f"{value:.1e}" for value in by_timm.values())
    assert not failed, f"{failed}: {details}, timm {timms}"
    maps = torch.randn(8, 196, 196, device=args.device, dtype=torch.float16)
    equal = torch.equal(maps.softmax(-1), maps.float().softmax(-1).half())
    assert args.cpu or equal, "softmax in half precision is not the float32 softmax rounded once"
    names = "float32, float16, float16 weights, bfloat16, bfloat16 weights"
    return f"errors in {names}: {'; '.join(details)} (timm's halves {timms}); half softmax equal: {equal}"


def check_loss(args):
    """Check value and gradient of the closed form against the transform, also compiled and on float16 maps."""
    closed = {"closed": spectral.closed_spectral_loss}
    if not args.cpu:
        closed["compiled"] = torch.compile(spectral.closed_spectral_loss, dynamic=False)
    worst = {}
    for shape, width in (((4, 192, 14, 14), 384), ((4, 96, 56, 56), 96), ((4, 768, 7, 7), 768)):
        for dtype in (torch.float32, torch.float16):
            student = torch.randn(shape, device=args.device).to(dtype)
            teacher = torch.randn(shape[0], width, *shape[2:], device=args.device).to(dtype)
            value, gradient = _value_and_gradient(spectral.spectral_loss, student.double(), teacher.double())
            for name, loss in closed.items():
                own, own_gradient = _value_and_gradient(loss, student, teacher)
                errors = abs(own / value - 1), ((own_gradient - gradient).abs().max() / gradient.abs().max())
                worst[name, dtype] = max(worst.get((name, dtype), 0.0), *(error.item() for error in errors))
    detail = ", ".join(f"{name} {dtype}: {error:.1e}" for (name, dtype), error in worst.items())
    assert all(error < (1e-5 if dtype == torch.float32 else 2e-2) for (_, dtype), error in worst.items()), detail
    return detail


def _value_and_gradient(loss, student, teacher):
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    (2.0**16 * value).backward()  # scaled as in training, because small float16 gradients vanish
    return value.detach().double(), student.grad.double() / 2.0**16


def check_scaler(args):
    """Check that a non-finite gradient changes only the scale, and that three non-finite losses end the run."""
    for dtype in ("bfloat16",) if args.cpu else ("float16", "bfloat16"):
        job = jobs.fast_job(variant(args, amp_dtype=dtype, batch_size=2))
        batches = jobs.synthetic_batches(variant(args, batch_size=2), 3)["fast"]
        job.train(batches)
        state, scale = job.state, job.state.scaler.get_scale()
        before = copy.deepcopy([state.model.state_dict(), state.optimizer.state_dict()["state"]])
        parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
        state.scaler.scale(parameters[0].sum()).backward()
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, float("nan"))
        engine.optimizer_step(state, parameters, None)
        torch.testing.assert_close(
            [state.model.state_dict(), state.optimizer.state_dict()["state"]], before, rtol=0, atol=0
        )
        assert state.scaler.get_scale() == (scale / 2 if dtype == "float16" else 1.0)
        job.criterion.base_weight = float("nan")
        with contextlib.suppress(utils.Diverged):
            job.train(batches, print_freq=1)
            raise AssertionError(f"three losses of NaN did not end the run in {dtype}")
    return "weights, moments and counters unchanged"


def check_against_cpu(args):
    """Check the terms of three float32 steps against a CPU; report errors of TF32 and half precision."""
    args = variant(args, amp_dtype="float32", batch_size=4)
    batches = jobs.synthetic_batches(variant(args, device="cpu"), 3)["fast"]

    def terms(**changes):
        utils.seed_everything(0)
        job = jobs.fast_job(variant(args, **changes))
        job.prepare.erase = None  # random numbers differ on a GPU
        job.train(batches, train_mode=False)
        return torch.tensor(list(job.state.meter.averages().values()))

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    expected = terms(device="cpu")
    errors = {"float32": (terms() / expected - 1).abs().max().item()}
    torch.set_float32_matmul_precision("high")
    errors["TF32"] = (terms() / expected - 1).abs().max().item()
    torch.set_float32_matmul_precision(precision)
    half = "bfloat16" if args.cpu else "float16"
    errors[half] = (terms(amp_dtype=half) / expected - 1).abs().max().item()
    detail = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    assert errors["float32"] < 1e-4, detail
    return detail


def check_repeatability(args):
    """Check that five steps give the same bits twice with deterministic algorithms; report whether they do without."""
    batches = jobs.synthetic_batches(variant(args, batch_size=4), 5)["fast"]

    def weights():
        utils.seed_everything(0)
        job = jobs.fast_job(variant(args, batch_size=4))
        job.train(batches)
        return torch.cat([p.detach().flatten() for p in job.state.model.parameters()])

    usual = torch.equal(weights(), weights())
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        same = torch.equal(weights(), weights())
    finally:
        torch.use_deterministic_algorithms(False)
    assert same, "deterministic algorithms gave different weights"
    return f"equal without deterministic algorithms: {usual}"


def check_recompiles(args):
    """Check that `--compile both` does not recompile in two epochs with evaluations."""
    need_gpu(args)
    job = jobs.fast_job(variant(args, compile="both", batch_size=8))
    batches = jobs.synthetic_batches(variant(args, batch_size=8), 3)["fast"]
    options = {"device": torch.device(args.device), "prepare": job.prepare, "amp_dtype": torch.float16}
    job.train(batches)
    engine.evaluate(job.state.model, batches, **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            job.train(batches)
            engine.evaluate(job.state.model, batches, **options)
    return "two epochs"


# The program, started from its command line


def start(args, *flags, processes=0, env=None):
    """Start main.py with a tiny student on GRATINGS; `env` is added to the environment."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    command = [sys.executable, *launcher, ROOT / "main.py", "--data-set", "GRATINGS", "--gratings-sizes", "512", "64"]
    command += ["--model", "deit_tiny_patch16_224", "--input-size", "32", "--model-kwargs", *TINY, "--num_workers", "0"]
    command += ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "16", "--device", args.device, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(word) for word in command], env=os.environ | (env or {}), text=True, **pipes)


def finish(process):
    """Wait for the end of a run, and return what it wrote to stderr."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-500:]
    return errors


def check_resume(args):
    """Check that SIGTERM in mid-epoch and a resume give the weights of the uninterrupted run, exactly on a CPU.

    The latter runs under torchrun, without warnings.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        errors = finish(start(args, "--output_dir", whole, processes=1))
        warnings = [line for line in errors.splitlines() if "warn" in line.lower() and "OMP_NUM_THREADS" not in line]
        assert not warnings, warnings
        process = start(args, "--output_dir", cut)
        next(line for line in process.stdout if line.startswith("Epoch: [0]"))
        process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors[-500:]
        seconds = time.perf_counter() - began
        finish(start(args, "--output_dir", cut, "--resume", "auto"))
        weights = [torch.load(path / "checkpoint.pth", map_location="cpu")["model"] for path in (whole, cut)]
    difference = max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0])
    assert difference <= (0 if args.cpu else 1e-2), difference
    return f"largest difference of a weight {difference:.1e}; state saved {seconds:.1f} s after the signal"


def check_memory_error(args):
    """Check that a batch that does not fit ends with exit code 2 and one line that names --batch-size."""
    need_gpu(args)
    number = 40_000
    flags = ["--model", "deit_tiny_patch16_224", "--model-kwargs", "depth=12", "--input-size", "224"]
    flags += ["--gratings-sizes", number, "64", "--batch-size", number, "--num_workers", os.cpu_count(), "--dry-run"]
    process = start(args, *flags)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2, (process.returncode, errors[-500:])
    assert "--batch-size" in errors, errors[-500:]
    return errors.strip().splitlines()[-1][:200]


def check_lost_process(args):
    """When one of two processes is killed or stopped, the other ends with 1, one line and its status."""
    if not args.cpu and torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    timeout, details = 3 if args.cpu else 20, []
    for number in (signal.SIGSTOP,) if args.cpu else (signal.SIGSTOP, signal.SIGKILL):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--dist-timeout", timeout, "--epochs", "100", "--output_dir", folder]
            ranks = [start(args, *flags, env=group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
            try:
                next(line for line in ranks[0].stdout if line.startswith("Epoch: [0]"))
                ranks[1].send_signal(number)
                began = time.perf_counter()
                _, errors = ranks[0].communicate(timeout=timeout + 60)
            finally:
                for process in ranks:
                    process.kill()
                    process.wait()
            status = json.loads((Path(folder) / "status.json").read_text())["status"]
        line = errors.strip().splitlines()[-1]
        found = (ranks[0].returncode, status, "lost another process" in line)
        assert found == (1, "failed", True), (number.name, *found, line)
        details.append(f"{number.name}: {time.perf_counter() - began:.0f} s, {line[:150]}")
    return "; ".join(details)


CHECKS = {
    "no synchronization between console lines": check_synchronization,
    "batches are copied correctly": check_copies,
    "teacher attention equals timm's": check_teacher,
    "closed form equals the transform": check_loss,
    "a bad gradient is skipped": check_scaler,
    "terms equal a CPU's": check_against_cpu,
    "repeatability": check_repeatability,
    "no recompilation": check_recompiles,
    "launcher and resume": check_resume,
    "a lost process": check_lost_process,
    "out of memory": check_memory_error,
}
