"""Build timm models and describe what training needs to know about them."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

import utils
from weights import head_names, load_weights

__all__ = ["build_model", "check_name", "freeze_all_but_attention", "load_weights", "normalization"]


def check_name(name: str) -> None:
    """Raise a UserError with the nearest names if timm has no model, or no pretrained tag, of this name."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise utils.UserError(f"timm has no model {name}: try {' or '.join(near) or 'one of timm.list_models()'}")
    with utils.as_user_error("", RuntimeError):
        timm.models.get_pretrained_cfg(name)


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
    """Build a timm model.

    Args:
        name: timm's name, with or without a pretrained tag.
        num_classes: Classes of the head; None for timm's default.
        input_size: Side of the images in pixels, passed on to families whose input size is fixed.
        kwargs: Further arguments for timm, such as {"embed_dim": 24}.
        pretrained: Load timm's own weights, from its cache or downloaded.
        drop: Dropout probability.
        drop_path: Stochastic depth probability.

    Raises:
        UserError: timm has no such model or argument, or cannot get its weights.
    """
    check_name(name)
    options = {"drop_rate": drop, "drop_path_rate": drop_path, **(kwargs or {})}
    if not timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        return _create(name, num_classes, pretrained, options)
    options.setdefault("img_size", input_size)
    own_size = timm.models.get_pretrained_cfg_value(name, "input_size")[-1]
    if not pretrained or options["img_size"] == own_size:
        return _create(name, num_classes, pretrained, options)
    # timm resamples the position embeddings of pretrained weights for some families only.
    model = _create(name, num_classes, False, options)
    del options["img_size"]
    load_weights(model, _create(name, num_classes, True, options).state_dict())
    return model


def _create(name: str, num_classes: int | None, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    options = dict(options)
    with utils.as_user_error(f"timm cannot build {name}: ", Exception):
        while True:
            try:
                return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
            except TypeError as error:  # a family without dropout or stochastic depth can be built if they are zero
                unknown = re.search(r"unexpected keyword argument '(drop_rate|drop_path_rate)'", str(error))
                if not unknown or options.pop(unknown[1], 1) != 0:
                    raise


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of the model's input images, three floats each, on the scale 0..1."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def freeze_all_but_attention(model: nn.Module) -> None:
    """Train attention, position embedding and heads only, DeiT III's fine-tuning (arXiv 2203.09795).

    Raises:
        UserError: the model has no attention blocks.
    """
    trained = ("pos_embed", *(f"{head}." for head in head_names(model)))
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise utils.UserError(f"--attn-only: {model.pretrained_cfg['architecture']} has no attention blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith(trained)
