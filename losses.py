"""The training loss: cross-entropy, distillation of the logits, and the feature term, as named terms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral import FeatureHooks, spectral_loss

TERMS = ("loss_base", "loss_fft", "loss_dist")


class FrozenTeacher:
    """A model in eval mode without gradients that gives its logits and the maps of its blocks.

    Not an nn.Module, so that a loss holding one has no parameters and no checkpoint ever contains it.

    Args:
        model: a timm model, on its device.
        ids: block ids whose maps are wanted (`spectral.FeatureHooks`).
        scale, shift: tensors (3, 1, 1) that take images normalised for the student to the teacher's normalisation,
            x * scale + shift; None where both agree.
    """

    def __init__(self, model: nn.Module, ids=(), scale: Tensor | None = None, shift: Tensor | None = None):
        self.model = model.eval().requires_grad_(False)
        self.hooks = FeatureHooks(model, ids)
        self.scale, self.shift = scale, shift

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """images (B, 3, H, W) -> logits (B, classes), list of maps (B, C, H, W)."""
        if self.scale is not None:
            images = images * self.scale + self.shift
        return self.model(images), self.hooks.pop()


def renormalization(student, teacher, device):
    """(scale, shift) for `FrozenTeacher` from both models' (mean, std), three floats each; Nones if they agree."""
    if student == teacher:
        return None, None
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(value, device=device).view(3, 1, 1) for value in values] for values in (student, teacher)
    )
    return std / own_std, (mean - own_mean) / own_std


def soft_distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 KL(teacher || student) of logits (B, classes) softened by tau: summed over classes, averaged over images.

    DeiT divides by the number of classes as well, so its alpha weighs this term `classes` times less.
    """
    student = F.log_softmax(student.float() / tau, dim=1)
    teacher = F.log_softmax(teacher.float() / tau, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def hard_distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Cross-entropy of student logits (B, classes) against the teacher's own decisions; `tau` does not enter."""
    return F.cross_entropy(student.float(), teacher.argmax(dim=1))


class DistillationLoss:
    """Total loss of a training step as a dict of terms whose `loss` is the sum of the others.

    | kind | loss |
    |---|---|
    | none | base |
    | soft | (1 - alpha) base + alpha tau^2 KL + beta w_fft mean of the pairs' feature losses |
    | hard | (1 - alpha) base + alpha cross-entropy with the teacher's argmax + the same feature term |
    | fft | (1 - alpha) base + the same feature term |

    Args:
        base_criterion: (logits, labels) -> scalar.
        kind: none, soft, hard or fft.
        teacher: images -> (logits, maps), run without gradients; None only for kind none.
        alpha, tau, beta, w_fft: the weights above and the temperature.
        feature_loss: (student map, teacher map) -> scalar, of one pair.
    """

    def __init__(
        self,
        base_criterion,
        kind="none",
        teacher=None,
        alpha=0.5,
        tau=1.0,
        beta=1.0,
        w_fft=0.2,
        feature_loss=spectral_loss,
    ):
        self.base_criterion = base_criterion
        self.teacher = teacher
        self.tau = tau
        self.feature_loss = feature_loss
        self.logit_loss = {"soft": soft_distillation, "hard": hard_distillation}.get(kind)
        self.base_weight = 1.0 if kind == "none" else 1.0 - alpha
        self.logit_weight = alpha
        self.feature_weight = beta * w_fft

    def __call__(self, images: Tensor, outputs, features: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Computes the terms, each after its weight; a term that the kind does not have is zero.

        Args:
            images: (B, 3, H, W), as the student saw them.
            outputs: the student's logits (B, classes), or a pair (class head, distillation head) of them.
            features: the student's maps, one for each map of the teacher.
            labels: (B,) int64, or (B, classes) probabilities.

        Returns:
            {"loss", "loss_base", "loss_fft", "loss_dist"}: float32 scalars.
        """
        class_logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        terms = dict.fromkeys(TERMS, class_logits.new_zeros((), dtype=torch.float32))
        terms["loss_base"] = self.base_weight * self.base_criterion(class_logits.float(), labels)
        if self.teacher is not None:
            teacher_logits, teacher_features = self.teacher(images)
            if self.logit_loss is not None:
                terms["loss_dist"] = self.logit_weight * self.logit_loss(distillation_logits, teacher_logits, self.tau)
            if teacher_features:
                pairs = [self.feature_loss(s, t) for s, t in zip(features, teacher_features, strict=True)]
                terms["loss_fft"] = self.feature_weight * torch.stack(pairs).mean()
        return {"loss": sum(terms.values()), **terms}
