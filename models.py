"""Build timm models, describe them, and speed up the attention of frozen teachers."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.models import PretrainedCfg
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

import students  # noqa: F401 registers its models with timm
import utils
from model_names import check_name, class_names, pretrained_config, split_name  # noqa: F401 for the importers of models
from weights import head_names, load_weights, model_config


def import_models(module: str) -> None:
    """Import a module that registers models with timm, from Python's path or the current folder."""
    sys.path.append(os.getcwd())
    with utils.as_user_error(f"--import {module}: ", ImportError):
        importlib.import_module(module)


def build_model(
    name: str,
    num_classes: int | None,
    *,
    input_size: int | None = 224,
    kwargs: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    drop: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a timm model with a `pretrained_cfg`.

    Args:
        name: timm's name, with or without a pretrained tag, or one with a source (`check_name`).
        num_classes: classes of the head; 0 for no head, None for timm's default.
        input_size: side of the images in pixels, for families with a fixed input size.
        kwargs: further arguments for timm, such as {"embed_dim": 24}.
        pretrained: load timm's own weights, from its cache or the hub.
        drop: dropout probability.
        drop_path: stochastic depth probability.

    Raises:
        UserError: timm has no such model or argument, cannot load its weights, or the model returns no logits.
    """
    check_name(name)
    config = pretrained_config(name)
    options = {"drop_rate": drop, "drop_path_rate": drop_path, **(kwargs or {})}
    resample = False
    if config.get("fixed_input_size"):
        options.setdefault("img_size", input_size)
        resample = pretrained and options["img_size"] not in (None, config["input_size"][-1])
    model = _create(name, num_classes, pretrained and not resample, options)
    if resample:  # timm resamples position embeddings of pretrained weights only for some families
        del options["img_size"]
        load_weights(model, _create(name, num_classes, True, options).state_dict())
    return model


def _create(name: str, num_classes: int | None, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    source, identifier = split_name(name)
    timm_name = f"{source}:{identifier}" if source else identifier
    create = partial(timm.create_model, timm_name, pretrained=pretrained, num_classes=num_classes)
    with utils.as_user_error(f"timm cannot build {name}{' with its weights' * pretrained}: ", Exception):
        try:
            model = create(**options)
        except TypeError:  # only building shows whether a family has dropout and stochastic depth
            off = {key for key in ("drop_rate", "drop_path_rate") if not options.get(key)}
            model = create(**{key: value for key, value in options.items() if key not in off})
        if options.get("features_only") or (num_classes and _gives_map(model)):
            raise ValueError("it returns maps, but logits are needed: leave out features_only and an empty global_pool")
    if not getattr(model, "pretrained_cfg", None):  # registered by the user without a config
        layers = [(key, m.out_features) for key, m in model.named_modules() if isinstance(m, nn.Linear)]
        layers = [(key, width) for key, width in layers if num_classes in (None, width)]
        classifier, num_classes = layers[-1] if layers else (None, num_classes)
        config = PretrainedCfg(architecture=identifier, classifier=classifier, num_classes=num_classes)
        model.pretrained_cfg, model.num_classes = config.to_dict(), num_classes
    return model


def _gives_map(model: nn.Module) -> bool:
    """Return whether the model does not pool, so that it returns a map and not logits (B, classes)."""
    pools = [getattr(part, "global_pool", None) for part in (getattr(model, "head", None), model)]
    return "" in [getattr(pool, "pool_type", pool) for pool in pools]


def build_teacher(
    name: str,
    num_classes: int | None,
    *,
    input_size: int,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    head: Literal["own", "fresh"] = "own",
) -> tuple[nn.Module, int]:
    """Build a model in eval mode for images of `input_size` if its family supports that, else of its own size.

    Args:
        name: as in `build_model`, as are `num_classes` and `kwargs`.
        input_size: side of the images in pixels.
        weights: a state dict; None for timm's own weights.
        head: as in `load_weights`.

    Returns:
        The model and the side of its images. Images of another size must be resized to it.

    Raises:
        UserError: the model cannot be built for either size.
    """
    fixed_size = (kwargs or {}).get("img_size")
    own_size = pretrained_config(name).get("input_size", (3, input_size))[-1]
    errors = []
    for size in [fixed_size] if fixed_size else dict.fromkeys((input_size, own_size)):
        try:
            model = build_model(name, num_classes, input_size=size, kwargs=kwargs, pretrained=weights is None).eval()
            if weights is not None:
                load_weights(model, weights, head=head)
            with torch.no_grad(), utils.as_user_error(f"{name} cannot process images of {size} pixels: ", Exception):
                model(torch.zeros(1, 3, size, size))
            return model, size
        except utils.UserError as error:
            errors.append(error)
    raise errors[0]


def count_classes(name: str, weights: Mapping[str, Tensor], classes: Sequence[str] | None = None) -> int | None:
    """Return the number of classes of the head in a state dict for this model; 0 without a head.

    If timm does not name the head, return the number of `classes`, or None for timm's default.
    """
    names = head_names(pretrained_config(name))
    counts = [len(weights[f"{head}.weight"]) for head in names if f"{head}.weight" in weights]
    return counts[0] if counts else 0 if names else len(classes) if classes else None


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the (mean, std) of a model's input images, three floats each, for pixels in 0..1."""
    return tuple(model_config(model)["mean"]), tuple(model_config(model)["std"])


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm, which cannot be trained on a single image."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def freeze_all_but_attention(model: nn.Module) -> None:
    """Train only attention, position embedding and heads (arXiv 2203.09795); a UserError if there is no attention."""
    trained = ("pos_embed", *(f"{head}." for head in head_names(model_config(model))))
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise utils.UserError(f"--attn-only: {model_config(model)['architecture']} has no attention blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith(trained)


# Attention of frozen teachers
#
# CaiT's talking heads (arXiv 2003.02436) mix the heads of the attention maps. timm uses Linear layers on permuted
# (B, N, N, heads) copies of the maps, which take most of the block's time outside its matrix products.


class TalkingHeads(nn.Module):
    """Replace timm's TalkingHeadAttn in evaluation, with the same parameters and names, but without dropout.

    With A = q k^T, timm computes (W softmax(L scale A + l) + w) v, where L and W mix the heads. Here `scale` is folded
    into L; l cancels in the softmax, as it is the same for all keys; and w v, which is w times the sum of v over the
    keys, is added to the product. Under autocast the maps stay in half precision. The softmax computes in float32
    internally and rounds once, which equals a float32 softmax cast to half precision.

    Args:
        attention: timm's module with its final weights; its layers are shared.
        kernel: `kernels.mix_softmax_mix`, for half-precision maps on CUDA; None for PyTorch's operators.
    """

    def __init__(self, attention: TalkingHeadAttn, kernel=None):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.proj_l, self.proj_w = attention.proj_l, attention.proj_w
        self.kernel = kernel
        # Rows of L scale, W and w, in one tensor so that each forward pass casts one instead of three.
        parts = self.proj_l.weight * self.scale, self.proj_w.weight, self.proj_w.bias[None]
        self.register_buffer("mixes", torch.cat(parts).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        mixed = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
        # On a CPU, one image at a time: its maps (1.2 MB for CaiT-S24 at 224 pixels) stay in the cache.
        size = 1 if x.device.type == "cpu" else len(x)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), size):
                self._attend(qkv[start : start + size], mixed[start : start + size])
        return self.proj(mixed.flatten(2))

    def _attend(self, qkv: Tensor, out: Tensor) -> None:
        """Write the attention of qkv (B, N, 3, heads, C / heads) to `out` (B, N, heads, C / heads)."""
        images, tokens, _, heads, _ = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # one copy, or none for a single image
        maps = torch.bmm(q, k.transpose(1, 2)).view(images, heads, -1)
        mixes = self.mixes.to(v.dtype)
        if self.kernel is not None and v.is_cuda and v.dtype in (torch.float16, torch.bfloat16):
            before, after, _ = self.mixes.float().split((heads, heads, 1))
            self.kernel(maps.view(images, heads, tokens, tokens), before, after)
        else:
            # bmm with an expanded weight, because `weight @ maps` would copy the maps to fold images into rows.
            before, after, _ = mixes.expand(images, -1, -1).split((heads, heads, 1), dim=1)
            weights = torch.bmm(before, maps).view(images, heads, tokens, tokens).softmax(dim=-1)
            maps = torch.bmm(after, weights.flatten(2))
        product = torch.bmm(maps.view(-1, tokens, tokens), v).unflatten(0, (images, heads))
        bias = mixes[-1][:, None] * v.unflatten(0, (images, heads)).sum(dim=2)
        torch.add(product.transpose(1, 2), bias[:, None], out=out)


def fast_attention(model: nn.Module, attention: str = "auto") -> nn.Module:
    """Speed up the attention of a frozen timm model in place, after its weights are on the device; return the model.

    CaiT's talking heads become `TalkingHeads`. On a CPU, Swin's windows use timm's experimental fused kernel, which
    saves 10 to 25 % of the forward pass. State dicts do not change, nor do other models.

    Args:
        attention: "timm" changes nothing, "eager" uses PyTorch's operators, "triton" runs half-precision talking heads
            on CUDA in one kernel. "auto" is "eager", because the kernel has not been measured yet.

    Raises:
        UserError: the installed packages cannot run "triton".
    """
    if attention == "timm":
        return model
    kernel = None
    if attention == "triton":
        need = "--teacher-attention triton needs Triton and torch 2.6 or newer, otherwise use eager: "
        with utils.as_user_error(need, ImportError):
            from kernels import mix_softmax_mix as kernel
    for module in list(model.modules()):
        if type(getattr(module, "attn", None)) is TalkingHeadAttn:
            module.attn = TalkingHeads(module.attn, kernel)
        elif type(module) is WindowAttention and module.qkv.weight.device.type == "cpu":
            module.fused_attn = True
    return model
