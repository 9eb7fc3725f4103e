"""Files of weights: damage is found before use, and nothing in them is executed."""

import hashlib
import http.server
import os
import pickle
import random
import threading
from argparse import Namespace

import pytest
import timm
import torch
from files import equal, state

import utils
from weights import extract_weights, load_checkpoint


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


def test_flipped_bits_are_found_before_use(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(state(1), path)
    data, bits = path.read_bytes(), random.Random(0)
    assert sum(load_damaged(path, flip(data, bits.randrange(8 * len(data))), state(1)) for _ in range(50)) >= 45


@pytest.mark.sweep
def test_every_flipped_bit_and_every_truncation(tmp_path):
    path, whole = tmp_path / "checkpoint.pth", {"model": {"weight": torch.arange(99.0)}, "args": {"lr": 0.1}}
    torch.save(whole, path)
    data = path.read_bytes()
    flips = sum(load_damaged(path, flip(data, bit), whole) for bit in range(8 * len(data)))
    cuts = sum(load_damaged(path, data[:length], whole) for length in range(len(data)))
    print(f"{flips} of {8 * len(data)} flips found, the others harmless; {cuts} of {len(data)} truncations found")
    assert cuts == len(data)


@pytest.mark.sweep
def test_fifty_flipped_bits_of_a_whole_deit_tiny(tmp_path):
    model = timm.create_model("deit_tiny_patch16_224").state_dict()
    moments = {i: {"exp_avg": tensor, "exp_avg_sq": tensor} for i, tensor in enumerate(model.values())}
    whole, path, bits = (
        {"model": model, "model_ema": model, "optimizer": {"state": moments}},
        tmp_path / "c.pth",
        random.Random(0),
    )
    torch.save(whole, path)
    data = path.read_bytes()
    found = sum(load_damaged(path, flip(data, bits.randrange(8 * len(data))), whole) for _ in range(50))
    print(f"{found} of 50 flips found in {len(data) / 2**20:.0f} MiB, the others harmless")
    assert found == 50


def test_a_record_marked_as_a_folder_is_found(tmp_path):
    """One bit, outside of what the checksums cover, makes torch 2.14 return uninitialized memory as a tensor."""
    path, whole = tmp_path / "checkpoint.pth", {"model": {"weight": torch.arange(99.0)}}
    torch.save(whole, path)
    data = path.read_bytes()
    entry = data.rindex(b"data/0") - len("checkpoint/") - 46  # in the list of contents
    assert data[entry : entry + 4] == b"PK\x01\x02"
    assert load_damaged(path, flip(data, 8 * (entry + 38) + 4), whole)


def test_truncated_files_are_found(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(state(1), path)
    data = path.read_bytes()
    lengths = [0, 1, 2, 3, 100, len(data) // 2, *range(len(data) - 100, len(data))]
    assert all(load_damaged(path, data[:length], state(1)) for length in lengths)


# What is read


class Evil:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_file(object, path):
    torch.save({"model": {"weight": torch.zeros(1)}, "extra": object}, path)


def old_torch_file(object, path):
    torch.save({"extra": object}, path, _use_new_zipfile_serialization=False)


def plain_pickle(protocol):
    return lambda object, path: path.write_bytes(pickle.dumps(object, protocol=protocol))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "write",
    [torch_file, old_torch_file, plain_pickle(2), plain_pickle(4), plain_pickle(5)],
    ids=["torch", "old torch", "pickle 2", "pickle 4", "pickle 5"],
)
def test_a_foreign_class_is_named_and_not_executed(write, tmp_path):
    write(Evil(tmp_path / "owned"), tmp_path / "file.pth")
    with pytest.raises(utils.UserError, match=r"file.pth contains posix.mkdir, which is not plain data"):
        load_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "owned").exists()


def test_the_namespace_of_deits_files_is_loaded(tmp_path):
    torch.save({"model": {"module.weight": torch.ones(2)}, "args": Namespace(lr=0.1)}, tmp_path / "deit.pth")
    checkpoint = load_checkpoint(tmp_path / "deit.pth")
    assert checkpoint["args"].lr == 0.1
    assert list(extract_weights(checkpoint)) == ["weight"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK", b"PK\x03\x04" + b"0" * 99])
def test_what_is_not_a_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(utils.UserError, match=r"file.pth is not a valid checkpoint"):
        load_checkpoint(tmp_path / "file.pth")


def test_a_file_without_a_dict_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(utils.UserError, match="contains a list, not a checkpoint"):
        load_checkpoint(tmp_path / "list.pth")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """(a folder, the address under which this machine serves it); downloads go to an empty cache."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "site"))

        def log_message(self, *_):
            pass

    (tmp_path / "site").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_is_checked_against_the_hash_in_its_name(site):
    folder, address = site
    torch.save({"model": {"weight": torch.ones(1)}}, folder / "file.pth")
    data = (folder / "file.pth").read_bytes()
    right, wrong = f"weights-{hashlib.sha256(data).hexdigest()[:8]}.pth", "weights-0123abcd.pth"
    for name in (right, wrong, "weights.pth"):
        (folder / name).write_bytes(data)
    assert load_checkpoint(f"{address}/{right}")["model"]["weight"] == 1
    assert load_checkpoint(f"{address}/weights.pth")["model"]["weight"] == 1
    for _ in range(2):  # nor is it taken from the cache the next time
        with pytest.raises(utils.UserError, match=r"cannot download .*0123abcd.pth: invalid hash value"):
            load_checkpoint(f"{address}/{wrong}")
    with pytest.raises(utils.UserError, match=r"cannot download .*/missing.pth: .*404"):
        load_checkpoint(f"{address}/missing.pth")


def test_a_download_is_not_executed(site, tmp_path):
    folder, address = site
    torch_file(Evil(tmp_path / "owned"), folder / "evil.pth")
    with pytest.raises(utils.UserError, match=r"contains posix.mkdir"):
        load_checkpoint(f"{address}/evil.pth")
    assert not (tmp_path / "owned").exists()


def test_two_urls_with_one_file_name_are_two_files(site):
    folder, address = site
    for name, value in (("a", 1.0), ("b", 2.0)):
        (folder / name).mkdir()
        torch.save({"weight": torch.full((1,), value)}, folder / name / "model.pth")
    found = [load_checkpoint(f"{address}/{name}/model.pth")["weight"].item() for name in ("a", "b")]
    assert found == [1.0, 2.0]
