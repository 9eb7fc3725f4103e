"""Time the input pipeline on JPEG files of 500 x 375 pixels, in images per second and core.

The order, and with it the use of the cache, depends on the number of processes. For each number, this process loads the
share of the first one, without loader workers.
"""

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import end_to_end

import datasets

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(loader, prepare=None):
    for images, _ in loader:
        if prepare is not None:
            prepare(images)


def variants(folder, num_processes, args):
    """Return ({name: function that loads an epoch of the first process}, images per epoch)."""
    loaders = end_to_end.jpeg_loaders(args, folder, num_processes, 0)
    prepare = datasets.Prepare(MEAN, STD, reprob=0.25)
    return {
        "reference": lambda: run(loaders["reference"]),
        "fast": lambda: run(loaders["fast"]),
        "fast, prepared on the CPU": lambda: run(loaders["fast"], prepare),
    }, len(loaders["fast"]) * args.batch_size


def main():
    parser = common.parser(__doc__, repeats=9)
    parser.add_argument("--batch-size", type=int, default=64, help="batch size")
    parser.add_argument("--input-size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--images", type=int, default=512, help="number of JPEG files")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    args = parser.parse_args()
    args.device, args.num_workers = "cpu", 0
    common.start(args)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        common.make_jpegs(folder, args.images)
        for number in args.processes:
            functions, images = variants(folder, number, args)
            results[number] = common.interleave(functions, args, warm_up=1)
            common.report(f"share of one of {number} processes", results[number], "reference", images)
    common.write_json(args, seconds=results)


if __name__ == "__main__":
    main()
