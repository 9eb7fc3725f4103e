"""Feature losses of other papers, and the table of all feature losses.

Symbols as in spectral.py: B images, C channels, an H x W grid of N = H W patch tokens. Each loss takes maps of a pair
of blocks, student first, (B, C, H, W) of any floating dtype, and returns a float32 scalar (float64 for float64 maps).
All compute in float32, under autocast as well.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral import align, closed_spectral_loss, mse_loss

MANIFOLD_WEIGHTS = (4.0, 0.1, 0.2)  # within an image, across images, random tokens


def mse_plain(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of (student - teacher)^2 after `spectral.align`, the feature loss of arXiv 2511.15572.

    `spectral.mse_loss` has a further factor W / 4K, as feature MSE has in the spectral loss.
    """
    student, teacher = align(student, teacher)
    return F.mse_loss(student, teacher)


def manifold_loss(student: Tensor, teacher: Tensor, tokens: int = 192, index: Tensor | None = None) -> Tensor:
    """Return the weighted sum of the three terms of Manifold Distillation, arXiv 2107.01378 (NeurIPS 2022).

    Tokens are divided by their length, so that G(X) = X X^T has their cosines. Each term is the mean of
    (G(teacher) - G(student))^2: over the N tokens of an image (weight 4), over the B images at a grid position (0.1),
    and over tokens drawn from the whole batch without replacement (0.2). The batch is that of one process.

    Args:
        student, teacher: maps of the same grid; their widths may differ.
        tokens: number of tokens to draw, K; all tokens if the batch has fewer.
        index: (K,) int64, the tokens b N + h W + w to use instead; None to draw them in each call from the global
            generator of the maps' device.

    Raises:
        ValueError: the grids differ.
    """
    check_same_grid(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = _unit_tokens(student), _unit_tokens(teacher)
        flat = student.flatten(0, 1), teacher.flatten(0, 1)
        if index is None:
            index = torch.randperm(len(flat[0]), device=student.device)[:tokens]
        terms = (
            _gram_distance(student, teacher),
            _gram_distance(student.transpose(0, 1), teacher.transpose(0, 1)),
            _gram_distance(*(x[index] for x in flat)),
        )
        return (torch.stack(terms) * student.new_tensor(MANIFOLD_WEIGHTS)).sum()


def _unit_tokens(maps: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as tokens of length 1, (B, N, C), in float32 or float64."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    return F.normalize(maps.flatten(2).transpose(1, 2), dim=-1, eps=1e-12)


def _gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the Gram matrices of (..., tokens, C)."""
    return F.mse_loss(student @ student.mT, teacher @ teacher.mT)


class Projector(nn.Module):
    """Feature MSE after a projector, the baseline of arXiv 2511.06848.

    A linear layer projects the student's tokens to the teacher's width. Each map then has its own batch normalization,
    with the statistics of the process's batch in training and evaluation. In the published runs the projector was not
    trained, because the optimizer was built before it; FitNets (arXiv 1412.6550) trains it.

    Args:
        student_channels, teacher_channels: widths of the two maps.
        trained: whether the parameters are trained.
    """

    def __init__(self, student_channels: int, teacher_channels: int, trained: bool = False):
        super().__init__()
        self.projector = nn.Linear(student_channels, teacher_channels)
        self.bn_student, self.bn_teacher = (
            nn.BatchNorm2d(teacher_channels, track_running_stats=False) for _ in range(2)
        )
        self.requires_grad_(trained)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps of the same grid; raise a ValueError if the grids differ."""
        check_same_grid(student, teacher)
        dtype = torch.promote_types(student.dtype, self.projector.weight.dtype)
        with torch.autocast(student.device.type, enabled=False):
            projected = self.projector(student.to(dtype).movedim(1, -1)).movedim(-1, 1)
            return F.mse_loss(self.bn_student(projected), self.bn_teacher(teacher.to(dtype)))


def check_same_grid(student: Tensor, teacher: Tensor) -> None:
    """Raise a ValueError unless two maps (B, C, H, W) agree in H and W."""
    grids = [tuple(maps.shape[2:]) for maps in (student, teacher)]
    if grids[0] != grids[1]:
        raise ValueError(
            f"this feature loss needs the same tokens on both sides, not {grids[0]} and {grids[1]}: "
            "choose blocks with equal grids, or --feature-loss spectral, mse or mse_plain"
        )


# Losses without parameters, one function for all pairs, by their names in --feature-loss.
PAIR_LOSSES = {"spectral": closed_spectral_loss, "mse": mse_loss, "mse_plain": mse_plain, "manifold": manifold_loss}
PROJECTORS = {"projector": False, "projector_trained": True}  # name: whether it is trained


def build_feature_loss(
    name: str, student_channels: Sequence[int], teacher_channels: Sequence[int], seed: int = 0
) -> Callable[[Tensor, Tensor], Tensor] | nn.ModuleList:
    """Build the `feature_loss` of `losses.DistillationLoss`.

    Args:
        name: a key of PAIR_LOSSES or PROJECTORS.
        student_channels, teacher_channels: width of each pair's maps.
        seed: seed of the projectors' weights, which are the same on all processes. The global generator does not
            change, so student and data do not depend on the choice of the loss.

    Returns:
        One loss for all pairs, or a ModuleList with one per pair.
    """
    if name not in PROJECTORS:
        return PAIR_LOSSES[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        widths = zip(student_channels, teacher_channels, strict=True)
        return nn.ModuleList(Projector(s, t, PROJECTORS[name]) for s, t in widths)
