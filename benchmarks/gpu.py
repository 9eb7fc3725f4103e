"""Check and measure what needs a GPU. After nine minutes (--minutes), nothing new is started.

    python benchmarks/gpu.py --json gpu.json    # on a GPU
    python benchmarks/gpu.py --cpu              # the same code with tiny sizes

Prints PASS, FAIL or SKIP for each check (gpu_checks.py); no failure stops what follows. Then come measurements as
medians and quartiles, rows for benchmarks/README.md, and the GPU-hours and memory of the recipes.
"""

import argparse
import collections
import contextlib
import functools
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic steps
sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import counting
import end_to_end
import gpu_checks
import jobs
import timm
import torch
import torchvision
from common import variant
from torch.profiler import ProfilerActivity, profile

IMAGES_PER_EPOCH = 1_281_167
SWIN = {"model": "swin_tiny_patch4_window7_224", "teacher_model": "swin_small_patch4_window7_224"}
RECIPES = {  # measurement: recipe, epochs, peak memory at batch 256 counted on FakeTensors, GB
    "steps": ("DeiT-Tiny under CaiT-S24", 400, 5.8),
    "steps, DeiT-S": ("DeiT-Small under CaiT-S24", 500, 10.0),
    "steps, Swin-T": ("Swin-Tiny under Swin-S", 500, 21.0),
}


def arguments():
    """Parse the flags, and add those that the functions of the other benchmarks read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="run with tiny sizes on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this time")
    parser.add_argument("--json", metavar="FILE", help="write all results to this file")
    args = parser.parse_args()
    parser = common.parser("", repeats=2 if args.cpu else 5)
    jobs.add_flags(parser, batch_size=2 if args.cpu else 256)
    defaults = vars(parser.parse_args([])) | vars(args)
    args = argparse.Namespace(**defaults, steps=2 if args.cpu else 20, num_workers=0 if args.cpu else os.cpu_count())
    args.device, args.clock, args.choices = "cpu" if args.cpu else "cuda", "wall", not args.cpu
    args.amp_dtype = "bfloat16" if args.cpu else "float16"
    if args.cpu:
        args.input_size, args.depth, args.pairs = 32, 2, 2
    return args


# Machine


def machine(args):
    """Return facts about the machine, with its measured peaks."""
    facts = common.machine(args)
    if not args.cpu:
        query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            facts[query] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return facts | {"peak FLOP/s": common.peak_flops(args), "peak bytes/s": peak_bandwidth(args)}


def peak_bandwidth(args):
    """Measure the bytes per second that a large copy reads and writes."""
    source = torch.zeros(2**31 if not args.cpu else 2**24, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * len(source) / min(common.timed(lambda: target.copy_(source), args) for _ in range(5))


# Measurements: each returns {name: {"seconds": list, ...}}, seconds per call or step


def teachers(args):
    """Return {variant: teacher} with weights in float32 and half precision; compiled and with the kernel on a GPU."""
    built = {}
    for choice in ("timm", "eager") if args.cpu else ("timm", "eager", "triton"):
        for dtype in ("float32", args.amp_dtype):
            options = variant(args, teacher_attention=choice, teacher_dtype=dtype)
            built[f"{choice}, weights {dtype}"] = jobs.frozen_teacher(options)
            if not args.cpu and (choice, dtype) in {("eager", "float32"), ("triton", "float32"), ("triton", "float16")}:
                built[f"{choice}, weights {dtype}, compiled"] = teacher = jobs.frozen_teacher(options)
                teacher.model = torch.compile(teacher.model, dynamic=False)
    return built


def measure_teachers(args):
    """Time the teacher's forward pass in each variant."""
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device)

    def forward(teacher):
        with torch.autocast(images.device.type, dtype=getattr(torch, args.amp_dtype)):
            return teacher(images)

    return measure({name: functools.partial(forward, teacher) for name, teacher in teachers(args).items()}, args)


def measure_parts(args):
    """Time the parts of a training step of both jobs."""
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device)
    labels = torch.randint(jobs.NUM_CLASSES, (args.batch_size,), device=args.device)
    functions = {}
    for name, build in jobs.JOBS.items():
        parts = jobs.Parts(build(args), images, labels, getattr(torch, args.amp_dtype))
        functions |= {f"{part}, {name}": getattr(parts, part) for part in jobs.PARTS}
    return measure(functions, args)


def measure(functions, args):
    """Time functions in turn and count their kernels, bytes and FLOPs."""
    first = {name: common.timed(function, args) for name, function in functions.items()}  # compilation included
    results = {name: {"first call": seconds} for name, seconds in first.items()}
    for name, seconds in common.interleave(functions, args).items():
        results[name]["seconds"] = seconds
        if "compiled" not in name:
            with counting.Count() as count:
                functions[name]()
            results[name] |= {"kernels": count.kernels, "bytes": count.bytes, "flops": count.flops}
    return results


