"""Helpers for the benchmarks: flags, clock, interleaved runs, tables, JSON files."""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow")
MAX_FILES = 512  # further files are hard links, because creating a file takes 30 ms


def parser(description, repeats):
    """Return a parser with the flags that all benchmarks have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", default=device, help="cuda or cpu")
    result.add_argument("--repeats", type=int, default=repeats, help="measured rounds; each runs every variant once")
    result.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    result.add_argument(
        "--clock",
        default="wall" if device == "cuda" else "cpu",
        choices=("wall", "cpu"),
        help="cpu: processor time of this process, for one thread",
    )
    result.add_argument("--json", metavar="FILE", help="also write all times to this file")
    return result


def start(args):
    """Set threads and seed, and print the machine."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if first_process():
        for name, value in machine(args).items():
            print(f"{name}: {value}")


def variant(args, **changes):
    """Return the flags with changes."""
    return argparse.Namespace(**vars(args) | changes)


def first_process():
    return os.environ.get("RANK", "0") == "0"


def machine(args):
    """Return {name: value} of the processor, the versions and the flags."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].strip() if names else model
    facts = {"processor": f"{os.cpu_count()} cores of {model}", "load": " ".join(f"{x:.2f}" for x in os.getloadavg())}
    if args.device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return facts | {"versions": f"Python {platform.python_version()}, {versions}", "flags": vars(args)}


def timed(function, args) -> float:
    """Return the seconds of one call by the chosen clock."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    if args.device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    function()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def interleave(variants, args, warm_up=2):
    """Run {name: function} in turn for several rounds, rotating the order by one in each round.

    Returns:
        {name: seconds of each round}.
    """
    for function in itertools.chain.from_iterable([variants.values()] * warm_up):
        function()
    times = {name: [] for name in variants}
    names = list(variants)
    for round_ in range(args.repeats):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            times[name].append(timed(variants[name], args))
    return times


def report(title, times, baseline, items=None, flops=0, peak=1.0):
    """Print medians and quartiles of the times, and of the speedup over the baseline in the same round.

    Args:
        times: as returned by `interleave`.
        baseline: the variant to compare with.
        items: images per run, for images/s.
        flops, peak: floating-point operations per run and process, and the most per second, for the share of the peak.
    """
    if not first_process():
        return
    columns = ["variant", "n", "median ms", "quartiles", *(["images/s"] if items else [])]
    columns += [*(["share of the peak"] if flops else []), f"times {baseline}", "quartiles"]
    print(f"\n{title}\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, seconds in times.items():
        low, median, high = quartiles(seconds)
        ratios = quartiles([base / own for base, own in zip(times[baseline], seconds, strict=True)])
        cells = [name, len(seconds), f"{1e3 * median:.2f}", f"{1e3 * low:.2f} to {1e3 * high:.2f}"]
        cells += [f"{items / median:.1f}"] if items else []
        cells += [f"{flops / median / peak:.1%}"] if flops else []
        cells += [f"{ratios[1]:.2f}", f"{ratios[0]:.2f} to {ratios[2]:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def count_flops(function) -> int:
    """Return the floating-point operations of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_flops(args, dtype=None) -> float:
    """Measure the floating-point operations per second of a large matrix product."""
    size = 8192 if args.device != "cpu" else 1024
    matrix = torch.randn(size, size, device=args.device, dtype=dtype or getattr(torch, args.amp_dtype))
    torch.mm(matrix, matrix)
    return 2 * size**3 / min(timed(lambda: torch.mm(matrix, matrix), args) for _ in range(5))


def peak_memory(args) -> int:
    """Return the peak memory of this process so far in bytes, on the GPU or in RAM."""
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def make_jpegs(folder, num_images, size=(500, 375)):
    """Write JPEG files of about 100 kB, like ImageNet's, to FOLDER/train/<class>/ for ten classes."""
    random = np.random.default_rng(0)
    paths = [Path(folder) / "train" / f"class{i % 10}" / f"{i:06d}.jpeg" for i in range(num_images)]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        if index >= MAX_FILES:
            path.hardlink_to(paths[index % MAX_FILES])
            continue
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        noise = random.normal(0, 12, (size[1], size[0], 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def write_json(args, **results):
    if args.json and first_process():
        Path(args.json).write_text(json.dumps({"machine": machine(args), **results}, indent=1))
