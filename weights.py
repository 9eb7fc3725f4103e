"""Read weights from files or URLs, which may be damaged or hostile, and load them into timm models."""

import argparse
import hashlib
import math
import pickletools
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, Literal, cast
from urllib.parse import urlparse

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from timm.models._hub import download_cached_file
from torch import Tensor, nn

import utils

# Reading


def _named(name: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """Return `build` under the name by which pickles refer to it; torch 2.4 takes names only from functions."""

    def named(*args: Any) -> Any:
        return build(*args)

    named.__module__, _, named.__name__ = name.rpartition(".")
    named.__qualname__ = named.__name__
    return named


PLAIN = {
    "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "pathlib.PosixPath": PurePath,
    "pathlib.PurePosixPath": PurePath,
    "pathlib.WindowsPath": PurePath,
    "_codecs.encode": str.encode,  # how pickles before protocol 3 store bytes
}
# Plain data in the arguments that other programs store; numpy 2 and Python 3.13 renamed modules.
SAFE = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU")]
for renamed in (".core", "._core"), ("pathlib", "pathlib._local"):
    SAFE += [_named(name.replace(*renamed), build) for name, build in PLAIN.items()]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint or weights from a file or URL, of this program, DeiT, the original, timm or Lightning.

    Only tensors and plain types are unpickled, and the archive's checksums are verified, which torch.load does not do.
    Downloads are kept in torch.hub's cache; for a URL, every rank must call this.

    Raises:
        UserError: the file is missing, is not a valid checkpoint, or asks for a class that is not plain data.
    """
    path = _download(str(path)) if str(path).startswith(("https://", "http://")) else Path(path)
    if not path.is_file():
        raise utils.UserError(f"{path} is not a file: give a checkpoint")
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        with utils.as_user_error(f"{path} is not a valid checkpoint: ", Exception):
            return load_file(path)
    _verify_archive(path)
    torch.serialization.add_safe_globals(SAFE)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = "is not a valid checkpoint: expected a file of torch.save"
        if refused := named[1] if named else _first_global(path):
            reason = f"contains {refused}, which is not plain data: save only tensors and plain types"
        raise utils.UserError(f"{path} {reason}") from None
    if not isinstance(checkpoint, dict):
        raise utils.UserError(f"{path} contains a {type(checkpoint).__name__}, not a checkpoint: expected a dict")
    classes = checkpoint.get("classes") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise utils.UserError(f"{path}: 'classes' must be a list of names: correct it or delete it")
    return checkpoint


def _download(url: str) -> Path:
    """Return the cached file of a URL, downloaded by rank 0. Check a hash in its name (-0123abcd.)."""
    name = Path(urlparse(url).path).name
    has_hash = re.search(r"-[0-9a-f]{8,}\.", name) is not None
    # The name alone is not unique: on the Hugging Face Hub, all files are called model.safetensors.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"
    with utils.rank_zero_first(), utils.as_user_error(f"cannot download {url}: ", Exception):
        return Path(download_cached_file((url, name), has_hash))


def _verify_archive(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # files of torch < 1.6 are not archives and have no checksums
    with utils.as_user_error(f"{path} is not a valid checkpoint: ", Exception), zipfile.ZipFile(path) as archive:
        # One flipped bit can mark a record as a folder; torch then returns arbitrary memory for it.
        folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
        damaged = archive.testzip() or next(iter(folders), None)
        if damaged:
            raise ValueError(f"bad checksum in {damaged}")


def _first_global(path: Path) -> str | None:
    """Return the first class or function that a plain pickle refers to, or None, without executing anything."""
    strings: list[str] = []
    with open(path, "rb") as file, suppress(Exception):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


def stored_args(checkpoint: dict) -> dict:
    """Return the flags of the run that wrote a checkpoint, by name; {} if it has none."""
    args = checkpoint.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def extract_weights(checkpoint: Mapping[str, Any], *, ema: bool = False) -> dict[str, Tensor]:
    """Return the model's state dict from a checkpoint, without the prefixes of DDP, torch.compile and Lightning.

    Raises:
        UserError: there are no weights, or `ema` is set and there is no moving average.
    """
    names = ["model_ema", "state_dict_ema"] if ema else ["model", "state_dict", "model_state_dict", "net"]
    found = [checkpoint[name] for name in names if isinstance(checkpoint.get(name), Mapping)]
    if ema and not any(found):
        raise utils.UserError("the checkpoint has no moving average: use its weights instead")
    weights = found[0] if found else checkpoint
    if not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise utils.UserError("the file has no weights: expected a state dict, or one under 'model' or 'state_dict'")
    weights = clean_state_dict(clean_state_dict(weights))  # twice, because wrappers nest in either order
    inner = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    # A Lightning module has losses and metrics next to the model.
    return inner if inner and ("pytorch-lightning_version" in checkpoint or len(inner) == len(weights)) else weights


# Loading

# What checkpoints of self-supervised training have besides the backbone (MAE, BEiT, iBOT, DINO).
PRETRAINING_ONLY = r"(decoder|mask_token|predictor|projector|projection|lm_head|head|fc|classifier)"


def model_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a model: architecture, input size, mean, std, classifier layers."""
    return cast("dict[str, Any]", model.pretrained_cfg)


def head_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a model's classifier layers; a distilled DeiT has two, a model may have none."""
    heads = config.get("classifier") or ()
    return (heads,) if isinstance(heads, str) else tuple(heads)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, head: Literal["own", "fresh"] = "own") -> str:
    """Load a state dict in timm's layout, or an older one that timm can convert, into a model of its family.

    Position embeddings and relative position tables are resampled to the model's grid.

    Args:
        model: a timm model.
        weights: tensors by name.
        head: "own" requires a head for the model's number of classes. "fresh", for fine-tuning, keeps the model's
            untrained head if the file's does not fit, and skips what only pre-training needs.

    Returns:
        One line that names what was not loaded, or an empty string.

    Raises:
        UserError: the weights do not fit.
    """
    own, config = model.state_dict(), model_config(model)
    with utils.as_user_error(f"the weights do not fit {config['architecture']}: ", Exception):
        if ("dist_token" in weights) != ("dist_token" in own):
            raise ValueError("only the file or only the model is a distilled DeiT (dist_token): choose the other model")
        # In each family's module, timm gives this name to the converter of older layouts and other image sizes.
        original = weights
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        weights = dict(convert(dict(weights), model) if convert else weights)
        # DeiT III's authors name the layer scale gamma_1; timm renames it for its own hub files only.
        renamed = {key: re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key) for key in weights.keys() - own.keys()}
        weights = {renamed.get(key, key): value for key, value in weights.items()}
        _resample_position_embedding(weights, own)
        notes = [_match_heads(weights, own, head_names(config), head == "fresh")]
        if head == "fresh":
            notes.append(_leave_out(weights, own, {"mask_token"} & original.keys()))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:  # it lists all tensors
            raise ValueError(textwrap.shorten(str(error), 300)) from error
    return "; ".join(filter(None, notes))


