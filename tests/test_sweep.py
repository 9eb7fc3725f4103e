"""The sweep: one command per combination, run in turn."""

import os
import shlex
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_run
from processes import epochs, status, until

from recipes import sweep


def test_one_command_per_combination(capsys):
    more = ["--output", "o", "--processes", "2", "--", "--data-path", "my data"]
    vary = ["--vary", "w-fft=0.1,0.2", "--vary", "s-id,t-id=0:0,0 11:0 23"]
    assert sweep.main(["recipes/deit_tiny.args", *vary, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == 4
    start = ["python", "-m", "torch.distributed.run", "--nproc_per_node=2", "main.py", "@recipes/deit_tiny.args"]
    flags = ["--data-path", "my data", "--w-fft", "0.1", "--s-id", "0", "11", "--t-id", "0", "23"]
    folder = "o/deit_tiny/w-fft=0.1,s-id=0+11,t-id=0+23"
    assert shlex.split(lines[1]) == [*start, *flags, "--output_dir", folder, "--resume", "auto"]


@pytest.mark.parametrize("text", ["w-fft", "=1,2", "w-fft=", "w-fft=1:2", "s-id,t-id=0,1", "s-id,t-id=0:0:0"])
def test_a_malformed_variation_is_refused_in_one_line(text, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main(["recipe.args", "--vary", text])
    assert error.value.code == 2
    assert "expected" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_runs_follow_each_other_until_one_fails(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "tiny.args"
    recipe.write_text("\n".join(map(str, tiny_run())))
    output = ["--output", str(tmp_path), "--run"]
    assert sweep.main([str(recipe), "--vary", "seed=0,x,1", *output]) == 2
    assert (tmp_path / "tiny" / "seed=0" / "checkpoint.pth").exists()
    assert not (tmp_path / "tiny" / "seed=1").exists()
    assert "exit code 2: repeat the sweep" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_run_save_itself(number, tmp_path):
    """Ctrl-C reaches the whole group of processes, SIGTERM only the sweep."""
    (tmp_path / "tiny.args").write_text("\n".join(map(str, tiny_run("--epochs", 500))))
    command = [sys.executable, "recipes/sweep.py", str(tmp_path / "tiny.args"), "--vary", "seed=0,1", "--run"]
    pipes = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([*command, "--output", str(tmp_path)], cwd=ROOT, **pipes)
    folder = tmp_path / "tiny" / "seed=0"
    until(lambda: (folder / "log.txt").exists() and epochs(folder))
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert status(folder)["status"] == "preempted"
