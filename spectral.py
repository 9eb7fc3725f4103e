"""The paper's method: feature maps of chosen blocks, and the loss between their two-dimensional spectra.

Legend, used throughout: B images, C channels, an H x W grid of patch tokens, K = W // 2 + 1 columns of the half
spectrum, N tokens a block hands on (class and distillation tokens included).

Source: Tian, Xu, Li, Pan, "SpectralKD", arXiv 2412.19055.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        RuntimeError: in the forward, where a block's output is no map of the channels that `feature_info` says.
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
            name = blocks[i]["module"]
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{type(model).__name__} has no {name}, which its feature_info names") from None
            self._handles.append(module.register_forward_hook(self._capture_for(i, blocks[i])))

    def _begin(self, model, inputs):
        self._maps.clear()
        self._image_size = inputs[0].shape[-2:]

    def _capture_for(self, i, block):
        def capture(module, inputs, output):
            if not torch.is_tensor(output) or output.ndim not in (3, 4):
                raise RuntimeError(f"the output of {block['module']} is no map of tokens")
            self._maps[i] = self._as_map(output, block["reduction"])
            if self._maps[i].shape[1] != block["num_chs"]:
                raise RuntimeError(f"the output of {block['module']} has not the channels that feature_info says")

        return capture

    def _as_map(self, output: Tensor, reduction: int) -> Tensor:
        if output.ndim == 4:
            return output.permute(0, 3, 1, 2) if self._channels_last else output
        # Tokens (B, N, C). timm's num_prefix_tokens is wrong for CaiT, so the prefix is whatever the grid leaves over.
        if any(size % reduction for size in self._image_size):
            raise RuntimeError(
                f"images of {tuple(self._image_size)} pixels are no whole number of {reduction} pixel patches"
            )
        height, width = (size // reduction for size in self._image_size)
        return output[:, output.shape[1] - height * width :].transpose(1, 2).unflatten(2, (height, width))

    def pop(self) -> list[Tensor]:
        """Returns the maps of the latest forward, one (B, C, H, W) view per id in the order asked, and forgets them.

        Raises:
            RuntimeError: there was no forward since the last call.
        """
        missing = [i for i in self.ids if i not in self._maps]
        if missing:
            raise RuntimeError(f"no map of blocks {missing}: it has not run since the last pop(), or bypasses them")
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
    if not blocks or not all("module" in block and block.get("reduction") for block in blocks):
        raise ValueError(
            f"{type(model).__name__} has no feature_info, so its blocks cannot be numbered: use a timm model"
        )
    return blocks


def align(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Brings two maps (B, C, H, W) to one shape, in float32 (float64 stays what it is).

    Adaptive average pooling takes the wider map to the narrower width and the finer grid to the coarser; equal
    dimensions are left alone. float32 also inside autocast, because cuFFT has half precision for powers of two only.

    Raises:
        ValueError: the maps hold different numbers of images.
    """
    shape = _common_shape(student, teacher)
    return _pool(student, shape), _pool(teacher, shape)


def _common_shape(student: Tensor, teacher: Tensor) -> tuple[int, int, int]:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"student and teacher maps hold {student.shape[0]} and {teacher.shape[0]} images")
    return tuple(min(s, t) for s, t in zip(student.shape[1:], teacher.shape[1:], strict=True))


