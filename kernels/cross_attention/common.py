"""Device helpers that the forward, backward and decode kernels of cross_attention share."""

from __future__ import annotations

import triton
import triton.language as tl

# The running row maximum starts at a finite number: exp2(-inf - NEG_HUGE) is 0 where exp2(-inf - -inf) is NaN.
NEG_HUGE = tl.constexpr(-3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """a @ b with float32 accumulation."""
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a @ b with float32 accumulation."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(
    base,
    first,
    stride,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows first .. first + BLOCK of a matrix whose last dim is contiguous, as (BLOCK, BLOCK_D); outside is 0.

    The tile's own offsets are 32-bit (the launcher bounds the strides), the position of the tile 64-bit.
    """
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    tile = base + tl.cast(first, tl.int64) * stride
    ptrs = tile + rows[:, None] * stride + cols[None, :]
    if MASKED:
        if D == BLOCK_D:
            return tl.load(ptrs, mask=(first + rows < size)[:, None], other=0.0)
        return tl.load(ptrs, mask=(first + rows < size)[:, None] & (cols < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def load_interval(
    lo_ptr,
    hi_ptr,
    stride_lo,
    stride_hi,
    rows,
    M,
    N,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The interval of each query row, and which rows exist and see at least one key."""
    inside = rows < M
    lo = tl.zeros_like(rows)
    hi = tl.zeros_like(rows) + N
    if HAS_LO:
        lo = tl.maximum(tl.load(lo_ptr + rows.to(tl.int64) * stride_lo, mask=inside, other=0), 0)
    if HAS_HI:
        hi = tl.minimum(tl.load(hi_ptr + rows.to(tl.int64) * stride_hi, mask=inside, other=0), N)
    if CAUSAL:
        hi = tl.minimum(rows + 1 + (N - M), N)
    return lo, hi, inside & (lo < hi)


@triton.jit
def key_block_ranges(lo, hi, seen, N, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr):
    """Where a tile of query rows finds its keys: first <= full_first <= full_last <= last, multiples of BLOCK_N.

    Keys outside [first, last) are seen by no row; in [full_first, full_last) every row that sees anything sees
    every key, so nothing is masked. Rows that see nothing do not count: they are zeroed at the end. Blocks start at
    multiples of BLOCK_N, so what a row computes does not depend on the other rows of its tile.
    """
    last = tl.cdiv(tl.max(tl.where(seen, hi, 0), 0), BLOCK_N) * BLOCK_N
    full_last = tl.minimum(tl.min(tl.where(seen, hi, N), 0) // BLOCK_N * BLOCK_N, last)
    if HAS_LO:
        first = tl.min(tl.where(seen, lo, N), 0) // BLOCK_N * BLOCK_N
        full_first = tl.cdiv(tl.max(tl.where(seen, lo, 0), 0), BLOCK_N) * BLOCK_N
        first = tl.minimum(first, last)
        full_first = tl.minimum(full_first, last)
        full_last = tl.maximum(full_first, full_last)
    else:
        first = last * 0
        full_first = first
    return first, full_first, full_last, last


@triton.jit
def mask_scores(scores, lo, hi, keys, FILL: tl.constexpr, HAS_LO: tl.constexpr):
    """scores where lo <= key < hi, else FILL; lo, hi and keys are already shaped to broadcast."""
    visible = keys < hi
    if HAS_LO:
        visible = visible & (keys >= lo)
    return tl.where(visible, scores, FILL)
