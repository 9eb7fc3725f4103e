"""Checkpoint files that survive kills, full disks and damage; the lock on the output folder."""

import errno
import fcntl
import inspect
import os
import random
import signal
import socket
import time

import pytest
from files import equal, state
from processes import fork

import utils
from checkpoint import CheckpointFolder, FolderLock
from weights import load_checkpoint

SAVE_FOR_EVER = """
import torch
from checkpoint import open_output_folder
{state}
folder = open_output_folder({folder!r})
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
            checkpoint = load_checkpoint(path)
            assert equal(checkpoint, state(checkpoint["number"]))
        found = CheckpointFolder(folder).load_newest()[1]["number"]
        assert found > newest
        newest = found
    return hits


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints(tmp_path):
    assert kill_while_saving(tmp_path, 20) >= 5


@pytest.mark.sweep
def test_a_hundred_kills_leave_whole_checkpoints(tmp_path):
    hits = kill_while_saving(tmp_path, 100)
    print(f"100 kills, {hits} while a file was written: every checkpoint whole")


def test_the_newest_valid_checkpoint_is_found_by_its_epoch(tmp_path, capsys):
    """Modification times are misleading: the oldest milestone has the latest one."""
    folder = CheckpointFolder(tmp_path)
    for number in range(1, 5):
        folder.save(state(number), milestone=number if number < 3 else None)
    os.utime(tmp_path / "checkpoint_0001.pth", (2**32, 2**32))
    for name, expected in [("checkpoint.pth", 3), ("checkpoint_previous.pth", 2), ("checkpoint_0002.pth", 1)]:
        (tmp_path / name).write_bytes(b"PK damaged")
        assert folder.load_newest()[1]["number"] == expected
        assert f"{tmp_path / name} is not a valid checkpoint" in capsys.readouterr().out


def test_a_failed_copy_leaves_no_file_behind(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("checkpoint.copy_file", full)
    assert not CheckpointFolder(tmp_path).save(state(1), best=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_went_back_to_a_milestone_continues_from_there(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for number in (1, 2, 3, 2):
        folder.save(state(number), milestone=number)
    assert folder.load_newest()[1]["number"] == 2


def test_a_child_that_outlives_its_process_does_not_keep_the_lock(tmp_path):
    """A loader worker may outlive its process for a moment. A refusal names only the last of two holders."""
    lock = f"import os, time; from checkpoint import FolderLock; lock = FolderLock({str(tmp_path)!r})\n"
    assert fork(before=f"{lock}os._exit(0)").code() == 0
    child = "pid = os.fork()\nif pid: print('child', pid, flush=True)\ntime.sleep(60)"
    run = fork(before=lock + child).says("child")
    with pytest.raises(utils.UserError, match=f"is in use by pid {run.pid} on {socket.gethostname()}: wait"):
        FolderLock(tmp_path, wait=0)
    run.send(signal.SIGKILL)
    run.code()
    FolderLock(tmp_path, wait=0)
    os.kill(int(run.text.split()[-1]), signal.SIGKILL)


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    FolderLock(tmp_path)
    assert "has no locks" in capsys.readouterr().out