def _pool(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Adaptive average pooling of (B, C, H, W) to `shape`, in float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for dim, size in enumerate(shape, 1):
        window, rest = divmod(x.shape[dim], size)
        if window > 1 and not rest:  # as a sum of slices it takes any layout as it is, and a quarter of the time
            slices = x.unflatten(dim, (size, window)).unbind(dim + 1)
            x = functools.reduce(torch.add, (part.to(dtype) for part in slices)) / window
    x = x.to(dtype)
    return x if x.shape[1:] == shape else F.adaptive_avg_pool3d(x.unsqueeze(1), shape).squeeze(1)


def spectral_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two maps' half spectra, method equation of arXiv 2412.19055.

    D = rfft2(student - teacher), orthonormal: the transform is linear, so one of the difference is enough. The loss is
    the mean of (Re D)^2 and (Im D)^2 over all 2 B C H K numbers. Because the orthonormal transform keeps energy, this
    is feature MSE with weight W / 4K plus a penalty on the means of each row's even and of its odd columns (of the
    whole row where W is odd). `closed_spectral_loss` is the same number for a fraction of the work.

    Args:
        student, teacher: maps (B, C, H, W) of any floating dtype; differing C, H, W are pooled by `align`.

    Returns:
        A float32 scalar.
    """
    student, teacher = align(student, teacher)
    spectrum = torch.fft.rfft2(student - teacher, norm="ortho")
    return torch.view_as_real(spectrum).square().mean()


def closed_spectral_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`spectral_loss` without a transform; same arguments, result and gradient, and closer to the exact value.

    The orthonormal transform keeps energy, and the half spectrum holds each mirrored pair of columns once but the
    self-mirrored columns (0, and W / 2 where W is even) whole. Let d = student - teacher, and P d its mean over the
    columns of the same parity, over all columns where W is odd. Then

        L = (|d|^2 + |P d|^2) / (4 B C H K)      dL/dd = (d + P d) / (2 B C H K)

    The maps are read where they lie, whatever their layout, and the gradient is the only further map in memory.
    """
    shape = _common_shape(student, teacher)
    # A teacher without gradient is pooled piece by piece inside; whatever needs a gradient is pooled where one is kept.
    teacher = _pool(teacher, shape) if teacher.requires_grad else teacher
    return _ClosedForm.apply(_pool(student, shape) if student.shape[1:] != shape else student, teacher)


