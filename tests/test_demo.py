"""The demo, at a size of seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def run_demo(*flags):
    python = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{python}:{os.environ['PATH']}"}
    command = [str(ROOT / "demo.sh"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_a_figure(tmp_path):
    done = run_demo(tmp_path, "--images", 100, 48, "--epochs", 2, 1)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("run 1 of 5, teacher: epoch 2 of 2, accuracy ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    column = rows[0].index("method")
    methods = ["no teacher", "no teacher", "soft KD", "MSE baseline (4 pairs)", "SpectralKD (4 pairs)"]
    assert [row[column] for row in rows[2:]] == methods
    assert (tmp_path / "analysis" / "intensity.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_demo_reports_the_run_that_failed(tmp_path):
    done = run_demo(tmp_path, "--images", 0, 48)
    assert done.returncode == 1
    assert "teacher/console.txt, exit code 2: error: argument --gratings-sizes" in done.stderr
