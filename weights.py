"""Load weights into timm models: older layouts, other image sizes, other classes, self-supervised backbones."""

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal, cast

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import utils

# What files of self-supervised training hold beside the backbone (MAE, BEiT, iBOT, DINO).
PRETRAINING_ONLY = r"(decoder|mask_token|predictor|projector|projection|lm_head|head|fc|classifier)"


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a model: architecture, input size, mean, std, classifier layers."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's classifier layers; a distilled DeiT has two, a model may have none."""
    heads = model_config(model).get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, head: Literal["own", "fresh"] = "own") -> str:
    """Load a state dict in timm's layout, or an older one that timm can convert, into a model of its family.

    Position embeddings and relative position tables are resampled to the model's grid.

    Args:
        model: A timm model.
        weights: Tensors by name.
        head: "own" requires a head for the model's number of classes. "fresh", for fine-tuning, keeps the model's
            untrained head if the file has none or one for other classes, and skips what only pre-training needs.

    Returns:
        One line about what was not loaded, or an empty string.

    Raises:
        UserError: The weights do not fit.
    """
    own = model.state_dict()
    with utils.as_user_error(f"the weights do not fit {model_config(model)['architecture']}: ", Exception):
        _check_distilled(weights, own)
        # timm calls each family's converter of older layouts and other image sizes by this name.
        original = weights
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        weights = dict(convert(dict(weights), model) if convert else weights)
        # DeiT III's authors name the layer scale gamma_1; timm renames it for its own hub files only.
        renamed = {key: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key) for key in weights.keys() - own.keys()}
        weights = {renamed.get(key, key): value for key, value in weights.items()}
        _resample_position_embedding(weights, own)
        notes = _match_heads(weights, own, head_names(model), head == "fresh")
        if head == "fresh":
            notes += _leave_out(weights, own, {"mask_token"} & original.keys())
        _check_shapes(weights, own)
        result = model.load_state_dict(weights, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(f"missing {result.missing_keys[:3]}, not expected {result.unexpected_keys[:3]}")
    return "; ".join(notes)


def _check_distilled(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if only one of file and model has the distillation token of a distilled DeiT."""
    kinds = ["distilled" if "dist_token" in keys else "plain" for keys in (weights, own)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"the file is of a {kinds[0]} DeiT (dist_token), the model is {kinds[1]}: name the other model"
        )


def _resample_position_embedding(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Resample pos_embed, (1, tokens, C) or (1, H, W, C), for families whose converter does not (CaiT, VOLO, Hiera)."""
    theirs, ours = weights.get("pos_embed"), own.get("pos_embed")
    if theirs is None or ours is None or theirs.shape == ours.shape or theirs.shape[-1] != ours.shape[-1]:
        return
    old, new = (math.isqrt(math.prod(each.shape[1:-1])) for each in (theirs, ours))
    prefix, expected = (math.prod(each.shape[1:-1]) - side**2 for each, side in ((theirs, old), (ours, new)))
    if prefix != expected:
        raise ValueError(f"pos_embed of {list(theirs.shape)} cannot be resampled to {list(ours.shape)}")
    weights["pos_embed"] = resample_abs_pos_embed(
        theirs.flatten(1, -2), [new, new], [old, old], num_prefix_tokens=prefix
    ).view_as(ours)


def _match_heads(
    weights: dict[str, Tensor], own: Mapping[str, Tensor], heads: tuple[str, ...], fresh: bool
) -> list[str]:
    """Put the model's own head into `weights` if the file's does not fit.

    Returns:
        A note about it, or an empty list.

    Raises:
        ValueError: The file's head does not fit and no fresh one is allowed.
    """
    ours = next((len(own[f"{head}.weight"]) for head in heads if f"{head}.weight" in own), None)
    if ours is None:
        return []
    theirs = next((len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights), None)
    if theirs == ours or (theirs is None and not fresh):  # load_state_dict names missing tensors
        return []
    if not fresh:
        raise ValueError(f"its head has {theirs} classes, {ours} are needed")
    # Tensors of the head's modules, of MAE's norm after pooling, and of any further head for as many classes.
    roots = tuple(f"{head.partition('.')[0]}." for head in (*heads, "fc_norm"))
    for key, tensor in own.items():
        missing = key not in weights and key.startswith(roots)
        if missing or (key in weights and tensor.shape[:1] == (ours,) and weights[key].shape[:1] == (theirs,)):
            weights[key] = tensor
    found = "the file has no head" if theirs is None else f"the file's head has {theirs} classes, not {ours}"
    return [f"{found}; a fresh head is trained"]


def _leave_out(weights: dict[str, Tensor], own: Mapping[str, Tensor], converted: set[str]) -> list[str]:
    """Remove what only pre-training needs; return a note that names it and what timm removed, or an empty list."""
    pattern = PRETRAINING_ONLY if "norm.weight" in own else f"({PRETRAINING_ONLY}|norm\\.)"
    left_out = [key for key in weights.keys() - own.keys() if re.match(pattern, key)]
    for key in left_out:
        del weights[key]
    names = sorted({key.partition(".")[0] for key in left_out} | (converted - own.keys()))
    return [f"left out of the file: {', '.join(names)}"] if names else []


def _check_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    other = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    if other:
        shapes = f"{other[0]} has {list(weights[other[0]].shape)}, not {list(own[other[0]].shape)}"
        raise ValueError(f"{len(other)} tensors have other shapes ({shapes}): is it of another model or its arguments?")