def measure_steps(args):
    """Time whole steps on batches in memory: reference, own, and own with compilation or the kernel."""
    options = {"reference": {}, "fast": {}}
    if args.choices:
        options |= {"fast, float16 teacher": {"teacher_dtype": "float16"}}
        options |= {"fast, teacher compiled": {"compile": "teacher"}, "fast, both compiled": {"compile": "both"}}
        options |= {"fast, triton": {"teacher_attention": "triton"}}
        options |= {"fast, triton, both compiled": {"teacher_attention": "triton", "compile": "both"}}
    batches, results = jobs.synthetic_batches(args, args.steps), {}
    flops = None
    for name, changes in options.items():  # one after the other, because all do not fit into memory
        kind = name.partition(",")[0]
        job = jobs.JOBS[kind](variant(args, **changes))
        train = functools.partial(job.train, batches[kind])
        if not args.cpu:
            gc.collect()  # the job before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        first = common.timed(train, args)
        flops = flops or common.count_flops(lambda job=job, kind=kind: job.train(batches[kind][:1]))
        seconds = [common.timed(train, args) / args.steps for _ in range(args.repeats)]
        results[name] = {"first run": first, "seconds": seconds, "flops": flops, "bytes": 0} | gpu_use(train, args)
        del job, train
    return results


def gpu_use(train, args):
    """Return peak memory in bytes and the share of time without a running kernel; on a CPU the process's memory."""
    memory = {"allocated": common.peak_memory(args)}
    if args.cpu:
        return memory
    memory["reserved"] = torch.cuda.max_memory_reserved()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = common.timed(train, args)
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return memory | {"idle share": max(0.0, 1 - busy / seconds)}


def measure_jpeg(args):
    """Time whole steps on JPEG files, and the loaders alone."""
    args = variant(args, steps=2 if args.cpu else 40)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        common.make_jpegs(folder, args.steps * args.batch_size)
        loaders = end_to_end.jpeg_loaders(args, folder, 1, 0)
        for name, loader in loaders.items():
            job = jobs.JOBS[name](args)
            functions = {
                name: functools.partial(job.train, loader),
                f"{name}, loader alone": functools.partial(collections.deque, loader, maxlen=0),
            }
            for what, function in functions.items():
                function()  # starts the workers
                results[what] = {"seconds": [common.timed(function, args) / args.steps for _ in range(2)]}
    return results


def measure_decoding(args):
    """JPEG files in memory, decoded in batches by torchvision on the device."""
    with tempfile.TemporaryDirectory() as folder:
        common.make_jpegs(folder, min(args.batch_size, 64))
        files = [torchvision.io.read_file(str(path)) for path in sorted(Path(folder).rglob("*.jpeg"))]
    files = (files * args.batch_size)[: args.batch_size]

    def decode():
        images = torchvision.io.decode_jpeg(files, torchvision.io.ImageReadMode.RGB, device=args.device)
        assert images[0].shape == (3, 375, 500), images[0].shape

    try:
        decode()
    except RuntimeError as error:
        raise gpu_checks.Skip(f"this torchvision cannot decode on {args.device}: {error}") from error
    return {"decode_jpeg": {"seconds": common.interleave({"decode_jpeg": decode}, args)["decode_jpeg"]}}


def measure_choices(args):
    """Time open choices: Swin's fused windows, cuDNN's benchmark mode, attention backends, bfloat16."""
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device)
    half = getattr(torch, args.amp_dtype)
    choices = {"": {}, ", bfloat16": {"dtype": torch.bfloat16}}
    names = {"deit_tiny_patch16_224": choices}
    if not args.cpu:
        cudnn = torch.nn.attention.SDPBackend.CUDNN_ATTENTION
        names = {
            "deit_tiny_patch16_224": choices | {", cuDNN attention": {"backend": cudnn}},
            "swin_small_patch4_window7_224": choices | {", fused": {"fused": True}},
            "regnety_160": choices | {", cudnn.benchmark": {"tuned": True}},
            "cait_s24_224": choices,
        }
    functions = {}
    for name, options in names.items():
        size = {"img_size": args.input_size} if args.cpu else {}
        model = timm.create_model(name, **size).to(args.device).eval().requires_grad_(False)
        run = functools.partial(switched, model, images)
        functions |= {name + what: functools.partial(run, **{"dtype": half, **more}) for what, more in options.items()}
    return {name: {"seconds": seconds} for name, seconds in common.interleave(functions, args).items()}


