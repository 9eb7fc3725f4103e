"""Time whole training steps, with loading images, in the program and in the reference implementation.

Under torch.distributed.run it measures several processes.
"""

import functools
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import jobs
import reference

import datasets
import faults
import samplers
import utils


def jpeg_loaders(args, folder, processes, rank):
    """Return {job: loader} for a rank's share of the same JPEG files in the order of repeated augmentation."""
    transform = datasets.train_transform(args.input_size, aa=reference.AUGMENTATION)
    dataset = datasets.build_dataset("IMNET", "train", folder, transform)
    strides = samplers.RASampler(dataset, processes, rank)
    blocks = samplers.RASampler(dataset, processes, rank, block=args.batch_size)
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "pin_memory": args.device != "cpu"}
    seeded, sampler = datasets.SeededDataset(dataset), samplers.SeededSampler(blocks, 0, rank)
    return {
        "reference": reference.loader(Path(folder) / "train", strides, input_size=args.input_size, **options),
        "fast": datasets.build_loader(seeded, sampler, drop_last=True, **options),
    }


def main():
    parser = common.parser(__doc__, repeats=7)
    jobs.add_flags(parser)
    parser.add_argument("--steps", type=int, default=2, help="steps per run")
    parser.add_argument("--num-workers", type=int, default=0, help="loader workers per process")
    parser.add_argument("--variants", nargs="+", default=list(jobs.JOBS), choices=jobs.JOBS, help="jobs to time")
    parser.add_argument("--synthetic", action="store_true", help="use batches in memory, not JPEG files")
    args = parser.parse_args()
    faults.init_distributed(args.device)
    common.start(args)
    images = args.steps * args.batch_size * utils.world_size()
    with tempfile.TemporaryDirectory() as folder:
        if args.synthetic:
            loaders = jobs.synthetic_batches(args, args.steps)
        else:
            common.make_jpegs(folder, images)
            loaders = jpeg_loaders(args, folder, utils.world_size(), utils.rank())
        built = {name: jobs.JOBS[name](args) for name in args.variants}
        flops = common.count_flops(lambda: built[args.variants[0]].train(list(loaders[args.variants[0]])[:1]))
        trains = {name: functools.partial(job.train, loaders[name]) for name, job in built.items()}
        times = common.interleave(trains, args, warm_up=1)
    title = f"{args.model} under {args.teacher_model}, batch {args.batch_size}"
    common.report(title, times, args.variants[0], images, flops=flops * args.steps, peak=common.peak_flops(args))
    common.write_json(args, seconds=times, images=images, peak_bytes=common.peak_memory(args))


if __name__ == "__main__":
    main()