class _ClosedForm(torch.autograd.Function):
    """Value and gradient of `closed_spectral_loss` in one go; the backward pass only scales the gradient, in place."""

    PIECES = 8  # of the batch, one at a time: temporaries are small and stay in the cache; compiled code has none

    @staticmethod
    def forward(ctx, student, teacher):
        batch, *shape = student.shape
        width = shape[-1]
        parities = 2 - width % 2
        columns = width // parities
        gradient = torch.empty_like(student, dtype=torch.promote_types(student.dtype, torch.float32))
        total = gradient.new_zeros(())
        size = batch if torch.compiler.is_compiling() else math.ceil(batch / _ClosedForm.PIECES)
        for start in range(0, batch, size):
            d = gradient[start : start + size]
            d.copy_(student[start : start + size]).sub_(_pool(teacher[start : start + size], tuple(shape)))
            # Channels last: tokens and NHWC maps lie so in memory, and sums over columns then run along channels.
            by_parity = d.permute(0, 2, 3, 1).unflatten(2, (columns, parities))
            mean = by_parity.sum(dim=2, keepdim=True) / columns
            # Not a dot product or a norm, which lose digits on a CPU.
            total += d.square().sum() + columns * mean.square().sum()
            by_parity += mean
        count = 4 * student.numel() // width * (width // 2 + 1)
        ctx.gradient, ctx.scale, ctx.dtypes = gradient, 2 / count, (student.dtype, teacher.dtype)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if ctx.gradient is None:
            raise RuntimeError("the closed form of the spectral loss can be differentiated once: its gradient is spent")
        gradient, ctx.gradient = ctx.gradient, None
        gradient *= grad_output * ctx.scale
        student_dtype, teacher_dtype = ctx.dtypes
        return gradient.to(student_dtype), -gradient.to(teacher_dtype) if ctx.needs_input_grad[1] else None


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The spatial twin of `spectral_loss`: feature MSE with the weight W / 4K that it has inside the spectral loss.

    Same arguments and result as `spectral_loss`, of which it leaves out only the penalty on means within rows.
    """
    student, teacher = align(student, teacher)
    width = student.shape[-1]
    return (student - teacher).square().mean() * (width / (4 * (width // 2 + 1)))


SPECTRAL_LOSSES = {"fft": spectral_loss, "closed": closed_spectral_loss}  # one number, by two ways
FEATURE_LOSSES = {**SPECTRAL_LOSSES, "mse": mse_loss}


def layerwise_spectrum(maps: Tensor) -> Tensor:
    """How strong each frequency along the channels is: |FFT along C| / C, averaged over images and grid.

    The order of channels means nothing to a network, so neither does a single frequency; read the level, not the shape.

    Args:
        maps: (B, C, H, W) of any floating dtype.

    Returns:
        S, float64 (C,), in the unit of the features. Bin k is k / C cycles per channel, and bins k and C - k are equal.
    """
    channels = maps.shape[1]
    half = torch.fft.rfft(_at_least_float32(maps), dim=1).abs().mean(dim=(0, 2, 3), dtype=torch.float64) / channels
    return torch.cat((half, half[1 : (channels + 1) // 2].flip(0)))


def power_spectrum(maps: Tensor) -> Tensor:
    """Power of each frequency over the grid: |FFT over H, W|^2, orthonormal, averaged over images and channels.

    Args:
        maps: (B, C, H, W) of any floating dtype.

    Returns:
        float64 (H, W), in the squared unit of the features, DC first. Its mean is the mean square of the maps.
    """
    spectrum = torch.fft.fft2(_at_least_float32(maps), norm="ortho")
    return torch.view_as_real(spectrum).square().sum(dim=-1).mean(dim=(0, 1), dtype=torch.float64)


def _at_least_float32(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def radial_average(power: Tensor) -> tuple[Tensor, Tensor]:
    """Averages a plane of frequencies over its rings.

    A ring is 1 / min(H, W) wide, the first one holds DC alone, and the last ones are the corners past 0.5.

    Args:
        power: (H, W), DC first, as `power_spectrum` gives it.

    Returns:
        Radius of each ring in cycles per token, and the mean of its bins: both float64 (R,), on the CPU.
    """
    power = power.double().cpu()
    height, width = power.shape
    y, x = (torch.fft.fftfreq(size, dtype=torch.float64) for size in (height, width))
    ring = (torch.hypot(y[:, None], x[None]) * min(height, width)).round().long().flatten()
    sums = torch.bincount(ring, weights=power.flatten())
    radius = torch.arange(len(sums), dtype=torch.float64) / min(height, width)
    return radius, sums / torch.bincount(ring)


class SpectralProfile:
    """The analysis of one block, averaged over any number of images in constant memory.

    Every image counts alike, however they come in batches.

    Args:
        seed: seeds the permutation of channels that the shuffled control uses; it is the same for all images.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.num_images, self.shape = 0, None
        self._order, self._sums = None, {}

    def add(self, maps: Tensor) -> None:
        """Takes the maps (B, C, H, W) of further images."""
        if self._order is None:
            self.shape = tuple(maps.shape[1:])
            generator = torch.Generator().manual_seed(self.seed)
            self._order = torch.randperm(self.shape[0], generator=generator).to(maps.device)
        means = {
            "spectrum": layerwise_spectrum(maps),
            "spectrum_shuffled": layerwise_spectrum(maps[:, self._order]),
            "power": power_spectrum(maps),
        }
        for name, mean in means.items():
            self._sums[name] = self._sums.get(name, 0) + len(maps) * mean
        self.num_images += len(maps)

    def result(self) -> dict[str, Tensor]:
        """Returns float64 tensors on the CPU, in the unit of the features unless said otherwise.

        intensity: mean of the layer-wise spectrum over its C bins. By Parseval at most rms / sqrt(C), and
            (sqrt(pi) / 2) of that where the bins are spread as complex Gaussians: it follows the features' norm.
        intensity_shuffled: the same after one permutation of the channels.
        intensity_corrected: intensity x sqrt(C), which may be compared across widths.
        rms: root mean square of the features.
        spectrum: (C,), see `layerwise_spectrum`.
        radial_frequency, radial_power: (R,), cycles per token and squared unit, see `radial_average`.

        Raises:
            RuntimeError: no maps were added.
        """
        if not self.num_images:
            raise RuntimeError("no maps were added")
        means = {name: total.cpu() / self.num_images for name, total in self._sums.items()}
        intensity = means["spectrum"].mean()
        frequency, power = radial_average(means["power"])
        return {
            "intensity": intensity,
            "intensity_shuffled": means["spectrum_shuffled"].mean(),
            "intensity_corrected": intensity * self.shape[0] ** 0.5,
            "rms": means["power"].mean().sqrt(),
            "spectrum": means["spectrum"],
            "radial_frequency": frequency,
            "radial_power": power,
        }


@torch.no_grad()
def intensity_curve(model: nn.Module, images: Tensor, forward=None) -> list[float]:
    """Intensity of every block of a timm model for one batch of images; its hooks are on the model only meanwhile.

    Args:
        model: the bare model, put into eval mode.
        images: (B, 3, H, W). Every map of the batch is held at once.
        forward: what runs the model on the images, where that is not the model itself.
    """
    hooks = FeatureHooks(model, range(len(describe_blocks(model))))
    try:
        model.eval()
        (forward or model)(images)
        return [layerwise_spectrum(maps).mean().item() for maps in hooks.pop()]
    finally:
        hooks.remove()
