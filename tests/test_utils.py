"""Errors and exit codes, logs, and checkpoint files that survive kills, full disks and damage."""

import contextlib
import errno
import fcntl
import hashlib
import http.server
import inspect
import json
import os
import pickle
import random
import resource
import signal
import threading
import time
from argparse import Namespace

import pytest
import timm
import torch
import torch.distributed as dist
from processes import fork

import utils

# Errors and exit codes


@pytest.fixture(autouse=True)
def no_status(monkeypatch):
    """exit_codes() writes the status of a run of this process, which another test may have begun."""
    monkeypatch.setattr(utils.run_status, "folder", None)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (utils.UserError("two\n lines"), 2, "error: two lines"),
        (utils.Diverged("loss"), 3, "error: loss"),
        (utils.Stopped(signal.SIGTERM, " in epoch 3"), 143, "stopped by SIGTERM in epoch 3"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), 2, "error: CUDA out of memory. Lower --batch-size"),
        (ZeroDivisionError("counts as the user's"), 2, "error: counts as the user's"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed"),
            2,
            "error: lost a loader worker: DataLoader worker (pid 7) is killed: give fewer",
        ),
    ],
)
def test_an_error_is_one_line_and_a_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as end, utils.exit_codes(ZeroDivisionError):
        raise error
    assert end.value.code == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(line)


def test_a_fault_of_the_program_keeps_its_traceback_and_is_noted(tmp_path):
    utils.run_status.begin(tmp_path)
    with pytest.raises(RuntimeError, match="a fault"), utils.exit_codes():
        raise RuntimeError("a fault")
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def test_a_refused_start_leaves_the_status_of_the_run_it_ran_into(tmp_path):
    (tmp_path / "status.json").write_text("theirs")
    with pytest.raises(SystemExit), utils.exit_codes():
        raise utils.UserError("in use")
    assert (tmp_path / "status.json").read_text() == "theirs"


def test_saying_into_a_closed_pipe_or_a_full_disk_does_not_end_the_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        utils.say("lost")
        with contextlib.suppress(OSError):
            full.close()


def test_a_signal_raises_at_once_before_there_are_steps_and_is_noted_between_them():
    request = utils.StopRequest()
    with pytest.raises(utils.Stopped):
        os.kill(os.getpid(), signal.SIGUSR1)
    request.between_steps()
    request.noted = 0
    assert request() == 0
    os.kill(os.getpid(), signal.SIGUSR2)
    assert request() == signal.SIGUSR2


