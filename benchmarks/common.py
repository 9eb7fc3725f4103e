"""What the benchmarks share: flags, the clock, interleaved runs, the table, the JSON file."""

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

PACKAGES = ("torch", "torchvision", "timm", "numpy", "Pillow")


def parser(description, repeats):
    """A parser with the flags of every benchmark."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result.add_argument("--device", default=device, help="cuda or cpu")
    result.add_argument("--repeats", type=int, default=repeats, help="measured rounds; each runs every variant once")
    result.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    result.add_argument(
        "--clock",
        default="wall" if device == "cuda" else "cpu",
        choices=("wall", "cpu"),
        help="cpu: CPU seconds of this process, which other load on the machine does not enter; for one thread",
    )
    result.add_argument("--json", metavar="FILE", help="also write all times here")
    return result


def start(args):
    """Sets threads and seed, and prints where this runs."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if first_process():
        for name, value in machine(args).items():
            print(f"{name}: {value}")


def first_process():
    return os.environ.get("RANK", "0") == "0"


def machine(args):
    """{what: value} of the processor, the versions and the flags."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    facts = {"processor": f"{os.cpu_count()} cores of {model}", "load": " ".join(f"{x:.2f}" for x in os.getloadavg())}
    if args.device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return facts | {"versions": f"Python {platform.python_version()}, {versions}", "flags": vars(args)}


def timed(function, args) -> float:
    """Seconds of one call, by the clock that the flags choose."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    if args.device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    function()
    if args.device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def interleave(variants, args, warm_up=2):
    """Runs {name: function} in turn, round after round, the order turned by one each round.

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


def report(title, times, baseline, items=None, unit="images/s"):
    """Prints a table: median and quartiles of the times, and of the ratio to the baseline in the same round.

    Args:
        times: as from `interleave`.
        baseline: the name of the variant that the others are compared with.
        items: things done in one run, for a rate.
    """
    if not first_process():
        return
    print(f"\n{title}")
    print(f"| variant | n | median ms | quartiles | {f'{unit} | ' if items else ''}times {baseline} | quartiles |")
    print(f"|---|---|---|---|{'---|' if items else ''}---|---|")
    for name, seconds in times.items():
        low, median, high = quartiles(seconds)
        rate = f"{items / median:.1f} | " if items else ""
        ratios = quartiles([base / own for base, own in zip(times[baseline], seconds, strict=True)])
        print(
            f"| {name} | {len(seconds)} | {1e3 * median:.2f} | {1e3 * low:.2f} to {1e3 * high:.2f} | {rate}"
            f"{ratios[1]:.2f} | {ratios[0]:.2f} to {ratios[2]:.2f} |",
            flush=True,
        )


def peak_memory(args) -> int:
    """Most bytes that this process has held so far: of the GPU, or of the machine's memory."""
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def make_jpegs(folder, num_images, size=(500, 375)):
    """Writes num_images JPEG files of about 100 kB, as ImageNet's are, to FOLDER/train/<class>/ for ten classes."""
    random = np.random.default_rng(0)
    for index in range(num_images):
        path = Path(folder) / "train" / f"class{index % 10}" / f"{index:06d}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        noise = random.normal(0, 12, (size[1], size[0], 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)


def write_json(args, **results):
    if args.json and first_process():
        Path(args.json).write_text(json.dumps({"machine": machine(args), **results}, indent=1))
