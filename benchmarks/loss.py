"""Time the spectral loss of one pair, forward and backward: reference, one transform, closed form."""

import functools
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import reference

import spectral

SHAPES = {  # prefix tokens, student channels, teacher channels, side of the grid
    "DeiT-Ti, same width": (1, 192, 192, 14),
    "DeiT-Ti under CaiT-S24": (1, 192, 384, 14),
    "no prefix, same width": (0, 192, 192, 14),
    "Swin stage 0": (0, 96, 96, 56),
    "Swin stage 3": (0, 768, 768, 7),
}
LOSSES = {
    "reference": reference.spectral_loss,
    "fft": spectral.spectral_loss,
    "closed": spectral.closed_spectral_loss,
}


def maps_of(tokens, prefix, side):
    """Return the patch tokens of (B, N, C) as a view (B, C, H, W)."""
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def run(loss, tokens, prefix, teacher, side):
    tokens.grad = None
    loss(maps_of(tokens, prefix, side), teacher).backward()


def main():
    parser = common.parser(__doc__, repeats=50)
    parser.add_argument("--batch-size", type=int, default=32, help="batch size")
    parser.add_argument("--compile", action="store_true", help="also time the compiled closed form")
    args = parser.parse_args()
    common.start(args)
    losses = dict(LOSSES)
    if args.compile:
        losses["closed, compiled"] = torch.compile(spectral.closed_spectral_loss, dynamic=False)
    results = {}
    for name, (prefix, student_channels, teacher_channels, side) in SHAPES.items():
        tokens = torch.randn(args.batch_size, prefix + side**2, student_channels, device=args.device)
        teacher = maps_of(torch.randn(args.batch_size, side**2, teacher_channels, device=args.device), 0, side)
        rest = (tokens.requires_grad_(), prefix, teacher, side)
        variants = {key: functools.partial(run, loss, *rest) for key, loss in losses.items()}
        results[name] = common.interleave(variants, args)
        common.report(f"{name}: ({args.batch_size}, {student_channels}, {side}, {side})", results[name], "reference")
    common.write_json(args, seconds=results)


if __name__ == "__main__":
    main()
