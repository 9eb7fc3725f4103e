"""The paper: match the 2-D spectra of a student's and a teacher's feature maps, block by block.

With F_s and F_t the maps of one pair of blocks, the spectral loss is

    D = rfft2(F_s) - rfft2(F_t) = rfft2(F_s - F_t)       orthonormal, complex (B, C, H, K)
    L = sum of (Re D)^2 + (Im D)^2 over D / (2 B C H K)

and the feature loss of a model is the mean of L over its pairs. Symbols used throughout: B images, C channels, an
H x W grid of patch tokens, K = W // 2 + 1 columns of the half spectrum, N tokens (prefix tokens included).

Source: Tian, Xu, Li and Pan, "SpectralKD", arXiv 2412.19055. This file has the loss, the hooks that capture
feature maps, and the spectral analysis by which the paper chooses its blocks.
"""

import functools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Loss


def spectral_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the spectral loss of one pair of maps by its definition, with one transform since rfft2 is linear.

    An orthonormal transform preserves energy, so this is feature MSE with weight W / 4K plus a penalty on the mean of
    each row (for even W, on the means of its even and of its odd columns). `closed_spectral_loss` computes it that way.

    Args:
        student, teacher: maps (B, C, H, W) of any floating dtype; `align` pools them where their shapes differ.

    Returns:
        A float32 scalar.
    """
    student, teacher = align(student, teacher)
    spectrum = torch.fft.rfft2(student - teacher, norm="ortho")
    return torch.view_as_real(spectrum).square().mean()


def closed_spectral_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return `spectral_loss`, with the same gradient, without a transform: faster and closer to the exact value.

    The full spectrum of d = F_s - F_t has the energy |d|^2. The half spectrum holds half of it, plus half the energy of
    the self-mirrored columns 0 and (for even W) W / 2. Their part of d is P d: each row averaged over its columns, for
    even W over its even and its odd columns separately. Hence

        L = (|d|^2 + |P d|^2) / (4 B C H K)      dL/dd = (d + P d) / (2 B C H K)

    The maps may have any memory layout. The gradient is the only other tensor of their size in memory.
    """
    shape = _common_shape(student, teacher)
    # Without a gradient the teacher is pooled piece by piece inside; with one, autograd has to see the pooling.
    teacher = _pool(teacher, shape) if teacher.requires_grad else teacher
    return _ClosedForm.apply(_pool(student, shape) if student.shape[1:] != shape else student, teacher)


class _ClosedForm(torch.autograd.Function):
    """Compute value and gradient of `closed_spectral_loss` together; the backward pass scales the gradient in place."""

    @staticmethod
    def forward(ctx, student, teacher):
        batch, *shape = student.shape
        width = shape[-1]
        parities = 2 - width % 2
        columns = width // parities
        gradient = torch.empty_like(student, dtype=torch.promote_types(student.dtype, torch.float32))
        total = gradient.new_zeros(())
        # Eager CPU code takes an eighth of the batch at a time to stay in the cache. Compiled code has no temporaries,
        # and on a GPU the eightfold kernel launches would cost more than the traffic they save.
        size = batch if torch.compiler.is_compiling() or student.is_cuda else math.ceil(batch / 8)
        for d, s, t in zip(*(x.split(size) for x in (gradient, student, teacher)), strict=True):
            d.copy_(s).sub_(_pool(t, tuple(shape)))
            # Token maps and NHWC maps are channels-last in memory: sums over columns then run along channels.
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
            raise RuntimeError("closed_spectral_loss can be differentiated only once: it reuses its gradient's memory")
        gradient, ctx.gradient = ctx.gradient, None
        gradient *= grad_output * ctx.scale
        student_dtype, teacher_dtype = ctx.dtypes
        return gradient.to(student_dtype), -gradient.to(teacher_dtype) if ctx.needs_input_grad[1] else None


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the MSE baseline: `spectral_loss` without its penalty on row means, i.e. feature MSE times W / 4K."""
    student, teacher = align(student, teacher)
    width = student.shape[-1]
    return (student - teacher).square().mean() * (width / (4 * (width // 2 + 1)))


SPECTRAL_IMPLEMENTATIONS: dict[str, Callable] = {"closed": closed_spectral_loss, "fft": spectral_loss}  # same value


def align(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool two maps (B, C, H, W) to the smaller of their sizes in each dimension C, H and W.

    The result is float32 (float64 if an input is), under autocast too: cuFFT has half precision only for powers of 2.

    Raises:
        ValueError: the batch sizes differ.
    """
    shape = _common_shape(student, teacher)
    return _pool(student, shape), _pool(teacher, shape)


