"""Load weights into timm models: older layouts, other image sizes, other numbers of classes."""

import math
import re
import sys
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import utils


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the model's classifier layers; a distilled DeiT has two."""
    heads = model.pretrained_cfg["classifier"]
    return (heads,) if isinstance(heads, str) else tuple(heads)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, replace_head: bool = False) -> int | None:
    """Load a state dict in timm's layout, or an older one that timm can convert, into a model of its family.

    Position embeddings and relative position tables are resampled to the model's grid.

    Args:
        model: A timm model.
        weights: Tensors by name.
        replace_head: Keep the model's own head if the file's has another number of classes.

    Returns:
        The number of classes of a head that was not loaded, or None.

    Raises:
        UserError: The weights do not fit.
    """
    own = model.state_dict()
    with utils.as_user_error(f"the weights do not fit {model.pretrained_cfg['architecture']}: ", Exception):
        # timm calls each family's converter of older layouts and other image sizes by this name.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        weights = dict(convert(dict(weights), model) if convert else weights)
        # DeiT III's authors name the layer scale gamma_1; timm renames it for its own hub files only.
        renamed = {key: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key) for key in weights.keys() - own.keys()}
        weights = {renamed.get(key, key): value for key, value in weights.items()}
        _resample_position_embedding(weights, own, model)
        replaced = _match_heads(weights, own, model, replace_head)
        _check_shapes(weights, own)
        result = model.load_state_dict(weights, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(f"missing {result.missing_keys[:3]}, not expected {result.unexpected_keys[:3]}")
    return replaced


def _resample_position_embedding(weights: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module) -> None:
    """Resample the position embedding of families whose converter does not (CaiT)."""
    embedding = weights.get("pos_embed")
    if embedding is None or "pos_embed" not in own or embedding.shape[1] == own["pos_embed"].shape[1]:
        return
    prefix = embedding.shape[1] - math.isqrt(embedding.shape[1]) ** 2
    grid = list(model.patch_embed.grid_size)
    weights["pos_embed"] = resample_abs_pos_embed(embedding, grid, num_prefix_tokens=prefix)


def _match_heads(weights: dict[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, replace: bool) -> int | None:
    """Replace heads for another number of classes by the model's own, or raise a ValueError."""
    replaced = None
    for head in head_names(model):
        found, wanted = weights.get(f"{head}.weight"), own.get(f"{head}.weight")
        if found is None or wanted is None or len(found) == len(wanted):
            continue
        if not replace:
            raise ValueError(f"its head has {len(found)} classes, {len(wanted)} are needed")
        replaced = len(found)
        weights.update({key: own[key] for key in (f"{head}.weight", f"{head}.bias")})
    return replaced


def _check_shapes(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    other = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    if other:
        shapes = f"{other[0]} has {list(weights[other[0]].shape)}, not {list(own[other[0]].shape)}"
        raise ValueError(f"{len(other)} tensors have other shapes ({shapes}): is it of another model or its arguments?")
