"""Checkpoints of every layout are read, and anything else is refused in one line."""

import argparse
import functools
import hashlib
import http.server
import pathlib
import threading

import numpy as np
import pytest
import torch
from families import assert_same_function, build
from safetensors.torch import save_file

import models
import utils
from weights import extract_weights, load_checkpoint


def lightning(weights):
    inside = {f"model.{key}": value for key, value in weights.items()} | {"criterion.weight": torch.ones(3)}
    return {"pytorch-lightning_version": "2.5.0", "state_dict": inside}


LAYOUTS = {
    "bare": lambda weights: weights,
    "DeiT": lambda weights: {"model": weights, "optimizer": {"state": {}}, "epoch": 3, "args": {"lr": 0.1}},
    "state_dict": lambda weights: {"state_dict": weights},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "epoch": 3},
    "net": lambda weights: {"net": {f"module.{key}": value for key, value in weights.items()}, "acc": 93.0},
    "DDP of compiled": lambda weights: {"model": {f"module._orig_mod.{key}": v for key, v in weights.items()}},
    "compiled DDP": lambda weights: {"model": {f"_orig_mod.module.{key}": v for key, v in weights.items()}},
    "Lightning": lightning,
    "model. prefix": lambda weights: {f"model.{key}": value for key, value in weights.items()},
}


@pytest.mark.parametrize("layout", [*LAYOUTS, ".safetensors", ".SAFETENSORS"])
def test_every_layout_of_a_checkpoint_is_read(layout, tmp_path):
    source, model = build("deit_tiny_patch16_224"), build("deit_tiny_patch16_224", seed=1)
    path = tmp_path / f"weights{layout if layout.startswith('.') else '.pth'}"
    if layout in LAYOUTS:
        torch.save(LAYOUTS[layout](source.state_dict()), path)
    else:
        save_file(source.state_dict(), path)
    models.load_weights(model, extract_weights(load_checkpoint(path)))
    assert_same_function(model, source)


def test_the_moving_average_is_taken_on_request():
    one, two = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    for key in ("model_ema", "state_dict_ema"):
        assert extract_weights({"model": one, key: two}, ema=True)["w"] == 1
    with pytest.raises(utils.UserError, match="has no moving average"):
        extract_weights({"model": one, "model_ema": None}, ema=True)
    with pytest.raises(utils.UserError, match="has no weights"):
        extract_weights({"epoch": 3})


ARGUMENTS = {
    "Namespace": argparse.Namespace(lr=0.1),
    "numpy scalar": np.float64(0.5),
    "numpy integer": np.int64(7),
    "numpy array": np.arange(3),
    "path": pathlib.Path("data/imagenet"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_plain_data_among_the_arguments_is_read(kind, tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": {"value": ARGUMENTS[kind]}}, tmp_path / "checkpoint.pth")
    found = load_checkpoint(tmp_path / "checkpoint.pth")["args"]["value"]
    assert str(found) == str(ARGUMENTS[kind])


@pytest.mark.parametrize(
    "name",
    ["numpy.core.multiarray", "numpy._core.multiarray", "pathlib.PosixPath", "pathlib._local.PosixPath"],
)
def test_names_of_other_versions_are_read(name, tmp_path):
    """numpy 1 and 2, and Python 3.13, name the same things differently."""
    value = np.float64(0.5) if name.startswith("numpy") else pathlib.PurePosixPath("data")
    path = tmp_path / "checkpoint.pth"
    torch.save({"value": value}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    own = b"numpy._core.multiarray" if b"numpy._core" in content else b"numpy.core.multiarray"
    new = name.encode()
    if not name.startswith("numpy"):
        own, new = b"pathlib\nPurePosixPath", new.replace(b".PosixPath", b"\nPosixPath")
        own = own if own in content else b"pathlib._local\nPurePosixPath"
    assert own in content
    path.write_bytes(content.replace(own, new))
    assert str(load_checkpoint(path)["value"]) == str(value)


class Foreign:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_a_foreign_class_is_named_and_refused(zipped, tmp_path):
    torch.save({"model": Foreign()}, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(utils.UserError, match=r"contains .*Foreign, which is not plain data"):
        load_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights.SAFETENSORS"])
def test_text_is_not_a_valid_checkpoint(name, tmp_path):
    (tmp_path / name).write_text("not found")
    with pytest.raises(utils.UserError, match="is not a valid checkpoint"):
        load_checkpoint(tmp_path / name)


def test_a_flipped_bit_is_found(tmp_path):
    """torch.load does not notice it."""
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(utils.UserError, match=r"is not a valid checkpoint: bad checksum in .*data/0"):
        load_checkpoint(path)


# URLs


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return a folder and the address under which a web server offers it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_two_urls_never_share_a_cache_entry(server):
    www, address = server
    for folder in ("a", "b"):
        (www / folder).mkdir()
        save_file({"w": torch.tensor([ord(folder)])}, www / folder / "model.safetensors")
    for folder in ("a", "b", "a"):
        assert load_checkpoint(f"{address}/{folder}/model.safetensors?download=1")["w"] == ord(folder)
    (www / "a" / "model.safetensors").unlink()
    assert load_checkpoint(f"{address}/a/model.safetensors?download=1")["w"] == ord("a")  # from the cache


def test_a_hash_in_the_name_of_a_url_is_checked(server):
    www, address = server
    torch.save({"w": torch.ones(1)}, www / "plain.pth")
    right = f"w-{hashlib.sha256((www / 'plain.pth').read_bytes()).hexdigest()[:8]}.pth"
    for name in (right, "w-01234567.pth"):
        (www / name).write_bytes((www / "plain.pth").read_bytes())
    assert load_checkpoint(f"{address}/{right}")["w"] == 1
    for _ in range(2):
        with pytest.raises(utils.UserError, match=r"w-01234567.pth: .*hash"):
            load_checkpoint(f"{address}/w-01234567.pth")


def test_a_url_that_does_not_exist_is_one_line(server):
    with pytest.raises(utils.UserError, match=r"^cannot download http://.*/none.pth: .*404.*$"):
        load_checkpoint(f"{server[1]}/none.pth")
