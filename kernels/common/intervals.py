"""Device helpers of attention over intervals: rows of a tile, the keys that a tile sees, masking, and
what keeps NaN and Inf of hidden keys out of masked products."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Load rows first .. first + BLOCK of a matrix with contiguous rows, as (BLOCK, BLOCK_D); outside it is 0.

    Offsets inside the tile are 32-bit (the launcher bounds the strides), the position of the tile is 64-bit.
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
    """Load the interval of each query row. Returns lo, hi, seen; seen: the row exists and sees at least one key."""
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
    """Return the keys of a tile of query rows: first <= full_first <= full_last <= last, multiples of BLOCK_N.

    No row sees keys outside [first, last). In [full_first, full_last) every row that sees anything sees every key, so
    nothing is masked. Rows that see nothing do not count: they are zeroed at the end. Blocks start at multiples of
    BLOCK_N, so a row's result does not depend on the other rows of its tile.
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
def sees(lo, hi, keys, HAS_LO: tl.constexpr):
    """Return whether lo <= key < hi. lo, hi and keys are shaped to broadcast."""
    visible = keys < hi
    if HAS_LO:
        visible = visible & (keys >= lo)
    return visible


@triton.jit
def is_finite(x):
    """Return whether the elements of x are neither NaN nor infinite."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def finite_or_zero(x):
    """Return x with 0 in place of NaN and Inf: an operand of a masked product, where 0 * NaN would be NaN."""
    return tl.where(is_finite(x), x, 0.0).to(x.dtype)