def test_processes_agree_on_a_start_whatever_an_earlier_one_left_in_the_store():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("hello 1", "stale")
    names = []
    for _ in range(3):
        clients = [dist.TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(3)]
        found = [None] * 3

        def agree(rank, clients=clients, found=found):
            time.sleep(0.1 * (2 - rank))
            found[rank] = utils._agree_on_start(clients[rank], rank, 3)

        threads = [threading.Thread(target=agree, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1
        names.append(found[0])
    assert len(set(names)) == 3


# log.txt


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow over so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_full_disk_costs_no_line_of_the_log(tmp_path, capsys):
    log = utils.RunLog(tmp_path, {"lr": 1})
    log.epoch({"epoch": 0, "loss": 1.0})
    with largest_file((tmp_path / "log.txt").stat().st_size + 5):
        log.epoch({"epoch": 1, "loss": 1.0})
    assert epochs(tmp_path) == [0]  # nothing of the line, though five bytes of it would have gone in
    log.epoch({"epoch": 2, "loss": 1.0})
    log.close()
    assert epochs(tmp_path) == [0, 1, 2]
    assert "warning: log.txt not written; its line follows with the next: [Errno 28]" in capsys.readouterr().out


def test_events_that_cannot_be_written_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread dies of it
    log = utils.RunLog(tmp_path, {"lr": 1})
    log.epoch({"epoch": 0, "loss": 1.0})
    written = sum(path.stat().st_size for path in tmp_path.glob("events*"))
    with largest_file(written + 100):
        log.epoch({"epoch": 1, "loss": 1.0, "loss_a": 1.0, "loss_b": 1.0})
    log.epoch({"epoch": 2, "loss": 1.0})
    log.close()
    assert "warning: TensorBoard's events not written" in capsys.readouterr().out
    assert epochs(tmp_path) == [0, 1, 2]
    assert len(list(tmp_path.glob("events*"))) == 2


def test_a_resumed_log_drops_the_lines_that_come_again_and_torn_ones(tmp_path, capsys):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n{"epo')
    utils.RunLog(tmp_path, {}, start_epoch=2)
    assert epochs(tmp_path) == [0, 1]
    assert "1 epochs of log.txt come again" in capsys.readouterr().out
    assert (tmp_path / "log_previous.txt").read_text().endswith('{"epoch": 2}\n{"epo')


# Checkpoint files


def state(number, size=300):
    """A state whose tensors all hold one number, so that a mix of two states shows."""
    return {
        "model": {f"layer{i}.weight": torch.full((size, 24), float(number)) for i in range(20)},
        "optimizer": {"state": {i: {"exp_avg": torch.full((size, 24), float(number))} for i in range(20)}},
        "number": number,
        "args": {"lr": 1e-3},
    }


def equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


SAVE_FOR_EVER = """
import torch, utils
{state}
folder = utils.open_output_folder({folder!r})
number = folder.load_newest()[1]["number"] if folder.files() else 0
while True:
    number += 1
    print("saves", number, flush=True)
    folder.save(state(number), best=number % 3 == 0, milestone=number % 2)
"""


def kill_while_saving(folder, kills):
    """SIGKILLs a process that does nothing but save; returns how many kills fell into the writing of a file.

    After each kill every checkpoint must be whole, and the newest no older than before.
    """
    generator, hits, newest = random.Random(0), 0, 0
    for _ in range(kills):
        run = fork(before=SAVE_FOR_EVER.format(state=inspect.getsource(state), folder=str(folder)))
        run.says(f"saves {newest + 2}")  # starting up takes it a while
        time.sleep(generator.random() * 0.05)
        run.send(signal.SIGKILL)
        assert run.code() == -signal.SIGKILL
        hits += any(folder.glob(".*.tmp"))
        for path in folder.glob("*.pth"):
            checkpoint = utils.load_checkpoint(path)
            assert equal(checkpoint, state(checkpoint["number"]))
        found = utils.load_checkpoint(folder / "checkpoint.pth")["number"]
        assert found > newest
        newest = found
    return hits


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(tmp_path):
    assert kill_while_saving(tmp_path, 20) >= 5


@pytest.mark.sweep
def test_a_hundred_kills_leave_whole_checkpoints(tmp_path):
    hits = kill_while_saving(tmp_path, 100)
    print(f"100 kills, {hits} while a file was written: every checkpoint whole")


def flip(data, bit):
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return flipped


def load_damaged(path, data, whole):
    """Whether damage was found. Damage that was not must have changed nothing: a few bytes of a file carry nothing."""
    path.write_bytes(data)
    try:
        found = utils.load_checkpoint(path)
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


def test_a_record_that_became_a_folder_is_found(tmp_path):
    """One bit, outside of what the checksums cover, makes torch 2.14 give uninitialised memory for a tensor."""
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


def test_a_bad_tensor_is_never_written(tmp_path):
    folder = utils.CheckpointFolder(tmp_path)
    assert folder.save(state(1))
    for part in ("model", "optimizer"):
        bad = state(2)
        tensor = bad["model"]["layer3.weight"] if part == "model" else bad["optimizer"]["state"][3]["exp_avg"]
        tensor[0, 0] = torch.nan
        with pytest.raises(utils.Diverged, match=f"checkpoint {part} .*3.* is not finite: not saved"):
            folder.save(bad)
    assert utils.load_checkpoint(tmp_path / "checkpoint.pth")["number"] == 1


def test_a_failed_save_keeps_the_files_and_the_third_in_a_row_raises(tmp_path, capsys):
    folder = utils.CheckpointFolder(tmp_path)
    assert folder.save(state(1))
    assert folder.save(state(2))
    with largest_file(100_000):
        assert not folder.save(state(3))
        assert not folder.save(state(4))
    assert folder.save(state(5))  # counting begins anew
    with largest_file(100_000):
        assert not folder.save(state(6))
        assert not folder.save(state(7))
        with pytest.raises(utils.UserError, match="3 checkpoints in a row could not be written"):
            folder.save(state(8))
    numbers = [utils.load_checkpoint(tmp_path / name)["number"] for name in (folder.LATEST, folder.PREVIOUS)]
    assert numbers == [5, 2]
    assert not list(tmp_path.glob(".*.tmp"))
    assert capsys.readouterr().out.count("warning: checkpoint not written; the previous one is kept: [Errno 27]") == 5


def test_the_search_for_a_whole_checkpoint_goes_from_new_to_old(tmp_path, capsys):
    folder = utils.CheckpointFolder(tmp_path)
    for number in range(1, 5):
        folder.save(state(number), milestone=number if number < 3 else None)
        os.utime(tmp_path / "checkpoint.pth", (number, number))
    for name, expected in [("checkpoint.pth", 3), ("checkpoint_previous.pth", 2), ("checkpoint_0002.pth", 1)]:
        (tmp_path / name).unlink()  # other names of the file keep their content
        (tmp_path / name).write_bytes(b"PK damaged")
        assert folder.load_newest()[1]["number"] == expected
        assert f"{tmp_path / name} is damaged" in capsys.readouterr().out


def test_a_second_name_is_given_where_links_are_not_possible(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("content")
    utils.keep_copy(tmp_path / "a", tmp_path / "b")
    utils.keep_copy(tmp_path / "a", tmp_path / "b")  # onto itself

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    utils.keep_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "b").read_text() == (tmp_path / "c").read_text() == "content"
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_a_child_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    """As a loader worker may for a moment."""
    lock = f"import os, time, utils; lock = utils.FolderLock({str(tmp_path)!r})\n"
    child = "pid = os.fork()\nif pid: print('child', pid, flush=True)\ntime.sleep(60)"
    run = fork(before=lock + child).says("child")
    with pytest.raises(utils.UserError, match=f"is in use by pid {run.pid} on "):
        utils.FolderLock(tmp_path, wait=0)
    run.send(signal.SIGKILL)
    run.code()
    utils.FolderLock(tmp_path, wait=0)
    os.kill(int(run.text.split()[-1]), signal.SIGKILL)


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    utils.FolderLock(tmp_path)
    assert "has no locks" in capsys.readouterr().out


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
def test_a_foreign_class_is_refused_by_name_and_nothing_is_executed(write, tmp_path):
    write(Evil(tmp_path / "owned"), tmp_path / "file.pth")
    with pytest.raises(utils.UserError, match=r"file.pth asks for posix.mkdir and was refused"):
        utils.load_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "owned").exists()


def test_the_namespace_of_older_programs_is_let_through(tmp_path):
    torch.save({"model": {"module.weight": torch.ones(2)}, "args": Namespace(lr=0.1)}, tmp_path / "deit.pth")
    checkpoint = utils.load_checkpoint(tmp_path / "deit.pth")
    assert checkpoint["args"].lr == 0.1
    assert list(utils.extract_weights(checkpoint)) == ["weight"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK", b"PK\x03\x04" + b"0" * 99])
def test_what_is_no_checkpoint_is_said_to_be_none(content, tmp_path):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(utils.UserError, match=r"file.pth is damaged"):
        utils.load_checkpoint(tmp_path / "file.pth")


def test_a_file_of_something_else_than_a_dict_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(utils.UserError, match="holds a list, not a checkpoint"):
        utils.load_checkpoint(tmp_path / "list.pth")


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
    assert utils.load_checkpoint(f"{address}/{right}")["model"]["weight"] == 1
    assert utils.load_checkpoint(f"{address}/weights.pth")["model"]["weight"] == 1
    for _ in range(2):  # nor is it taken from the cache the next time
        with pytest.raises(utils.UserError, match=r"weights-0123abcd.pth has the hash [0-9a-f]{8}, not 0123abcd"):
            utils.load_checkpoint(f"{address}/{wrong}")
    with pytest.raises(utils.UserError, match=r"cannot download .*/missing.pth: .*404"):
        utils.load_checkpoint(f"{address}/missing.pth")


def test_a_download_is_not_executed_either(site, tmp_path):
    folder, address = site
    torch_file(Evil(tmp_path / "owned"), folder / "evil.pth")
    with pytest.raises(utils.UserError, match=r"asks for posix.mkdir"):
        utils.load_checkpoint(f"{address}/evil.pth")
    assert not (tmp_path / "owned").exists()
