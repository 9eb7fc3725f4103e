"""The paper's method: feature maps of chosen blocks, and the loss between their two-dimensional spectra.

Legend, used throughout: B images, C channels, an H x W grid of patch tokens, K = W // 2 + 1 columns of the half
spectrum, N tokens a block hands on (class and distillation tokens included).

Source: Tian, Xu, Li, Pan, "SpectralKD", arXiv 2412.19055.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureHooks:
    """Captures the outputs of blocks of a timm model as maps, without touching its `forward` or state-dict keys.

    An id is an index into `model.feature_info`, where timm names the module of every block (ViT, DeiT, CaiT) or stage
    (Swin, convolutional networks). Build it before DistributedDataParallel and torch.compile; it then sees each
    forward of `model`, whoever calls it.

    Args:
        model: a timm model.
        ids: block ids, in the order in which `pop` returns the maps. An id may be repeated.

    Raises:
        ValueError: the model does not say where its blocks are, or an id is out of range.
    """

    def __init__(self, model: nn.Module, ids=()):
        self.ids = list(ids)
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._image_size = None
        self._maps = {}
        self._handles = []
        if not self.ids:
            return
        blocks = describe_blocks(model)
        for i in sorted(set(self.ids)):
            if not 0 <= i < len(blocks):
                raise ValueError(f"block id {i} is out of range: {type(model).__name__} has ids 0..{len(blocks) - 1}")
        self._handles.append(model.register_forward_pre_hook(self._begin))
        for i in sorted(set(self.ids)):
            module = model.get_submodule(blocks[i]["module"])
            self._handles.append(module.register_forward_hook(self._capture_for(i, blocks[i]["reduction"])))

    def _begin(self, model, inputs):
        self._maps.clear()
        self._image_size = inputs[0].shape[-2:]

    def _capture_for(self, i, reduction):
        def capture(module, inputs, output):
            self._maps[i] = self._as_map(output, reduction)

        return capture

    def _as_map(self, output: Tensor, reduction: int) -> Tensor:
        if output.ndim == 4:
            return output.permute(0, 3, 1, 2) if self._channels_last else output
        # Tokens (B, N, C). timm's num_prefix_tokens is wrong for CaiT, so the prefix is whatever the grid leaves over.
        height, width = (size // reduction for size in self._image_size)
        return output[:, output.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))

    def pop(self) -> list[Tensor]:
        """Returns the maps of the latest forward, one (B, C, H, W) view per id in the order asked, and forgets them.

        Raises:
            RuntimeError: there was no forward since the last call.
        """
        missing = [i for i in self.ids if i not in self._maps]
        if missing:
            raise RuntimeError(f"no map of blocks {missing}: the model has not run since the last pop()")
        maps = [self._maps[i] for i in self.ids]
        self._maps.clear()
        return maps

    def remove(self) -> None:
        """Takes the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()
        self._maps.clear()


def describe_blocks(model: nn.Module) -> list[dict]:
    """Returns timm's description of every block: a list of {"module": name, "num_chs": C, "reduction": stride}.

    Raises:
        ValueError: the model carries no such description.
    """
    info = getattr(model, "feature_info", None)
    blocks = list(info) if isinstance(info, (list, tuple)) else list(getattr(info, "info", ()))
    if not blocks or not all("module" in block and "reduction" in block for block in blocks):
        raise ValueError(
            f"{type(model).__name__} has no feature_info, so its blocks cannot be numbered: use a timm model"
        )
    return blocks


def align(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Brings two maps (B, C, H, W) to one shape, in float32.

    Adaptive average pooling takes the wider map to the narrower width and the finer grid to the coarser; equal
    dimensions are left alone. float32 also inside autocast, because cuFFT has half precision for powers of two only.

    Raises:
        ValueError: the maps hold different numbers of images.
    """
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student and teacher maps hold {student.shape[0]} and {teacher.shape[0]} images")
    shape = tuple(min(s, t) for s, t in zip(student.shape[1:], teacher.shape[1:], strict=True))
    return _pool(student.float(), shape), _pool(teacher.float(), shape)


def _pool(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return x if x.shape[1:] == shape else F.adaptive_avg_pool3d(x.unsqueeze(1), shape).squeeze(1)


def spectral_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps' half spectra, method equation of arXiv 2412.19055.

    D = rfft2(student - teacher), orthonormal: the transform is linear, so one of the difference is enough. The loss is
    the mean of (Re D)^2 and (Im D)^2 over all 2 B C H K numbers. Because the orthonormal transform keeps energy, this
    is feature MSE with weight W / 4K plus a penalty on row means.

    Args:
        student, teacher: maps (B, C, H, W) of any floating dtype; differing C, H, W are pooled by `align`.

    Returns:
        A float32 scalar.
    """
    student, teacher = align(student, teacher)
    spectrum = torch.fft.rfft2(student - teacher, norm="ortho")
    return torch.view_as_real(spectrum).square().mean()


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The spatial twin of `spectral_loss`: feature MSE with the weight W / 4K that it has inside the spectral loss.

    Same arguments and result as `spectral_loss`, of which it leaves out only the penalty on row means.
    """
    student, teacher = align(student, teacher)
    width = student.shape[-1]
    return (student - teacher).square().mean() * (width / (4 * (width // 2 + 1)))


FEATURE_LOSSES = {"spectral": spectral_loss, "mse": mse_loss}