def _common_shape(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"the student's maps hold {student.shape[0]} images and the teacher's {teacher.shape[0]}")
    return tuple(min(s, t) for s, t in zip(student.shape[1:], teacher.shape[1:], strict=True))


def _pool(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Apply adaptive average pooling over C, H and W to a map (B, C, H, W), in float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for dim, size in enumerate(shape, 1):
        window, rest = divmod(x.shape[dim], size)
        if window > 1 and not rest:  # a sum of slices works in any memory layout, in a quarter of the time
            slices = x.unflatten(dim, (size, window)).unbind(dim + 1)
            x = functools.reduce(torch.add, (part.to(dtype) for part in slices)) / window
    x = x.to(dtype)
    return x if x.shape[1:] == shape else F.adaptive_avg_pool3d(x.unsqueeze(1), shape).squeeze(1)


# Feature maps


class FeatureHooks:
    """Capture block outputs of a timm model as maps, without changing its `forward` or its state-dict keys.

    A block id is an index into `model.feature_info`, where timm names the module of every block (ViT, DeiT, CaiT) or
    stage (Swin, convolutional networks). Create the hooks before DistributedDataParallel and torch.compile.

    Args:
        model: a timm model.
        ids: block ids, in the order in which `pop` returns their maps; repeats are allowed.

    Raises:
        ValueError: here or in the model's forward, for a block that has no map; the message says why.
    """

    def __init__(self, model: nn.Module, ids: Iterable[int] = ()):
        self.ids = list(ids)
        self._channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self._image_size: tuple[int, int] | None = None
        self._maps: dict[int, Tensor] | None = None
        self._handles: list = []
        if not self.ids:
            return
        name, blocks, modules = type(model).__name__, describe_blocks(model), dict(model.named_modules())
        modules.pop("")  # the model itself, which TResNet names as a block
        if model.training and not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
            raise ValueError(f"{name} drops tokens in training, so its blocks have no maps: set patch_drop_rate to 0")
        for i in self.ids:
            if not 0 <= i < len(blocks):
                raise ValueError(f"block id {i} is out of range: {name} has ids 0..{len(blocks) - 1}")
            if blocks[i]["module"] not in modules:
                raise ValueError(f"block {i} of {name} has no map: there is no module {blocks[i]['module']!r}")
        self._names = {i: f"block {i} ({blocks[i]['module']}) of {name}" for i in self.ids}
        self._handles.append(model.register_forward_pre_hook(self._begin))
        for i in set(self.ids):
            hook = functools.partial(self._capture, i, blocks[i])
            self._handles.append(modules[blocks[i]["module"]].register_forward_hook(hook))

    def _begin(self, model, inputs):
        self._maps, self._image_size = {}, inputs[0].shape[-2:]

    def _capture(self, i, block, module, inputs, output):
        if self._maps is None:  # the blocks run outside `forward`, e.g. in forward_intermediates
            return
        has_no_map, channels = f"{self._names[i]} has no map: it returns", block["num_chs"]
        if not torch.is_tensor(output) or output.ndim not in (3, 4):
            found = f"{output.ndim} dimensions" if torch.is_tensor(output) else f"a {type(output).__name__}"
            raise ValueError(f"{has_no_map} {found}, not (B, N, C) or (B, C, H, W)")
        if output.ndim == 3:
            height, width = (math.ceil(size / block["reduction"]) for size in self._image_size)
            prefix = output.shape[1] - height * width  # timm's num_prefix_tokens is wrong for CaiT
            if prefix < 0:
                raise ValueError(f"{has_no_map} {output.shape[1]} tokens for a {height} x {width} grid")
            output = output[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
        elif self._channels_last or output.shape[1] != channels:
            output = output.permute(0, 3, 1, 2)
        if output.shape[1] != channels:
            raise ValueError(f"{has_no_map} {output.shape[1]} channels, but its feature_info says {channels}")
        self._maps[i] = output

    def pop(self) -> list[Tensor]:
        """Return the maps of the latest forward pass and forget them: one (B, C, H, W) view per id, in order.

        Raises:
            RuntimeError: there was no forward pass since the last call.
        """
        if self.ids and self._maps is None:
            raise RuntimeError("no maps: there was no forward pass since the last pop()")
        maps, self._maps = self._maps, None
        for i in self.ids:
            if i not in maps:
                raise ValueError(f"{self._names[i]} has no map: the model's forward does not call this module")
        return [maps[i] for i in self.ids]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._maps = [], None


@torch.no_grad()
def check_raster_order(model: nn.Module, images: Tensor, ids: Iterable[int]) -> None:
    """Raise a ValueError if a block has no map, or not the map that timm's `forward_intermediates` returns for it.

    Hooks assume that patch tokens are in raster order (row by row); Hiera, for example, uses another order. `images`
    (B, 3, H, W) should be random, since equal patches hide their order. The model runs twice, in eval mode.
    """
    ids, training = sorted(set(ids)), model.training
    hooks = FeatureHooks(model.eval(), ids)
    try:
        model(images)
        maps = hooks.pop()
        if not ids or not hasattr(model, "forward_intermediates"):
            return
        # Compare with all: some timm versions also return the stem's output, which is not in feature_info.
        expected = model.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    finally:
        hooks.remove()
        model.train(training)
    for i, got in zip(ids, maps, strict=True):
        if all(got.shape != own.shape or (got - own).norm() > 0.01 * own.norm() for own in expected):
            found = "its output differs from timm's forward_intermediates (tokens not in raster order)"
            raise ValueError(f"block {i} of {type(model).__name__} has no map: {found}")


def describe_blocks(model: nn.Module) -> list[dict]:
    """Return timm's description of every block: a list of {"module": name, "num_chs": C, "reduction": stride}.

    Raises:
        ValueError: the model has no such description.
    """
    info = getattr(model, "feature_info", None)
    blocks = list(info) if isinstance(info, (list, tuple)) else list(getattr(info, "info", ()))
    if not blocks or not all("module" in block and block.get("reduction") for block in blocks):
        raise ValueError(
            f"{type(model).__name__} has no map of any block: timm gives it no feature_info that names blocks"
        )
    return blocks


# Spectral analysis


def layerwise_spectrum(maps: Tensor) -> Tensor:
    """Return |FFT along C| / C, averaged over images and grid: the magnitude of each frequency along the channels.

    `maps` is (B, C, H, W); the result is float64 (C,), in units of the features. Bin k is k / C cycles per channel;
    bins k and C - k are equal. Channels have no natural order, so the level is informative and the shape is not.
    """
    channels = maps.shape[1]
    half = torch.fft.rfft(_at_least_float32(maps), dim=1).abs().mean(dim=(0, 2, 3), dtype=torch.float64) / channels
    return torch.cat((half, half[1 : (channels + 1) // 2].flip(0)))


def power_spectrum(maps: Tensor) -> Tensor:
    """Return |FFT over H and W|^2, orthonormal, averaged over images and channels: the power of each grid frequency.

    `maps` is (B, C, H, W); the result is float64 (H, W), in squared units of the features, DC first. Its mean is the
    mean square of the maps.
    """
    spectrum = torch.fft.fft2(_at_least_float32(maps), norm="ortho")
    return torch.view_as_real(spectrum).square().sum(dim=-1).mean(dim=(0, 1), dtype=torch.float64)


def _at_least_float32(maps: Tensor) -> Tensor:
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def radial_average(power: Tensor) -> tuple[Tensor, Tensor]:
    """Average a plane of frequencies over rings 1 / min(H, W) wide: the first is DC, the last are the corners past 0.5.

    `power` is (H, W), from `power_spectrum`. Return the radius of each ring in cycles per token and the mean of its
    bins, both float64 (R,) on the CPU.
    """
    power = power.double().cpu()
    height, width = power.shape
    y, x = (torch.fft.fftfreq(size, dtype=torch.float64) for size in (height, width))
    ring = (torch.hypot(y[:, None], x[None]) * min(height, width)).round().long().flatten()
    sums = torch.bincount(ring, weights=power.flatten())
    radius = torch.arange(len(sums), dtype=torch.float64) / min(height, width)
    return radius, sums / torch.bincount(ring)


class SpectralProfile:
    """The spectral analysis of one block, averaged over any number of images in constant memory.

    `seed` seeds the channel permutation that the shuffled control applies to all images.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.num_images, self.shape = 0, None
        self._order, self._sums = None, {}

    def add(self, maps: Tensor) -> None:
        """Add the maps (B, C, H, W) of more images; every image has the same weight, in a batch of any size."""
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
        """Return float64 tensors on the CPU, in units of the features unless noted.

        intensity: mean of the layer-wise spectrum over its C bins, the paper's measure. By Parseval, at most
            rms / sqrt(C), and sqrt(pi) / 2 times that for complex Gaussian bins: it follows the norm of the features.
        intensity_shuffled: the same after one permutation of the channels.
        intensity_corrected: intensity x sqrt(C), comparable across widths.
        rms: root mean square of the features.
        spectrum: (C,), see `layerwise_spectrum`.
        radial_frequency, radial_power: (R,), in cycles per token and squared units, see `radial_average`.
        """
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
