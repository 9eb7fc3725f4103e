"""Files of weights: damage is found, nothing in them is executed, and every layout loads into the model it is for."""

import copy
import functools
import hashlib
import http.server
import os
import pathlib
import pickle
import random
import re
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, VIT, assert_same_function, build, images, mae_file
from files import equal, state
from safetensors.torch import save_file
from timm.models.volo import VOLO

import models
import utils
from weights import extract_weights, head_names, load_checkpoint, load_weights

# Damage


def flip(data, bit):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return flipped


def load_damaged(path, data, whole):
    """Whether damage was found. Damage that was not must have changed nothing: a few bytes of a file carry nothing."""
    path.write_bytes(data)
    try:
        found = load_checkpoint(path)
    except utils.UserError:
        return True
    assert equal(found, whole)
    return False


def test_flipped_bits_and_truncations_are_found_before_use(tmp_path):
    """Also a bit outside of what the checksums cover, for which torch 2.14 returns uninitialized memory as a tensor."""
    path, whole, bits = tmp_path / "checkpoint.pth", state(1), random.Random(0)
    torch.save(whole, path)
    data = path.read_bytes()
    assert sum(load_damaged(path, flip(data, bits.randrange(8 * len(data))), whole) for _ in range(20)) >= 18
    assert all(load_damaged(path, data[:length], whole) for length in (0, 1, 3, len(data) // 2, len(data) - 1))
    entry = data.rindex(b"data/0") - len("checkpoint/") - 46  # a record in the list of contents
    assert data[entry : entry + 4] == b"PK\x01\x02"
    assert load_damaged(path, flip(data, 8 * (entry + 38) + 4), whole)  # marked as a folder


@pytest.mark.sweep
def test_every_flipped_bit_and_every_truncation(tmp_path):
    path, whole = tmp_path / "checkpoint.pth", {"model": {"weight": torch.arange(99.0)}, "args": {"lr": 0.1}}
    torch.save(whole, path)
    data = path.read_bytes()
    flips = sum(load_damaged(path, flip(data, bit), whole) for bit in range(8 * len(data)))
    cuts = sum(load_damaged(path, data[:length], whole) for length in range(len(data)))
    print(f"{flips} of {8 * len(data)} flips found, the others harmless; {cuts} of {len(data)} truncations found")
    assert cuts == len(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *((name, b"no checkpoint", " is not a valid checkpoint") for name in ("file.pth", "file.SAFETENSORS")),
        ("file.pth", b"PK\x03\x04" + b"0" * 99, " is not a valid checkpoint"),
        ("file.pth", [torch.zeros(1)], " contains a list, not a checkpoint"),
        *(("file.pth", {"classes": bad}, ": 'classes' must be a list of names") for bad in (5, [1, 2])),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, tmp_path / name)
    with pytest.raises(utils.UserError, match=name + message):
        load_checkpoint(tmp_path / name)


# What is read


class Evil:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_file(object, path, zipped=True):
    torch.save({"extra": object}, path, _use_new_zipfile_serialization=zipped)


def pickle_file(object, path):
    path.write_bytes(pickle.dumps(object, 4))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write", [torch_file, functools.partial(torch_file, zipped=False), pickle_file], ids=["zip", "torch", "pickle"]
)
def test_a_foreign_class_is_named_and_not_executed(write, tmp_path):
    write(Evil(tmp_path / "owned"), tmp_path / "file.pth")
    with pytest.raises(utils.UserError, match=r"file\.pth contains posix.mkdir, which is not plain data"):
        load_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "owned").exists()


NUMPY, PATH = rb"numpy\._?core\.multiarray", rb"pathlib(\._local)?\nPurePosixPath"


@pytest.mark.parametrize(
    ("value", "own", "name"),
    [
        *((value, b"", b"") for value in (np.int64(7), np.arange(3), pathlib.Path("data/imagenet"))),
        *((np.float64(0.5), NUMPY, name) for name in (b"numpy.core.multiarray", b"numpy._core.multiarray")),
        *((pathlib.PurePosixPath("a"), PATH, name) for name in (b"pathlib\nPosixPath", b"pathlib._local\nPosixPath")),
    ],
)
def test_plain_data_is_read_by_its_names_in_any_version(value, own, name, tmp_path):
    """numpy 1 and 2, and Python 3.13, name the same things differently."""
    path = tmp_path / "checkpoint.pth"
    torch_file(value, path, zipped=False)
    content, count = re.subn(own, name, path.read_bytes())
    assert count
    path.write_bytes(content)
    assert str(load_checkpoint(path)["extra"]) == str(value)


W = torch.ones(2)


