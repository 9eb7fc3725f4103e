"""Each benchmark runs as its text says, with small work, and writes what it measured."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

SMALL = ["--batch-size", "2", "--input-size", "64"]
RUNS = {
    "loss.py": ["--batch-size", "2"],
    "step.py": SMALL,
    "input.py": [*SMALL, "--images", "8", "--processes", "2"],
    "end_to_end.py": [*SMALL, "--steps", "2"],
    "scale.py": ["--processes", "1", "2", "--batch-size", "2", "--input-size", "64", "32", "--pairs", "1"],
}


def leaves(tree):
    """The lists in nested dicts."""
    return [tree] if isinstance(tree, list) else [leaf for child in tree.values() for leaf in leaves(child)]


def run(script, folder, *flags):
    """(what it printed, what it wrote)."""
    file = folder / "figures.json"
    command = [
        sys.executable,
        ROOT / "benchmarks" / script,
        "--device",
        "cpu",
        "--repeats",
        "2",
        "--json",
        file,
        *flags,
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.parametrize("script", ["loss.py", "step.py", "input.py", "end_to_end.py"])
def test_a_benchmark_times_every_variant_in_every_round(script, tmp_path):
    printed, figures = run(script, tmp_path, *RUNS[script])
    times = leaves(figures["seconds"])
    assert len(times) >= 2
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times)
    assert "torch" in figures["machine"]["versions"]
    assert "times plain" in printed
    assert "versions: Python" in printed


def test_cost_against_work_has_a_row_for_each_change(tmp_path):
    printed, figures = run("scale.py", tmp_path, *RUNS["scale.py"])
    rows = figures["rows"]
    assert [(row["processes"], row["batch-size"], row["input-size"], row["pairs"]) for row in rows] == [
        (1, 2, 64, 1),
        (2, 2, 64, 1),
        (1, 2, 32, 1),
    ]
    assert [row["images"] for row in rows] == [2, 4, 2]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert len([line for line in printed.splitlines() if line.startswith(("| 1 | 2", "| 2 | 2"))]) == 3
