"""Analyses of blocks: which to pair, entropy over depth, and the dimensions that the last block's tokens fill.

Symbols as in spectral.py: B images, C channels, an H x W grid of N = H W patch tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

SHARES = (0.80, 0.90, 0.95, 0.99)  # shares of the energy for which dimensions are counted


def entropy_over_depth(batches: Callable[[], Iterable[Sequence[Tensor]]], bins: int = 100) -> dict[str, Tensor]:
    """Return entropy and magnitude of each block, arXiv 2511.06848.

    The C values of each token are counted in equal bins, and the entropy -sum p log2 p is averaged over images and
    tokens. The paper's bins span the values of all blocks, so a block's entropy grows with its magnitude; as a control,
    the bins of each block span its own range. The data is read twice, first for the ranges and then for the entropies,
    so memory does not grow with the number of images.

    Args:
        batches: returns an iterable over batches, with the same images each time; a batch is one map (B, C, H, W) per
            block. The paper uses the first batch of 32.
        bins: number of bins.

    Returns:
        float64 (blocks,) on the CPU: `entropy` and `entropy_own_range` in bits, and `magnitude`, the mean of |maps|.

    Raises:
        ValueError: there are no images.
    """
    limits = [torch.stack([torch.stack(torch.aminmax(m)).double() for m in maps]) for maps in batches()]
    if not limits:
        raise ValueError("there are no images to analyze")
    lows, highs = torch.stack(limits).unbind(-1)  # (batches, blocks)
    ranges = torch.stack((lows.amin(0), highs.amax(0)), dim=1)
    low, high = ranges[:, 0].min(), ranges[:, 1].max()
    images, sums = 0, torch.zeros(3, len(ranges), dtype=torch.float64)
    for maps in batches():
        rows = [
            torch.stack((_entropy(m, low, high, bins), _entropy(m, own[0], own[1], bins), m.abs().mean()))
            for m, own in zip((m.double() for m in maps), ranges, strict=True)
        ]
        sums += len(maps[0]) * torch.stack(rows, dim=1).cpu()
        images += len(maps[0])
    return dict(zip(("entropy", "entropy_own_range", "magnitude"), sums / images, strict=True))


def _entropy(maps: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Return the mean entropy in bits of (B, C, H, W); the last bin includes `high`; equal limits make one bin."""
    tokens = maps.movedim(1, -1).flatten(0, -2)
    width = (high - low).clamp_min(torch.finfo(maps.dtype).tiny) / bins
    index = ((tokens - low) / width).long().clamp_(max=bins - 1)
    counts = tokens.new_zeros(len(tokens), bins).scatter_add_(1, index, torch.ones_like(tokens))
    return torch.special.entr(counts / tokens.shape[1]).sum(1).mean() / math.log(2)


