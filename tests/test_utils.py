"""Errors, exit codes and the log of a run."""

import contextlib
import json
import os
import signal
import threading

import pytest
import torch
from files import largest_file

import faults
import utils


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
            "error: lost a data loading worker: DataLoader worker (pid 7) is killed: use fewer",
        ),
    ],
)
def test_an_error_is_one_line_and_a_code(error, code, line, capsys):
    with pytest.raises(SystemExit) as end, faults.exit_codes(ZeroDivisionError):
        raise error
    assert end.value.code == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(line)


def test_a_fault_of_the_program_keeps_its_traceback_and_is_noted(tmp_path):
    utils.run_status.begin(tmp_path)
    with pytest.raises(RuntimeError, match="a fault"), faults.exit_codes():
        raise RuntimeError("a fault")
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def test_a_signal_cannot_interrupt_the_report_of_an_error(tmp_path, monkeypatch, capsys):
    """As torchrun's does, which notices the lost rank while another one still waits to report it."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    utils.run_status.begin(tmp_path)
    faults.StopRequest()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit) as end, faults.exit_codes():
        raise RuntimeError("gloo: connection closed")
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: lost another process: gloo: connection closed\n"
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "failed"


def test_the_first_end_of_an_attempt_stays_on_record(tmp_path):
    """Rank 1 may fail before a slow rank 0 writes its first status, and both may report the end."""

    def status():
        return json.loads((tmp_path / "status.json").read_text())

    (tmp_path / "status.json").write_bytes(b"\xff")  # damaged
    utils.run_status.begin(tmp_path)
    assert status()["status"] == "running"
    for later in ("failed", "preempted", "running"):
        utils.run_status.write(later)
        assert status()["status"] == "failed"
    utils.run_status.begin(tmp_path)  # a new attempt
    assert status()["status"] == "running"


def test_a_refused_start_leaves_the_status_of_the_run_it_ran_into(tmp_path):
    (tmp_path / "status.json").write_text("theirs")
    with pytest.raises(SystemExit), faults.exit_codes():
        raise utils.UserError("in use")
    assert (tmp_path / "status.json").read_text() == "theirs"


def test_logging_to_a_full_disk_does_not_end_the_run(monkeypatch):
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        utils.log("lost")


# log.txt


def epochs(folder):
    return [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]


def test_a_log_line_lost_to_a_full_disk_is_reported_at_the_end(tmp_path, capsys):
    log = utils.RunLog(tmp_path, {"lr": 1})
    log.epoch({"epoch": 0, "loss": 1.0})
    with largest_file((tmp_path / "log.txt").stat().st_size + 5):
        log.epoch({"epoch": 1, "loss": 1.0})
    assert epochs(tmp_path) == [0]  # nothing of the line, though five bytes of it would have fitted
    assert "warning: log.txt not written" in capsys.readouterr().out
    log.epoch({"epoch": 2, "loss": 1.0})
    assert epochs(tmp_path) == [0, 2]
    log.close()
    assert log.lost == [1]


def test_events_that_cannot_be_written_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread dies of it
    log = utils.RunLog(tmp_path, {"lr": 1})
    log.epoch({"epoch": 0, "loss": 1.0})
    written = sum(path.stat().st_size for path in tmp_path.glob("events*"))
    with largest_file(written + 100):
        log.epoch({"epoch": 1, "loss": 1.0, "loss_a": 1.0, "loss_b": 1.0})
    log.epoch({"epoch": 2, "loss": 1.0})
    log.close()
    assert "warning: no more TensorBoard events are written" in capsys.readouterr().out
    assert epochs(tmp_path) == [0, 1, 2]


def test_a_resumed_log_drops_repeated_and_torn_lines(tmp_path):
    (tmp_path / "log.txt").write_bytes(b'{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n\xff\n{"epo')
    utils.RunLog(tmp_path, {}, start_epoch=2).close()
    assert epochs(tmp_path) == [0, 1]
