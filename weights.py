"""Reading files of weights that may be damaged, hostile, or on the web."""

import argparse
import contextlib
import hashlib
import pickletools
import re
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import torch

import utils
from utils import UserError, as_user_error


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint or a file of weights (ours, DeiT's, the original's, a state dict, safetensors), or a URL.

    The checksums of the archive are verified, which torch.load does not do. Only tensors and plain types are
    unpickled, and the argparse.Namespace of DeiT's files. A URL is downloaded once; a hash in its name is checked.

    Raises:
        UserError: the file is missing, damaged, or contains other classes.
    """
    if "://" in str(path):
        path = _download(str(path))
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give a checkpoint")
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        with as_user_error(f"{path} is not a valid checkpoint: ", Exception):
            return load_file(path)
    _verify_archive(path)
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = named[1] if named else _first_global(path)
        if found:
            raise UserError(f"{path} contains {found}, which is not loaded: save tensors and plain types") from None
        raise UserError(f"{path} is not a valid checkpoint: expected a file of torch.save") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} contains a {type(checkpoint).__name__}, not a checkpoint: expected a dict")
    return checkpoint


def _download(url: str) -> Path:
    """Return the cached file of a URL; the cache entry is named after the whole URL."""
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    wanted = re.search(r"-([0-9a-f]{8,})\.", name)
    with utils.rank_zero_first(), as_user_error(f"cannot download {url}: ", Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path), wanted and wanted[1], progress=False)
    return path


def _first_global(path: Path) -> str | None:
    """Return the first class or function that a pickle refers to, read without running it."""
    strings: list[str] = []
    with open(path, "rb") as file, contextlib.suppress(Exception):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                return argument.replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    return None


def _verify_archive(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return  # files of torch < 1.6 are no archives and carry no checksums
    try:
        with zipfile.ZipFile(path) as archive:
            # torch takes a record marked as a folder, by one flipped bit, for empty and returns arbitrary memory.
            folders = [record.filename for record in archive.infolist() if record.external_attr & 0x10]
            damaged = archive.testzip() or next(iter(folders), None)
    except Exception as error:  # any byte may be damaged
        raise UserError(f"{path} is not a valid checkpoint: {error}") from None
    if damaged:
        raise UserError(f"{path} is not a valid checkpoint: bad checksum in {damaged}")


def stored_args(checkpoint: dict) -> dict:
    """Return the flags of the run that wrote a checkpoint, by name; empty if it does not say."""
    args = checkpoint.get("args") or {}
    return args if isinstance(args, dict) else vars(args)


def extract_weights(checkpoint: dict, *, ema: bool = False) -> dict:
    """Return the state dict inside a checkpoint, without the key prefixes of DDP and torch.compile.

    Raises:
        UserError: there are no weights, or no EMA when `ema` asks for it.
    """
    if ema:
        names = ("model_ema", "state_dict_ema")
        if not any(checkpoint.get(name) for name in names):
            raise UserError("the checkpoint holds no EMA: evaluate its weights instead")
    else:
        names = ("model", "state_dict")
    weights = next((checkpoint[name] for name in names if isinstance(checkpoint.get(name), dict)), checkpoint)
    if not weights or not all(torch.is_tensor(value) for value in weights.values()):
        raise UserError("the file holds no weights: expected a state dict, or one under 'model'")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in weights.items()}
