"""The Triton kernel computes after softmax(before maps), in Triton's interpreter, and compiles for an H100."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

triton = pytest.importorskip("triton")
if not hasattr(torch.library, "triton_op"):
    pytest.skip("torch.library.triton_op needs torch 2.6", allow_module_level=True)

CASES = [(*sizes, kind) for sizes in ((1, 196, 2), (2, 50, 3)) for kind in ("float32", "float16")]
INTERPRETED = f"""
import torch, kernels
for images, tokens, heads, dtype in {CASES}:
    torch.manual_seed(0)
    maps = (3 * torch.randn(images, heads, tokens, tokens)).to(getattr(torch, dtype))
    before, after = torch.randn(2, heads, heads)
    weights = torch.einsum("gh,bhqk->bgqk", before.double(), maps.double()).softmax(-1)
    expected = torch.einsum("hg,bgqk->bhqk", after.double(), weights)
    kernels.mix_softmax_mix(maps, before, after)
    print((maps.double() - expected).abs().max().item() / expected.abs().max().item())
"""


@pytest.mark.slow
def test_kernel_matches_float64():
    command, env = [sys.executable, "-c", INTERPRETED], os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env, check=True)
    for (*_, dtype), error in zip(CASES, done.stdout.split(), strict=True):
        assert float(error) < {"float32": 2e-6, "float16": 5e-4}[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "rows"), [(196, 2), (576, 1)])
def test_kernel_compiles_for_sm_90_without_spills(tokens, rows, tmp_path, monkeypatch):
    """CaiT-S24 at 224 and 384 pixels. ptxas comes with Triton; no GPU is needed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import kernels

    pointers = {"maps": "*fp16", "before": "*fp32", "after": "*fp32"}
    sizes = {"N": tokens, "H": 8, "ROWS": rows, "COLS": triton.next_power_of_2(tokens)}
    source = triton.compiler.ASTSource(
        kernels.mix_softmax_mix_kernel,
        pointers | dict.fromkeys(sizes, "constexpr"),
        constexprs=sizes,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(3)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "--gpu-name=sm_90a", ptx, "-o", tmp_path / "kernel.cubin"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert " 0 bytes spill stores, 0 bytes spill loads" in done.stderr