def dimensions(energies: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Return, for each share, the smallest d such that the first d energies have that share of the total.

    Args:
        energies: (..., D), not negative, in the order in which they are added.

    Returns:
        int64 (..., shares).
    """
    cumulative = energies.double().cumsum(-1)
    wanted = cumulative[..., -1:] * torch.tensor(shares, dtype=torch.float64, device=energies.device)
    return 1 + (cumulative.unsqueeze(-1) < wanted.unsqueeze(-2)).sum(-2).clamp(max=energies.shape[-1] - 1)


def squared_singular_values(tokens: Tensor) -> Tensor:
    """Return the squared singular values of tokens (B, N, D), descending, as float64 (B, min(N, D))."""
    tokens = tokens.double()
    gram = tokens @ tokens.mT if tokens.shape[1] < tokens.shape[2] else tokens.mT @ tokens
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def count_percentile(counts: Tensor, percent: float = 99) -> float:
    """Return a percentile, linearly interpolated, of a sample in which `counts[d]` values equal d."""
    cumulative = counts.cumsum(0)
    position = (int(cumulative[-1]) - 1) * percent / 100
    below, above = (
        int(torch.searchsorted(cumulative, k, right=True)) for k in (math.floor(position), math.ceil(position))
    )
    return below + (above - below) * (position - math.floor(position))


class _Counts:
    """Count the images with d dimensions for each share, so that memory does not grow with the images."""

    def __init__(self, size: int):
        self.counts = torch.zeros(len(SHARES), size + 1, dtype=torch.int64)

    def add(self, dims: Tensor) -> None:
        for row, values in zip(self.counts, dims.cpu().T, strict=True):
            row += torch.bincount(values, minlength=len(row))

    def percentiles(self) -> list[float]:
        return [count_percentile(row) for row in self.counts]


def rank_analysis(batches: Callable[[], Iterable[Tensor]], seed: int = 0) -> dict[str, Any]:
    """Count the dimensions with 80, 90, 95 and 99 % of the energy of a block's tokens, arXiv 2511.15572.

    `svd` counts singular directions of each image's (N, D) tokens. `pca` counts directions of one basis for all images:
    the eigenvectors of the mean of X^T X, in descending order of eigenvalue. Neither centers the tokens. The data is
    read twice, first for the basis and then for the shares. Only (D, D) sums and counts are kept, so memory does not
    grow with the number of images.

    Controls: `centered` subtracts the mean token, of the image for svd and of the data set for pca. `pca_rotated`
    rotates the tokens of each image randomly, so that images share no basis: an upper bound. `cap`, min(N, D), is the
    largest number that svd can return.

    Args:
        batches: returns an iterable over maps (B, D, H, W), with the same images in the same order each time.
        seed: seed of the rotations.

    Returns:
        `svd`, `pca`, `svd_centered`, `pca_centered`, `pca_rotated`: the 99th percentile over images, per share (the
        paper rounds it half to even); `pca_global`, `pca_global_centered`: the dimensions of the basis itself;
        `images`, `cap`, `width`.

    Raises:
        ValueError: there are no images.
    """
    svd, moments = None, {}
    for x, energies, rotated in _read(batches, seed):
        if svd is None:
            width = x.shape[-1]
            cap = min(x.shape[1:])
            svd, svd_centered = _Counts(cap), _Counts(cap)
            moments = {name: x.new_zeros(width, width) for name in ("pca", "pca_rotated")}
            total, tokens, images = x.new_zeros(width), 0, 0
        svd.add(dimensions(energies))
        svd_centered.add(dimensions(squared_singular_values(x - x.mean(1, keepdim=True))))
        for name, values in (("pca", x), ("pca_rotated", rotated)):
            moments[name] += torch.einsum("bnc,bnd->cd", values, values)
        total += x.sum((0, 1))
        images, tokens = images + len(x), tokens + x.shape[0] * x.shape[1]
    if svd is None:
        raise ValueError("there are no images to analyze")
    mean = total / tokens
    moments["pca_centered"] = moments["pca"] - tokens * torch.outer(mean, mean)
    bases = {name: torch.linalg.eigh(moment) for name, moment in moments.items()}
    pca = {name: _Counts(width) for name in bases}
    for x, _, rotated in _read(batches, seed):
        for name, values in (("pca", x), ("pca_centered", x - mean), ("pca_rotated", rotated)):
            pca[name].add(dimensions((values @ bases[name][1].flip(1)).square().sum(1)))
    found = {"svd": svd, "svd_centered": svd_centered, **pca}
    spectra = {"pca_global": bases["pca"][0], "pca_global_centered": bases["pca_centered"][0]}
    return {
        **{name: counts.percentiles() for name, counts in found.items()},
        **{name: dimensions(values.flip(0).clamp_min(0)).tolist() for name, values in spectra.items()},
        "images": images,
        "cap": cap,
        "width": width,
    }


def _read(batches: Callable[[], Iterable[Tensor]], seed: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Yield each batch's tokens (B, N, D) in float64, their squared singular values, and stand-ins for rotated tokens.

    A randomly rotated X = U S V^T has the Gram matrix Q S^2 Q^T, with random orthonormal columns Q (D, n). So has
    S Q^T, (n, D), without the cost of a D x D rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    for maps in batches():
        x = maps.double().flatten(2).mT
        energies = squared_singular_values(x)
        noise = torch.randn(len(x), x.shape[2], energies.shape[1], generator=generator, dtype=torch.float64)
        yield x, energies, energies.sqrt().unsqueeze(-1) * torch.linalg.qr(noise.to(x.device))[0].mT


def one_of_each_class(targets: Sequence[int], number: int | None = None) -> list[int]:
    """Return the indices of the first sample of each class, then of the second, and so on.

    Args:
        targets: class of each sample, in order of file name, as in a torchvision ImageFolder.
        number: how many to return (all if there are fewer); None for one per class, which for ImageNet's validation
            set are the images of the published rank table.
    """
    seen: Counter[int] = Counter()
    order = []
    for index, target in enumerate(targets):
        order.append((seen[target], target, index))
        seen[target] += 1
    return [index for *_, index in sorted(order)][: len(seen) if number is None else number]


RANKS = {
    "svd": "SVD of each image",
    "svd_centered": "  centered",
    "pca": "PCA of all images",
    "pca_centered": "  centered",
    "pca_rotated": "  each image rotated",
}


def rank_table(ranks: dict[str, Any], published: dict[str, list[int]]) -> list[str]:
    """Return the lines of a table of `rank_analysis`, rounded as in the paper, next to published integers."""
    head = "".join(f"{share:>6.0%}" for share in SHARES)
    lines = [f"{'':<20}{head}" + ("   published" if published else "")]
    for key, name in RANKS.items():
        found, known = ranks[key], published.get(key)
        beside = f"   {' '.join(map(str, known))}" if known else ""
        lines.append(f"{name:<20}{''.join(f'{round(value):>6}' for value in found)}{beside}")
    return lines


def suggest_pairs(intensity: list[float], student: list[int], teacher: list[int], num_pairs: int) -> tuple[list, list]:
    """Choose the blocks at the two ends of the teacher with the largest total intensity, and student blocks for them.

    For equal totals, the most even split is chosen. If both models have stages, the last blocks of stages of equal
    resolution are paired. Otherwise, a deeper student uses its blocks at the same relative depth. Any other student
    uses as many of its first and last blocks, because blocks at the same relative depth might coincide.

    Args:
        intensity: intensity of the teacher's blocks, comparable across widths.
        student, teacher: reduction of each block, in input pixels per token.
        num_pairs: number of pairs.

    Returns:
        (student ids, teacher ids), ascending and without repeats.

    Raises:
        ValueError: there are fewer blocks than pairs.
    """
    s_from, t_from, unit = [*range(len(student))], [*range(len(teacher))], "blocks"
    if len(set(student)) > 1 and len(set(teacher)) > 1:
        common, unit = sorted(set(student) & set(teacher)), "stages of equal resolution"
        s_from, t_from = ([max(i for i, r in enumerate(net) if r == c) for c in common] for net in (student, teacher))
    for who, found in (("student", s_from), ("teacher", t_from)):
        if num_pairs > len(found):
            raise ValueError(f"{num_pairs} pairs: the {who} has only {len(found)} {unit}: ask for fewer")
    depth, extra = len(t_from), len(s_from) - len(t_from)

    def ends(first):
        return [*range(first), *range(depth - (num_pairs - first), depth)]

    def rank(first):
        return math.fsum(intensity[t_from[i]] for i in ends(first)), -abs(2 * first - num_pairs)

    first = max(range(num_pairs + 1), key=rank)
    if extra > 0:
        partners = [round(i * (len(s_from) - 1) / max(depth - 1, 1)) for i in ends(first)]
    else:
        partners = [i if i < first else i + extra for i in ends(first)]
    return [s_from[i] for i in partners], [t_from[i] for i in ends(first)]
