"""Analyses of blocks: which to pair, entropy over depth, and the dimensions that the last block's tokens fill.

Symbols as in spectral.py: B images, C channels, an H x W grid of N = H W patch tokens.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
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
    """
    limits = torch.stack([torch.stack([torch.stack(torch.aminmax(m)) for m in maps]) for maps in batches()]).double()
    lows, highs = limits[..., 0].amin(0), limits[..., 1].amax(0)  # of each block
    images, sums = 0, torch.zeros(3, len(lows), dtype=torch.float64)
    for maps in batches():
        for i, m in enumerate(maps):
            m = m.double()
            shared, own = _entropy(m, lows.min(), highs.max(), bins), _entropy(m, lows[i], highs[i], bins)
            sums[:, i] += len(m) * torch.stack((shared, own, m.abs().mean())).cpu()
        images += len(m)
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


def _histogram(dims: Tensor, size: int) -> Tensor:
    """Return how many images have d of `size` dimensions, d = 0, 1, ..., per share: int64 (shares, size + 1)."""
    return torch.stack([torch.bincount(values, minlength=size + 1) for values in dims.cpu().T])


def _percentile_99(counts: Tensor) -> float:
    """Return the 99th percentile, linearly interpolated, of a sample in which `counts[d]` values equal d."""
    return float(np.percentile(np.repeat(np.arange(len(counts)), counts), 99))


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
    """
    histograms: dict[str, Any] = defaultdict(int)
    moments: dict[str, Any] = defaultdict(int)
    total, images = 0, 0
    for x, energies, rotated in _read(batches, seed):
        _, tokens, width = x.shape
        images += len(x)
        total += x.sum((0, 1))
        centered = squared_singular_values(x - x.mean(1, keepdim=True))
        for name, values in (("svd", energies), ("svd_centered", centered)):
            histograms[name] += _histogram(dimensions(values), width)
        for name, values in (("pca", x), ("pca_rotated", rotated)):
            moments[name] += torch.einsum("bnc,bnd->cd", values, values)
    mean = total / (images * tokens)
    moments["pca_centered"] = moments["pca"] - images * tokens * torch.outer(mean, mean)
    bases = {name: torch.linalg.eigh(moment) for name, moment in moments.items()}
    for x, _, rotated in _read(batches, seed):
        for name, values in (("pca", x), ("pca_centered", x - mean), ("pca_rotated", rotated)):
            shares = (values @ bases[name].eigenvectors.flip(1)).square().sum(1)
            histograms[name] += _histogram(dimensions(shares), width)
    spectra = {"pca_global": bases["pca"], "pca_global_centered": bases["pca_centered"]}
    return {
        **{name: [_percentile_99(row) for row in rows] for name, rows in histograms.items()},
        **{name: dimensions(basis.eigenvalues.flip(0).clamp_min(0)).tolist() for name, basis in spectra.items()},
        "images": images,
        "cap": min(tokens, width),
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
    return [index for *_, index in sorted(order)][: number or len(seen)]


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
        beside = "   " + " ".join(map(str, published.get(key, [])))
        lines.append(f"{name:<20}{''.join(f'{round(value):>6}' for value in ranks[key])}{beside}".rstrip())
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