@pytest.mark.parametrize(
    "checkpoint",
    [
        {"w": W},
        {"model.w": W},
        {"model": {"w": W}, "optimizer": {"state": {}}, "epoch": 3, "args": {"lr": 0.1}},
        {"model_state_dict": {"w": W}, "epoch": 3},
        {"net": {"module.w": W}, "acc": 93.0},
        {"model": {"module._orig_mod.w": W}},
        {"model": {"_orig_mod.module.w": W}},
        {"pytorch-lightning_version": "2.5.0", "state_dict": {"model.w": W, "criterion.weight": W}},
    ],
    ids=["bare", "prefix", "DeiT", "model_state_dict", "net", "DDP of compiled", "compiled DDP", "Lightning"],
)
def test_every_layout_of_a_checkpoint_is_read(checkpoint):
    weights = extract_weights(checkpoint)
    assert list(weights) == ["w"]
    assert weights["w"] is W


def test_the_moving_average_is_taken_on_request():
    one, two = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    for key in ("model_ema", "state_dict_ema"):
        assert extract_weights({"model": one, key: two}, ema=True)["w"] == 1
    with pytest.raises(utils.UserError, match="has no moving average"):
        extract_weights({"model": one, "model_ema": None}, ema=True)


@pytest.mark.parametrize("checkpoint", [{}, {"epoch": 3}, {"w": W, "epoch": 3}])
def test_a_file_without_weights_is_refused(checkpoint):
    with pytest.raises(utils.UserError, match="has no weights"):
        extract_weights(checkpoint)


# URLs


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Return a folder and the address under which a web server offers it; downloads go to an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "www").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_two_urls_never_share_a_cache_entry(site):
    folder, address = site
    urls = {name: f"{address}/{name}/model.SAFETENSORS?download=1" for name in ("a", "b")}
    for name in urls:
        (folder / name).mkdir()
        save_file({"w": torch.tensor([ord(name)])}, folder / name / "model.SAFETENSORS")
    assert [load_checkpoint(urls[name])["w"] for name in "ab"] == [ord("a"), ord("b")]
    (folder / "a" / "model.SAFETENSORS").unlink()
    assert load_checkpoint(urls["a"])["w"] == ord("a")  # from the cache


def test_a_hash_in_the_name_of_a_url_is_checked(site):
    folder, address = site
    torch.save({"w": torch.ones(1)}, folder / "plain.pth")
    data = (folder / "plain.pth").read_bytes()
    right = f"w-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    for name in (right, "w-01234567.pth"):
        (folder / name).write_bytes(data)
    assert load_checkpoint(f"{address}/{right}")["w"] == 1
    for _ in range(2):  # nor is it taken from the cache the next time
        with pytest.raises(utils.UserError, match=r"cannot download .*w-01234567.pth: .*hash"):
            load_checkpoint(f"{address}/w-01234567.pth")
    with pytest.raises(utils.UserError, match=r"^cannot download http://.*/none.pth: .*404.*$"):
        load_checkpoint(f"{address}/none.pth")


# Layouts and sizes


# Swin's stages end with the downsampling that timm's begin with, and its head is no module of its own.
SWIN = {f"layers.{i + 1}.downsample": f"layers.{i}.downsample" for i in range(3)} | {"head.fc.": "head."}
DEIT3 = {".ls1.gamma": ".gamma_1", ".ls2.gamma": ".gamma_2"}


@pytest.mark.parametrize(
    ("name", "names"), [("swin_tiny_patch4_window7_224", SWIN), ("deit3_small_patch16_224", DEIT3)]
)
def test_files_of_the_authors_load(name, names):
    source, model = build(name), build(name, seed=1)
    weights = {re.sub("|".join(names), lambda old: names[old[0]], key): w for key, w in source.state_dict().items()}
    assert weights.keys() != source.state_dict().keys()
    if name.startswith("swin"):
        weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    assert not load_weights(model, weights)
    assert_same_function(model, source)


