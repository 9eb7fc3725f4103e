"""Each benchmark runs with little work, and writes its measurements."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
SMALL = ["--batch-size", "2", "--input-size", "64", "--depth", "2", "--pairs", "2"]
RUNS = {
    "loss.py": ["--batch-size", "2"],
    "step.py": SMALL,
    "input.py": ["--batch-size", "2", "--input-size", "64", "--images", "8", "--processes", "2"],
    "end_to_end.py": [*SMALL, "--steps", "2"],
}


def leaves(tree):
    """Return the lists in nested dicts."""
    return [tree] if isinstance(tree, list) else [leaf for child in tree.values() for leaf in leaves(child)]


def run(script, folder, *flags):
    """Return what a benchmark printed and what it wrote."""
    command = [sys.executable, ROOT / "benchmarks" / script, "--json", folder / "figures.json", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize("script", RUNS)
def test_a_benchmark_times_each_variant_in_each_round(script, tmp_path):
    printed, figures = run(script, tmp_path, "--device", "cpu", "--repeats", "2", *RUNS[script])
    times = leaves(figures["seconds"])
    assert len(times) >= 2
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times)
    assert "torch" in figures["machine"]["versions"]
    assert "times reference" in printed
    assert ("share of the peak" in printed) == (script == "end_to_end.py")


@pytest.mark.sweep
def test_cost_against_work_has_a_row_per_change(tmp_path):
    sizes = ["--processes", "1", "2", "--batch-size", "2", "--input-size", "64", "32", "--pairs", "1"]
    printed, figures = run("scale.py", tmp_path, "--device", "cpu", "--repeats", "2", "--job", "--depth 2", *sizes)
    rows = figures["rows"]
    changes = [(row["processes"], row["batch-size"], row["input-size"], row["pairs"]) for row in rows]
    assert changes == [(1, 2, 64, 1), (2, 2, 64, 1), (1, 2, 32, 1)]
    assert [row["images"] for row in rows] == [2, 4, 2]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert len([line for line in printed.splitlines() if line.startswith(("| 1 | 2", "| 2 | 2"))]) == 3


def test_gpu_benchmark_passes_on_a_cpu(tmp_path):
    """All checks that need no GPU pass, and every measurement is made, with tiny sizes."""
    printed, figures = run("gpu.py", tmp_path, "--cpu", "--minutes", "60")
    results = {name: check["result"] for name, check in figures["checks"].items()}
    assert [name for name, result in results.items() if result == "SKIP"] == ["no recompilation", "out of memory"]
    assert {"PASS", "SKIP"} == set(results.values())
    assert set(figures["measurements"]) == {"steps", "teacher", "parts", "jpeg", "jpeg decoding", "choices"}
    assert "| DeiT-Tiny under CaiT-S24, batch 2, bfloat16, synthetic input |" in printed