def _resample_position_embedding(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Resample pos_embed, (1, tokens, C) or (1, H, W, C), for families whose converter does not (CaiT, VOLO, Hiera)."""
    theirs, ours = weights.get("pos_embed"), own.get("pos_embed")
    if theirs is None or ours is None or theirs.shape == ours.shape or theirs.shape[-1] != ours.shape[-1]:
        return
    old, new = (math.isqrt(math.prod(each.shape[1:-1])) for each in (theirs, ours))
    prefix = math.prod(theirs.shape[1:-1]) - old**2
    weights["pos_embed"] = resample_abs_pos_embed(
        theirs.flatten(1, -2), [new, new], [old, old], num_prefix_tokens=prefix
    ).view_as(ours)


def _match_heads(weights: dict[str, Tensor], own: Mapping[str, Tensor], heads: tuple[str, ...], fresh: bool) -> str:
    """Put the model's own head into `weights` if the file's does not fit and `fresh` allows it; return a note of it."""
    layers = [f"{head}.weight" for head in heads]
    ours, theirs = (next((len(each[layer]) for layer in layers if layer in each), None) for each in (own, weights))
    if ours in (None, theirs) or (theirs is None and not fresh):  # load_state_dict names missing tensors
        return ""
    if not fresh:
        raise ValueError(f"its head has {theirs} classes, but {ours} are needed")
    roots = tuple(f"{head.partition('.')[0]}." for head in (*heads, "fc_norm"))  # with MAE's norm after pooling
    for key, tensor in own.items():
        if key.startswith(roots) and (key not in weights or weights[key].shape != tensor.shape):
            weights[key] = tensor
    found = "the file has no head" if theirs is None else f"the file's head has {theirs} classes, not {ours}"
    return f"{found}; a fresh head is trained"


def _leave_out(weights: dict[str, Tensor], own: Mapping[str, Tensor], converted: set[str]) -> str:
    """Remove what only pre-training needs; return a note of it and of what timm removed."""
    pattern = PRETRAINING_ONLY if "norm.weight" in own else f"({PRETRAINING_ONLY}|norm\\.)"
    left_out = [key for key in weights.keys() - own.keys() if re.match(pattern, key)]
    for key in left_out:
        del weights[key]
    names = sorted({key.partition(".")[0] for key in left_out} | (converted - own.keys()))
    return f"left out of the file: {', '.join(names)}" if names else ""
