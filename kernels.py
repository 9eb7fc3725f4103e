"""Triton kernel for CaiT's talking heads: it turns q k^T into the attention maps that multiply v.

This module needs Triton and torch 2.6 or newer; without them, `models.fast_attention` raises an error.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

MAX_SCORES = 4096  # heads x keys for which a program of two queries fits into the registers of sm_90


@triton.jit
def mix_softmax_mix_kernel(
    maps, before, after, N: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Replace maps (B, H, N, N) with after softmax(before maps), computed in float32 in registers.

    A program has ROWS queries of one image for all heads, so each map is read and written once.

    Args:
        maps: contiguous, any floating dtype.
        before, after: float32 (H, H) weights that mix the heads.
        COLS: power of two, at least N.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    image = tl.program_id(1).to(tl.int64)  # a batch of maps may have more than 2^31 elements
    pointers = maps + image * H * N * N + rows[:, None] * N + cols[None, :]
    scores = ()
    for h in tl.static_range(H):
        scores += (tl.load(pointers + h * N * N, inside, other=0.0).to(tl.float32),)
    weights = ()
    for g in tl.static_range(H):
        mixed = tl.load(before + g * H) * scores[0]
        for h in tl.static_range(1, H):
            mixed += tl.load(before + g * H + h) * scores[h]
        mixed = tl.where(cols[None, :] < N, mixed, float("-inf"))
        exponential = tl.exp(mixed - tl.max(mixed, 1)[:, None])
        weights += (exponential / tl.sum(exponential, 1)[:, None],)
    for h in tl.static_range(H):
        mixed = tl.load(after + h * H) * weights[0]
        for g in tl.static_range(1, H):
            mixed += tl.load(after + h * H + g) * weights[g]
        tl.store(pointers + h * N * N, mixed.to(maps.dtype.element_ty), inside)


@triton_op("spectralkd::mix_softmax_mix", mutates_args={"maps"})
def mix_softmax_mix(maps: Tensor, before: Tensor, after: Tensor) -> None:
    """Replace maps (B, H, N, N) with after softmax(before maps), in place, as an operator for torch.compile.

    Args:
        maps: float16 or bfloat16, contiguous, on CUDA.
        before, after: float32 (H, H), contiguous.
    """
    images, heads, tokens, _ = maps.shape
    cols = triton.next_power_of_2(tokens)
    rows = 2 if heads * cols <= MAX_SCORES else 1
    kernel = wrap_triton(mix_softmax_mix_kernel)[(triton.cdiv(tokens, rows), images)]
    kernel(maps, before, after, tokens, heads, rows, cols, num_warps=4)
