"""The training loss: cross-entropy, logit distillation and the feature loss, as named terms."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral import FeatureHooks, closed_spectral_loss, spectral_loss

TERMS = ("loss_base", "loss_fft", "loss_dist")


class FrozenTeacher:
    """A model in eval mode, without gradients, that returns its logits and feature maps.

    It is not an nn.Module, so its parameters are not among those of the loss, nor in checkpoints. If its weights are in
    half precision, all of it computes in that dtype, with or without autocast.

    Args:
        model: a timm model, on its device.
        ids: ids of the blocks whose maps to return (`spectral.FeatureHooks`).
        scale, shift: from `renormalization`; None if student and teacher take the same images.
        size: side in pixels to which images are resized; None to leave them as they are.
        classes: the model's outputs to return as logits, in this order; None for all.
    """

    def __init__(self, model: nn.Module, ids: Iterable[int] = (), scale=None, shift=None, size=None, classes=None):
        self.model = model.eval().requires_grad_(False)
        self.hooks = FeatureHooks(model, ids)
        self.scale, self.shift, self.size = scale, shift, size
        weight = next(model.parameters())
        self.dtype = weight.dtype
        self.classes = None if classes is None else torch.tensor(classes, device=weight.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits (B, classes) and a list of maps (B, C, H, W) for images (B, 3, H, W)."""
        half = self.dtype != torch.float32
        with torch.autocast(images.device.type, enabled=False) if half else contextlib.nullcontext():
            logits = self.model(self.prepare(images))
        return logits if self.classes is None else logits[:, self.classes], self.hooks.pop()

    def prepare(self, images: Tensor) -> Tensor:
        """Resize, renormalize and cast the student's images (B, 3, H, W) for the teacher."""
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        images = images if self.scale is None else images * self.scale + self.shift
        return images.to(self.dtype)


def renormalization(
    student: Sequence[Sequence[float]], teacher: Sequence[Sequence[float]], device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Return (scale, shift), each (3, 1, 1): x * scale + shift converts the student's images to the teacher's.

    `student` and `teacher` are each model's (mean, std) for its images. Return (None, None) if they are equal.
    """
    if student == teacher:
        return None, None
    (mean, std), (teacher_mean, teacher_std) = (
        [torch.tensor(value, device=device).view(3, 1, 1) for value in values] for values in (student, teacher)
    )
    return std / teacher_std, (mean - teacher_mean) / teacher_std


def soft_distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return tau^2 KL(teacher || student) of logits (B, classes) divided by tau: summed over classes, mean over images.

    DeiT also divides by the number of classes, which gives this term less weight for the same alpha.
    """
    student = F.log_softmax(student.float() / tau, dim=1)
    teacher = F.log_softmax(teacher.float() / tau, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def hard_distillation(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return the cross-entropy of student logits (B, classes) with the teacher's argmax; `tau` is not used."""
    # The argmax of NaN is a valid class. Adding 0 x teacher makes the loss NaN if a logit is not finite.
    return F.cross_entropy(student.float(), teacher.argmax(dim=1)) + (0 * teacher).sum()


class DistillationLoss(nn.Module):
    """The training loss as a dict of terms; `loss` is the sum of the others.

    | kind | loss |
    |---|---|
    | none | CE |
    | soft | (1 - alpha) CE + alpha tau^2 KL + beta w_fft (mean of the feature loss over pairs) |
    | hard | (1 - alpha) CE + alpha CE with the teacher's argmax + the same feature term |
    | fft | (1 - alpha) CE + the same feature term |

    Its only parameters are those of `base_criterion` and `feature_loss`: by default none.

    Args:
        base_criterion: CE above; (logits, labels) -> scalar.
        kind: none, soft, hard or fft.
        teacher: images -> (logits, maps), without gradients and not an nn.Module; None for kind none.
        alpha, tau, beta, w_fft: the weights above and the temperature.
        feature_loss: (student map, teacher map) -> scalar for one pair, or an nn.ModuleList with one loss per pair.
    """

    def __init__(
        self,
        base_criterion: Callable[[Tensor, Tensor], Tensor],
        kind: str = "none",
        teacher: Callable[[Tensor], tuple[Tensor, list[Tensor]]] | None = None,
        alpha: float = 0.5,
        tau: float = 1.0,
        beta: float = 1.0,
        w_fft: float = 0.2,
        feature_loss: Callable[[Tensor, Tensor], Tensor] | nn.ModuleList = closed_spectral_loss,
    ):
        super().__init__()
        self.base_criterion = base_criterion
        self.teacher = teacher
        self.tau = tau
        self.feature_loss, self.per_pair = feature_loss, isinstance(feature_loss, nn.ModuleList)
        self.logit_loss = {"soft": soft_distillation, "hard": hard_distillation}.get(kind)
        self.base_weight = 1.0 if kind == "none" else 1.0 - alpha
        self.logit_weight = alpha
        self.feature_weight = beta * w_fft

    def forward(self, images: Tensor, outputs, features: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return {"loss", "loss_base", "loss_fft", "loss_dist"}: weighted float32 scalars, 0 for terms not in use.

        Args:
            images: (B, 3, H, W), as the student saw them.
            outputs: the student's logits (B, classes), or a pair (class head, distillation head) of them.
            features: the student's maps, one per map of the teacher.
            labels: (B,) int64, or (B, classes) probabilities.
        """
        class_logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        terms = dict.fromkeys(TERMS, class_logits.new_zeros((), dtype=torch.float32))
        terms["loss_base"] = self.base_weight * self.base_criterion(class_logits.float(), labels)
        if self.teacher is not None:
            logits, teacher_features = self.teacher(images)
            if self.logit_loss is not None:
                terms["loss_dist"] = self.logit_weight * self.logit_loss(distillation_logits, logits, self.tau)
            if teacher_features:
                terms["loss_fft"] = self.feature_weight * self.feature_term(features, teacher_features)
        return {"loss": sum(terms.values()), **terms}

    def feature_term(self, features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
        """Return the mean of the feature loss over pairs of maps (B, C, H, W)."""
        losses = self.feature_loss if self.per_pair else [self.feature_loss] * len(features)
        pairs = [loss(s, t) for loss, s, t in zip(losses, features, teacher_features, strict=True)]
        return torch.stack(pairs).mean()

    def compile(self, feature_loss: bool = False) -> None:  # type: ignore[override]
        """Compile the teacher, and the feature loss if asked; torch.compile cannot compile complex numbers."""
        if self.teacher is not None:
            self.teacher.model = torch.compile(self.teacher.model, dynamic=False)  # type: ignore[attr-defined]
        if feature_loss and not self.per_pair and self.feature_loss is not spectral_loss:
            self.feature_loss = torch.compile(self.feature_loss, dynamic=False)  # type: ignore[arg-type]
