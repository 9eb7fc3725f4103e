"""Time the parts of a training step on random images, in the program and in the reference implementation."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import jobs


def main():
    parser = common.parser(__doc__, repeats=9)
    jobs.add_flags(parser)
    args = parser.parse_args()
    common.start(args)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device)
    labels = torch.randint(jobs.NUM_CLASSES, (args.batch_size,), device=args.device)
    amp_dtype = getattr(torch, args.amp_dtype)
    parts = {name: jobs.Parts(build(args), images, labels, amp_dtype) for name, build in jobs.JOBS.items()}
    results = {}
    for part in jobs.PARTS:
        results[part] = common.interleave({name: getattr(parts[name], part) for name in parts}, args)
        common.report(part, results[part], "reference", args.batch_size)
    whole = {
        name: [sum(row) for row in zip(*(times[name] for times in results.values()), strict=True)] for name in parts
    }
    common.report("sum of the parts", whole, "reference", args.batch_size)
    common.write_json(args, seconds=results)


if __name__ == "__main__":
    main()
