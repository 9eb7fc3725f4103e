"""Whole training steps, images included: the program's own job beside the plain formulation.

Under torch.distributed.run it measures several processes; each has its own batch.
"""

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


def synthetic_loaders(args):
    """(plain, fast) lists of batches that are ready in memory."""
    shape, labels = (args.batch_size, 3, 224, 224), torch.randint(jobs.NUM_CLASSES, (args.batch_size,))
    return (
        [(torch.randn(shape), labels)] * args.steps,
        [(torch.randint(256, shape, dtype=torch.uint8), labels)] * args.steps,
    )


def jpeg_loaders(args, folder):
    """(plain, fast) loaders of the same JPEG files in the order of repeated augmentation."""
    common.make_jpegs(folder, args.steps * args.batch_size * utils.world_size())
    set_of = datasets.build_dataset("IMNET", "train", folder, datasets.train_transform(224, aa=plain.AUGMENTATION))
    order = samplers.RASampler(set_of, utils.world_size(), utils.rank())
    fast = datasets.build_loader(
        datasets.SeededDataset(set_of),
        samplers.SeededSampler(order, 0, utils.rank()),
        args.batch_size,
        args.num_workers,
        drop_last=True,
        pin_memory=args.device != "cpu",
    )
    return plain.loader(Path(folder) / "train", order, args.batch_size, args.num_workers), fast


def main():
    parser = common.parser(__doc__, repeats=7)
    jobs.add_flags(parser)
    parser.add_argument("--steps", type=int, default=2, help="steps of a run")
    parser.add_argument("--num-workers", type=int, default=0, help="loader processes a process")
    parser.add_argument("--synthetic", action="store_true", help="batches that are ready in memory, instead of JPEG")
    args = parser.parse_args()
    utils.init_distributed(args.device)
    common.start(args)
    with tempfile.TemporaryDirectory() as folder:
        batches, fast_batches = synthetic_loaders(args) if args.synthetic else jpeg_loaders(args, folder)
        ours, theirs = jobs.fast_job(args), jobs.plain_job(args)
        variants = {"plain": lambda: theirs.train(batches), "fast": lambda: ours.train(fast_batches)}
        times = common.interleave(variants, args, warm_up=1)
    images = args.steps * args.batch_size * utils.world_size()
    common.report(f"{args.model} <- {args.teacher_model}, batch {args.batch_size}", times, "plain", images)
    common.write_json(args, seconds=times, images=images)


if __name__ == "__main__":
    main()
