"""Whole training steps, images included: the program's own job beside the plain formulation.

Under torch.distributed.run it measures several processes; each has its own batch.
"""

import functools
import sys
import tempfile
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import jobs
import plain

import datasets
import samplers
import utils

JOBS = {"plain": jobs.plain_job, "fast": jobs.fast_job}


def synthetic_loaders(args):
    """(plain, fast) lists of batches that are ready in memory."""
    shape = (args.batch_size, 3, args.input_size, args.input_size)
    labels = torch.randint(jobs.NUM_CLASSES, (args.batch_size,))
    return (
        [(torch.randn(shape), labels)] * args.steps,
        [(torch.randint(256, shape, dtype=torch.uint8), labels)] * args.steps,
    )


def jpeg_loaders(args, folder):
    """(plain, fast) loaders of the same JPEG files in the order of repeated augmentation."""
    common.make_jpegs(folder, args.steps * args.batch_size * utils.world_size())
    transform = datasets.train_transform(args.input_size, aa=plain.AUGMENTATION)
    set_of = datasets.build_dataset("IMNET", "train", folder, transform)
    order = samplers.RASampler(set_of, utils.world_size(), utils.rank())
    fast = datasets.build_loader(
        datasets.SeededDataset(set_of),
        samplers.SeededSampler(order, 0, utils.rank()),
        args.batch_size,
        args.num_workers,
        drop_last=True,
        pin_memory=args.device != "cpu",
    )
    ordinary = plain.loader(Path(folder) / "train", order, args.batch_size, args.num_workers, args.input_size)
    return ordinary, fast


def main():
    parser = common.parser(__doc__, repeats=7)
    jobs.add_flags(parser)
    parser.add_argument("--steps", type=int, default=2, help="steps of a run")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes a process")
    parser.add_argument("--variants", nargs="+", default=["plain", "fast"], choices=JOBS, help="what is measured")
    parser.add_argument("--synthetic", action="store_true", help="batches that are ready in memory, instead of JPEG")
    args = parser.parse_args()
    utils.init_distributed(args.device)
    common.start(args)
    with tempfile.TemporaryDirectory() as folder:
        loaders = synthetic_loaders(args) if args.synthetic else jpeg_loaders(args, folder)
        loaders = dict(zip(JOBS, loaders, strict=True))
        trains = {name: functools.partial(JOBS[name](args).train, loaders[name]) for name in args.variants}
        times = common.interleave(trains, args, warm_up=1)
    images = args.steps * args.batch_size * utils.world_size()
    common.report(f"{args.model} <- {args.teacher_model}, batch {args.batch_size}", times, args.variants[0], images)
    common.write_json(args, seconds=times, images=images, peak_bytes=common.peak_memory(args))


if __name__ == "__main__":
    main()