def grow(embedding, prefix, side):
    """Position embeddings (1, N, C) on a side x side grid: bicubic for the patches, unchanged for the prefix."""
    start, grid = embedding[:, :prefix], embedding[:, prefix:]
    grid = grid.unflatten(1, (int(grid.shape[1] ** 0.5), -1)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([start, grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.mark.parametrize(
    ("name", "prefix", "stride"),
    [
        ("deit_tiny_patch16_224", 1, 16),
        ("deit_tiny_distilled_patch16_224", 2, 16),
        ("deit3_small_patch16_224", 0, 16),
        ("cait_s24_224", 0, 16),
        ("hiera_tiny_224", 0, 4),
    ],
)
@pytest.mark.parametrize(("old", "new"), [(64, 96), (96, 64)])
@torch.no_grad()
def test_position_embeddings_are_resampled(name, prefix, stride, old, new):
    source, model = build(name, input_size=old), build(name, seed=1, input_size=new)
    load_weights(model, source.state_dict())
    expected = source.state_dict() | {"pos_embed": grow(source.pos_embed, prefix, new // stride)}
    torch.testing.assert_close(model.state_dict(), expected, rtol=1e-5, atol=1e-6)
    assert model(images(new)).shape == (2, 5)


@torch.no_grad()
def test_pretrained_weights_are_resampled(tmp_path):
    source = build("cait_s24_224", input_size=224)
    torch.save(source.state_dict(), tmp_path / "hub.pth")
    kwargs = {**VIT, "pretrained_cfg_overlay": {"file": str(tmp_path / "hub.pth"), "num_classes": 5}}
    model = models.build_model("cait_s24_224", 5, input_size=64, kwargs=kwargs, pretrained=True)
    torch.testing.assert_close(model.pos_embed, grow(source.pos_embed, 0, 4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.head.weight, source.head.weight, rtol=0, atol=0)


@torch.no_grad()
def test_position_maps_of_volo_are_resampled():
    """They are (1, H, W, C)."""
    tiny = {"num_classes": 5, "embed_dims": (8, 16, 16, 16), "num_heads": (1,) * 4}
    source, model = (VOLO((1,) * 4, size, **tiny) for size in (64, 96))
    model.pretrained_cfg = {"architecture": "volo", "classifier": ("head", "aux_head")}
    load_weights(model, source.state_dict())
    expected = grow(source.pos_embed.flatten(1, 2), 0, 6).view(1, 6, 6, 16)
    torch.testing.assert_close(model.pos_embed, expected, rtol=1e-5, atol=1e-6)


# Heads


def assert_loaded(model, source, before, fresh):
    """The tensors whose names start with `fresh` are as before, all others those of the source."""
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith(fresh) else source)[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_for_other_classes_is_refused_or_fresh(name):
    """The original silently puts a fresh head into the teacher."""
    source, model = build(name, 7).state_dict(), build(name, 5, seed=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(utils.UserError, match=rf"do not fit {name}: its head has 7 classes, but 5 are needed"):
        load_weights(model, source)
    note = load_weights(model, source, head="fresh")
    assert note == "the file's head has 7 classes, not 5; a fresh head is trained"
    assert_loaded(model, source, before, tuple(f"{head}." for head in head_names(model.pretrained_cfg)))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_self_supervised_backbone_gets_a_fresh_head(pool):
    """With average pooling the norm moves behind it, so that MAE's own norm has no place in the model."""
    source = build("vit_tiny_patch16_224", global_pool="token")
    model = build("vit_tiny_patch16_224", seed=1, global_pool=pool)
    before = copy.deepcopy(model.state_dict())
    note = load_weights(model, mae_file(source), head="fresh")
    unused = "decoder_blocks, decoder_pos_embed, mask_token" + (", norm" if pool == "avg" else "")
    assert note == f"the file has no head; a fresh head is trained; left out of the file: {unused}"
    assert_loaded(model, source.state_dict(), before, ("head.", "fc_norm."))


def test_a_model_without_a_head_takes_a_file_with_one():
    source = build("vit_tiny_patch16_224")
    model = build("vit_tiny_patch16_224", 0, seed=1)
    assert load_weights(model, source.state_dict(), head="fresh") == "left out of the file: head"
    torch.testing.assert_close(model(images()), source.forward_head(source.forward_features(images()), pre_logits=True))


VIT_TINY, DISTILLED, PLAIN_DEIT = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "found", "kwargs", "head", "message"),
    [
        (PLAIN_DEIT, VIT_TINY, {"embed_dim": 48}, "own", "size mismatch for "),
        (PLAIN_DEIT, "cait_s24_224", {}, "own", ""),
        (PLAIN_DEIT, "resnet18", {}, "own", "Missing key"),
        (VIT_TINY, VIT_TINY, {"depth": 1}, "fresh", r"Missing key.* \"blocks"),
        (VIT_TINY, VIT_TINY, {"depth": 3}, "fresh", r"Unexpected key.* \"blocks"),
        (VIT_TINY, VIT_TINY, {"num_classes": 0}, "own", r"Missing key.* \"head.weight\", \"head.bias\""),
        (PLAIN_DEIT, DISTILLED, {}, "fresh", "only the file or only the model is a distilled DeiT"),
        (DISTILLED, PLAIN_DEIT, {}, "fresh", "only the file or only the model is a distilled DeiT"),
    ],
)
def test_weights_of_another_model_are_refused_in_one_line(name, found, kwargs, head, message):
    with pytest.raises(utils.UserError, match=f"^the weights do not fit {name}: .*{message}.*$"):
        load_weights(build(name), build(found, **kwargs).state_dict(), head=head)
