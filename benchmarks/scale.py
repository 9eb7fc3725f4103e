"""Measure time and memory of the program's job for several numbers of processes and pairs, batch and image sizes.

Each row is a run of end_to_end.py on batches in memory that differs from the first row in one quantity. Use an idle
machine.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common

WORK = {"processes": (1, 2), "batch-size": (16, 1, 4, 64), "input-size": (224, 160, 288), "pairs": (8, 1, 4)}


def main():
    parser = common.parser(__doc__, repeats=5)
    for name, values in WORK.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help="first row, then the others")
    parser.add_argument("--job", default="", help="further flags of end_to_end.py")
    args = parser.parse_args()
    args.clock = "wall"  # includes waiting for other processes
    common.start(args)
    values = {name: getattr(args, name.replace("-", "_")) for name in WORK}
    first_row = {name: first for name, (first, *_) in values.items()}
    rows = [first_row, *(first_row | {name: other} for name, (_, *others) in values.items() for other in others)]
    print("\n| processes | batch | pixels | pairs | n | ms per step, median | quartiles | images/s | MiB per process |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = [row | measure(row, args) for row in rows]
    common.write_json(args, rows=results)


def measure(row, args):
    """Run end_to_end.py, print its row of the table and return its figures."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(row["processes"]), str(Path(__file__).with_name("end_to_end.py"))]
        command += [word for name in ("batch-size", "input-size", "pairs") for word in (f"--{name}", str(row[name]))]
        command += ["--synthetic", "--variants", "fast", "--steps", "1", "--clock", args.clock, "--json", file.name]
        command += ["--repeats", str(args.repeats), "--threads", str(args.threads), "--device", args.device]
        subprocess.run(command + args.job.split(), check=True, stdout=subprocess.DEVNULL)
        result = json.loads(Path(file.name).read_text())
    seconds = result["seconds"]["fast"]
    low, median, high = common.quartiles(seconds)
    work = " | ".join(str(row[name]) for name in WORK)
    print(
        f"| {work} | {len(seconds)} | {1e3 * median:.0f} | {1e3 * low:.0f} to {1e3 * high:.0f} | "
        f"{result['images'] / median:.2f} | {result['peak_bytes'] / 2**20:.0f} |",
        flush=True,
    )
    return {"seconds": seconds, "images": result["images"], "peak_bytes": result["peak_bytes"]}


if __name__ == "__main__":
    main()
