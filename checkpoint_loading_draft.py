"""Read checkpoints of every layout. A draft: `load_checkpoint` and `extract_weights` move into checkpoint.py."""

import argparse
import hashlib
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from timm.models import clean_state_dict
from timm.models._hub import download_cached_file
from torch import Tensor

import utils


def _named(name: str, build: Callable[..., Any]) -> Callable[..., Any]:
    """Return `build` under the full name that a pickle asks for; torch 2.4 takes names from the functions only."""

    def named(*args: Any) -> Any:
        return build(*args)

    named.__module__, _, named.__name__ = name.rpartition(".")
    named.__qualname__ = named.__name__
    return named


PLAIN: dict[str, Any] = {
    "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "pathlib.PosixPath": PurePath,
    "pathlib.PurePosixPath": PurePath,
    "pathlib.WindowsPath": PurePath,
    "_codecs.encode": str.encode,  # how pickles before protocol 3 spell bytes
}
# Plain data among the arguments of other people's checkpoints; numpy 2 and Python 3.13 renamed modules.
SAFE: list[Any] = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdSU")]
for renamed in ("", ""), (".core", "._core"), ("pathlib", "pathlib._local"):
    SAFE += [_named(name.replace(*renamed), build) for name, build in PLAIN.items()]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint or weights file, or a URL: ours, DeiT's, the original's, timm's, Lightning's, safetensors.

    Only tensors and plain types are unpickled, and the archive's checksums are verified, which torch.load does not do.
    A file of a URL is kept in torch.hub's cache; every rank must call this for a URL.

    Raises:
        UserError: The file is missing, is not a valid checkpoint, or asks for a class that is not plain data.
    """
    path = _download(str(path)) if str(path).startswith(("https://", "http://")) else Path(path)
    if not path.is_file():
        raise utils.UserError(f"{path} is not a file: name a checkpoint")
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
        refused = named[1] if named else _first_global(path)
        if refused:
            raise utils.UserError(f"{path} asks for {refused} and was refused: save tensors and plain types") from None
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise utils.UserError(f"{path} is not a valid checkpoint: {message}") from None
    if not isinstance(checkpoint, dict):
        raise utils.UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint: expected a dict")
    return checkpoint


def _download(url: str) -> Path:
    """Return the cached file of a URL; rank 0 downloads. A hash in the name (-0123abcd.) is checked."""
    name = Path(urlparse(url).path).name
    known = re.search(r"-([0-9a-f]{8,})\.", name)
    # Every repository of the Hugging Face hub names its file model.safetensors, so the name alone is not enough.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"
    with utils.main_first(), utils.as_user_error(f"cannot download {url}: ", Exception):
        path = Path(download_cached_file((url, name)))
        if known:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if not found.startswith(known[1]):
                raise ValueError(f"{path} has the hash {found[:8]}, not {known[1]}: delete it")
    return path


def _verify_archive(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # files of torch < 1.6 are no archives and carry no checksums
    with utils.as_user_error(f"{path} is not a valid checkpoint: ", Exception), zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"bad checksum in {damaged}")


def _first_global(path: Path) -> str | None:
    """Return the first class or function that a plain pickle asks for, or None; nothing is executed."""
    strings: list[str] = []
    with open(path, "rb") as file, suppress(Exception):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


def extract_weights(checkpoint: Mapping[str, Any], *, ema: bool = False) -> dict[str, Tensor]:
    """Return the model's state dict from a checkpoint, without the prefixes of DDP, torch.compile and Lightning.

    Raises:
        UserError: There are no weights, or `ema` is set and there is no moving average.
    """
    names = (
        ("model_ema", "state_dict_ema") if ema else ("model", "state_dict", "model_state_dict", "model_state", "net")
    )
    found = [checkpoint[name] for name in names if isinstance(checkpoint.get(name), Mapping)]
    if ema and not any(found):
        raise utils.UserError("the checkpoint holds no moving average: use its weights instead")
    weights = found[0] if found else checkpoint
    if not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise utils.UserError("the file holds no weights: expected a state dict, or one under 'model' or 'state_dict'")
    weights = clean_state_dict(clean_state_dict(dict(weights)))  # twice, because wrappers nest in either order
    inner = {key.removeprefix("model."): value for key, value in weights.items() if key.startswith("model.")}
    # A Lightning module holds the model beside its losses and metrics.
    return inner if inner and ("pytorch-lightning_version" in checkpoint or len(inner) == len(weights)) else weights