@torch.no_grad()
def switched(model, images, dtype, backend=None, fused=False, tuned=False):
    """Run a forward pass with these choices; `fused` concerns Swin only."""
    for module in model.modules():
        if type(module).__name__ == "WindowAttention":
            module.fused_attn = fused
    torch.backends.cudnn.benchmark = tuned
    attention = torch.nn.attention.sdpa_kernel(backend) if backend else contextlib.nullcontext()
    with attention, torch.autocast(images.device.type, dtype=dtype):
        model(images)


MEASUREMENTS = {  # name: (function, changes of the flags); the most important first, in case time runs out
    "steps": (measure_steps, {}),
    "teacher": (measure_teachers, {}),
    "parts": (measure_parts, {}),
    "jpeg": (measure_jpeg, {}),
    "jpeg decoding": (measure_decoding, {}),
    "steps, DeiT-S": (measure_steps, {"model": "deit_small_patch16_224", "repeats": 2, "choices": False}),
    "steps, Swin-T": (measure_steps, {**SWIN, "repeats": 2, "choices": False}),
    "parts, batch 64": (measure_parts, {"batch_size": 64}),
    "steps, batch 64": (measure_steps, {"batch_size": 64}),
    "choices": (measure_choices, {}),
}


# Report


def report(title, results, args, facts):
    """Print a table: ms, images/s, shares of the measured peaks, and other counts."""
    print(f"\n{title}\n| what | n | ms | quartiles | images/s | share of peak FLOP/s | share of peak bytes/s | more |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        low, median, high = common.quartiles(result["seconds"])
        shares = [
            f"{result[key] / median / facts[peak]:.1%}" if result.get(key) else ""
            for key, peak in (("flops", "peak FLOP/s"), ("bytes", "peak bytes/s"))
        ]
        known = ("seconds", "flops", "bytes")
        more = ", ".join(f"{key} {value:.4g}" for key, value in result.items() if key not in known)
        cells = [name, len(result["seconds"]), f"{1e3 * median:.2f}", f"{1e3 * low:.2f} to {1e3 * high:.2f}"]
        cells += [f"{args.batch_size / median:.0f}", *shares, more]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def readme_rows(measured, args, facts):
    """Print the rows of the GPU table in benchmarks/README.md, and the hours and memory of each recipe."""
    print("\nRows for benchmarks/README.md\n| job | img/s reference | img/s own | speedup | share of the peak |")
    print("|---|---|---|---|---|")
    job = f"DeiT-Tiny under CaiT-S24, batch {args.batch_size}, {args.amp_dtype}"
    for title, name in ((f"{job}, synthetic input", "steps"), ("the same with JPEG input", "jpeg")):
        if "fast" not in measured.get(name, {}):
            continue
        rates = [args.batch_size / common.quartiles(measured[name][key]["seconds"])[1] for key in jobs.JOBS]
        flops = measured.get("steps", {}).get("fast", {}).get("flops", 0) / args.batch_size
        share = f"{rates[1] * flops / facts['peak FLOP/s']:.1%}"
        print(f"| {title} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.2f} | {share} |")
    print(f"\nRecipes, batch {args.batch_size}\n| recipe | epochs | hours | GB allocated | GB reserved | GB counted |")
    print("|---|---|---|---|---|---|")
    for name, (recipe, epochs, counted) in RECIPES.items():
        if own := measured.get(name, {}).get("fast"):
            rate = args.batch_size / common.quartiles(own["seconds"])[1]
            memory = " | ".join(f"{own[key] / 1e9:.1f}" if key in own else "" for key in ("allocated", "reserved"))
            hours = f"{IMAGES_PER_EPOCH * epochs / rate / 3600:.0f}"
            print(f"| {recipe} | {epochs} | {hours} | {memory} | {'' if args.cpu else counted} |")


def main():
    args, began = arguments(), time.perf_counter()
    common.start(args)
    facts = machine(args)
    checks, measured = {}, {}
    for name, function in gpu_checks.CHECKS.items():
        checks[name] = gpu_checks.outcome(function, args, began)
        print(f"{checks[name][0]} {name}: {checks[name][1]}", flush=True)
    for name, (function, changes) in MEASUREMENTS.items():
        if args.cpu and changes:
            continue
        result, detail, value = gpu_checks.outcome(functools.partial(function), variant(args, **changes), began)
        print(f"{result} measurement of {name}{'' if value else f': {detail}'}", flush=True)
        if value:
            measured[name] = value
            report(name, value, variant(args, **changes), facts)
    readme_rows(measured, args, facts)
    outcomes = {name: {"result": result, "detail": detail} for name, (result, detail, _) in checks.items()}
    common.write_json(args, facts=facts, checks=outcomes, measurements=measured, seconds=time.perf_counter() - began)
    failed = [name for name, (result, *_) in checks.items() if result == "FAIL"]
    print(f"{len(checks)} checks, {len(failed)} failed in {time.perf_counter() - began:.0f} s {failed or ''}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
