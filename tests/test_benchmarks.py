"""Each benchmark runs with little work, and writes its measurements."""

import contextlib
import json
import runpy
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


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that executes a benchmark and returns what it prints and what it writes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, "--json", str(tmp_path / "figures.json"), *flags])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        return capsys.readouterr().out, json.loads((tmp_path / "figures.json").read_text())

    return run


@pytest.mark.parametrize("script", RUNS)
def test_a_benchmark_times_each_variant_in_each_round(script, run):
    printed, figures = run(script, "--device", "cpu", "--repeats", "2", *RUNS[script])
    times = leaves(figures["seconds"])
    assert len(times) >= 2
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times)
    assert "torch" in figures["machine"]["versions"]
    assert "times reference" in printed
    assert ("share of the peak" in printed) == (script == "end_to_end.py")


def test_gpu_benchmark_passes_on_a_cpu(run):
    """All checks that need no GPU pass, and every measurement is made, with tiny sizes."""
    printed, figures = run("gpu.py", "--cpu", "--minutes", "60")
    results = {name: check["result"] for name, check in figures["checks"].items()}
    assert [name for name, result in results.items() if result == "SKIP"] == ["no recompilation", "out of memory"]
    assert {"PASS", "SKIP"} == set(results.values())
    assert set(figures["measurements"]) == {"steps", "teacher", "parts", "jpeg", "jpeg decoding", "choices"}
    assert "| DeiT-Tiny under CaiT-S24, batch 2, bfloat16, synthetic input |" in printed
