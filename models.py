"""Build timm models and describe what training needs to know about them."""

from collections.abc import Mapping
from typing import Any, Literal

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

import utils
from model_names import check_name, class_names, pretrained_config, split_name
from weights import head_names, load_weights, model_config

__all__ = [
    "build_model",
    "build_teacher",
    "check_name",
    "class_names",
    "freeze_all_but_attention",
    "has_batch_norm",
    "load_weights",
    "normalization",
]


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
        num_classes: Classes of the head; 0 for no head, None for timm's default.
        input_size: Side of the images in pixels, passed on to families whose input size is fixed.
        kwargs: Further arguments for timm, such as {"embed_dim": 24}.
        pretrained: Load timm's own weights, from its cache or downloaded.
        drop: Dropout probability.
        drop_path: Stochastic depth probability.

    Raises:
        UserError: timm has no such model or argument, cannot get its weights, or the model gives no logits.
    """
    check_name(name)
    config = pretrained_config(name)
    options = {"drop_rate": drop, "drop_path_rate": drop_path, **(kwargs or {})}
    if not config.get("fixed_input_size"):
        return _create(name, num_classes, pretrained, options)
    options.setdefault("img_size", input_size)
    if not pretrained or options["img_size"] in (None, config["input_size"][-1]):
        return _create(name, num_classes, pretrained, options)
    # timm resamples the position embeddings of pretrained weights for some families only.
    model = _create(name, num_classes, False, options)
    del options["img_size"]
    load_weights(model, _create(name, num_classes, True, options).state_dict())
    return model


def _create(name: str, num_classes: int | None, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    source, identifier = split_name(name)
    timm_name = f"{source}:{identifier}" if source else identifier
    options = dict(options)
    with utils.as_user_error(f"timm cannot build {name}: ", Exception):
        if options.get("features_only"):
            raise ValueError("features_only gives feature maps, but logits are needed: leave it out")
        while True:
            try:
                model = timm.create_model(timm_name, pretrained=pretrained, num_classes=num_classes, **options)
                break
            except TypeError as error:  # only building shows that a family has no dropout or no stochastic depth
                unknown = [
                    key for key in ("drop_rate", "drop_path_rate") if key in str(error) and options.get(key) == 0
                ]
                if not unknown:
                    raise
                for key in unknown:
                    del options[key]
        if num_classes and _gives_map(model):
            raise ValueError("without global_pool it gives a map, but logits are needed: name a pooling, such as avg")
    if not getattr(model, "pretrained_cfg", None):  # registered by the user, as timm.models.register_model allows
        layers = [key for key, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
        classifier = layers[-1] if layers else None
        model.pretrained_cfg = PretrainedCfg(architecture=identifier, classifier=classifier).to_dict()
    return model


def _gives_map(model: nn.Module) -> bool:
    """Return whether the model does not pool, so that its output is a map and not logits (B, classes)."""
    pools = [getattr(part, "global_pool", None) for part in (getattr(model, "head", None), model)]
    return "" in [getattr(pool, "pool_type", pool) for pool in pools]


def build_teacher(
    name: str,
    num_classes: int,
    *,
    input_size: int,
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    head: Literal["own", "fresh"] = "own",
) -> tuple[nn.Module, int]:
    """Build a model in eval mode for images of a size if its family allows, else for images of its own size.

    Args:
        name: As in `build_model`, as are `num_classes` and `kwargs`.
        input_size: Side of the images in pixels.
        weights: A state dict; None for timm's own weights.
        head: As in `load_weights`.

    Returns:
        The model and the side of the images that it takes. Images of another size must be resized to it.

    Raises:
        UserError: The model cannot be built for either size.
    """
    fixed_size = (kwargs or {}).get("img_size")
    own_size = pretrained_config(name).get("input_size", (3, input_size))[-1]
    errors = []
    for size in [fixed_size] if fixed_size else dict.fromkeys((input_size, own_size)):
        try:
            model = build_model(name, num_classes, input_size=size, kwargs=kwargs, pretrained=weights is None).eval()
            if weights is not None:
                load_weights(model, weights, head=head)
            with torch.no_grad(), utils.as_user_error(f"{name} takes no images of {size} pixels: ", Exception):
                model(torch.zeros(1, 3, size, size))
            return model, size
        except utils.UserError as error:
            errors.append(error)
    raise errors[0]


def normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of the model's input images, three floats each, on the scale 0..1."""
    return tuple(model_config(model)["mean"]), tuple(model_config(model)["std"])


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model normalizes over the batch, which cannot be trained with one image."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def freeze_all_but_attention(model: nn.Module) -> None:
    """Train attention, position embedding and heads only, DeiT III's fine-tuning (arXiv 2203.09795).

    Raises:
        UserError: The model has no attention blocks.
    """
    trained = ("pos_embed", *(f"{head}." for head in head_names(model)))
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise utils.UserError(f"--attn-only: {model_config(model)['architecture']} has no attention blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name.startswith(trained)
