"""Builds timm models, and loads weights of any of timm's families into them."""

import difflib
import math
import re
import sys

import timm
from timm.layers import resample_abs_pos_embed

import students  # noqa: F401 registers its models with timm
import utils


def check_name(name):
    """Raises a utils.UserError where timm has no model, or no weights, of this name, and names the nearest models."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise utils.UserError(f"timm has no model {name}: try {' or '.join(near) or 'one of timm.list_models()'}")
    with utils.as_user_error("", RuntimeError):
        timm.models.get_pretrained_cfg(name)  # complains of weights that it does not have


def build_model(name, num_classes, *, input_size=224, kwargs=None, pretrained=False, drop=0.0, drop_path=0.0):
    """Builds a timm model.

    Args:
        name: timm's name, with or without a tag of weights.
        num_classes: classes of the head.
        input_size: side of the images; passed on to families whose size is fixed when they are built.
        kwargs: further arguments for timm, such as {"embed_dim": 24}.
        pretrained: with timm's own weights, from its cache or downloaded.
        drop, drop_path: probabilities of dropout and stochastic depth.

    Raises:
        utils.UserError: timm has no such model or argument, or cannot get its weights.
    """
    check_name(name)
    options = {"drop_rate": drop, "drop_path_rate": drop_path, **(kwargs or {})}
    fixed_size = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    if fixed_size:
        options.setdefault("img_size", input_size)
    if (
        pretrained
        and fixed_size
        and options["img_size"] != timm.models.get_pretrained_cfg_value(name, "input_size")[-1]
    ):
        # timm itself resamples position embeddings for some families only.
        weights = _create(name, num_classes, True, {k: v for k, v in options.items() if k != "img_size"}).state_dict()
        model = _create(name, num_classes, False, options)
        load_weights(model, weights)
        return model
    return _create(name, num_classes, pretrained, options)


def _create(name, num_classes, pretrained, options):
    with utils.as_user_error(f"timm cannot build {name}: ", Exception):
        while True:
            try:
                return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
            except TypeError as error:  # a family without dropout or stochastic depth: fine where they are zero
                unknown = re.search(r"unexpected keyword argument '(drop_rate|drop_path_rate)'", str(error))
                if not unknown or options.pop(unknown[1], 1) != 0:
                    raise


def load_weights(model, weights, *, replace_head=False):
    """Loads a state dict of the model's family, in timm's layout or an older one that timm knows.

    Position embeddings and relative position tables are resampled to the model's grid.

    Args:
        model: a timm model.
        weights: tensors by name.
        replace_head: keep the model's own head where the file's is for another number of classes.

    Returns:
        The class count of a head that was not loaded, or None.

    Raises:
        utils.UserError: the weights do not fit.
    """
    own = model.state_dict()
    with utils.as_user_error(f"the weights do not fit {model.pretrained_cfg['architecture']}: ", Exception):
        # Each family of timm names the function that brings older files and other image sizes to its own layout so.
        family_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        weights = dict(family_filter(dict(weights), model) if family_filter else weights)
        # DeiT III's own name of the layer scale; its filter goes by a flag of timm's that only its hub files set.
        renamed = {key: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key) for key in weights.keys() - own.keys()}
        weights = {renamed.get(key, key): value for key, value in weights.items()}
        _resample_position_embedding(weights, own, model)
        replaced = _check_heads(weights, own, model, replace_head)
        other = [key for key in weights if key in own and weights[key].shape != own[key].shape]
        if other:
            shapes = f"{other[0]} has {list(weights[other[0]].shape)}, not {list(own[other[0]].shape)}"
            raise ValueError(
                f"{len(other)} tensors have other shapes ({shapes}): is it of another model or its arguments?"
            )
        result = model.load_state_dict(weights, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(f"missing {result.missing_keys[:3]}, not expected {result.unexpected_keys[:3]}")
    return replaced


def _resample_position_embedding(weights, own, model):
    """For families whose filter does not do it (CaiT)."""
    embedding = weights.get("pos_embed")
    if embedding is None or "pos_embed" not in own or embedding.shape[1] == own["pos_embed"].shape[1]:
        return
    prefix = embedding.shape[1] - math.isqrt(embedding.shape[1]) ** 2
    weights["pos_embed"] = resample_abs_pos_embed(
        embedding, list(model.patch_embed.grid_size), num_prefix_tokens=prefix
    )


def _check_heads(weights, own, model, replace_head):
    heads = model.pretrained_cfg["classifier"]
    replaced = None
    for head in (heads,) if isinstance(heads, str) else heads:
        found = weights.get(f"{head}.weight")
        if found is None or f"{head}.weight" not in own or len(found) == len(own[f"{head}.weight"]):
            continue
        if not replace_head:
            raise ValueError(f"its head has {len(found)} classes, {len(own[f'{head}.weight'])} are needed")
        replaced = len(found)
        weights.update({key: own[key] for key in (f"{head}.weight", f"{head}.bias")})
    return replaced


def normalization(model):
    """Return (mean, std) of the images that a model was made for, as timm knows them."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def freeze_all_but_attention(model):
    """Train attention, position embedding and heads only, as DeiT III fine-tunes (arXiv 2203.09795)."""
    heads = model.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else heads
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise utils.UserError(f"--attn-only: {model.pretrained_cfg['architecture']} has no attention blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name == "pos_embed" or name.startswith(tuple(heads))
