"""Matrices of D columns in one part or two, each a power of two wide, as tiles of Triton must be: 96 = 64 + 32.

A matrix is a tuple of its parts: BLOCK_D columns, then REST_D, which is 0 where one part is enough. What is done to a
matrix here is done to each part, and the code of a second part that is not there vanishes at compile time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import matmul, matmul_add
from calm_fast.kernels.common.intervals import finite_or_zero, load_rows


@triton.jit
def load_parts(
    base,
    first,
    stride,
    size,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load rows first .. first + BLOCK of a matrix with contiguous rows; outside it is 0."""
    if REST_D:
        return (
            load_rows(base, first, stride, size, BLOCK_D, BLOCK, BLOCK_D, MASKED),
            load_rows(base + BLOCK_D, first, stride, size, D - BLOCK_D, BLOCK, REST_D, MASKED),
        )
    else:
        return (load_rows(base, first, stride, size, D, BLOCK, BLOCK_D, MASKED),)


@triton.jit
def load_boxes(boxes, rest, b, head, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr):
    """Load rows first .. first + BLOCK of a head through tensor descriptors; outside it is 0.

    boxes, rest: descriptors of the whole tensor as (B, heads, rows, D), for the first part and the second.
    """
    # The copy engine makes the addresses and the zeros; they take no register. The dims of size 1 lead: only then does
    # Triton fold the reshape into the load. Else the first operand of a product goes through registers.
    if REST_D:
        return (
            boxes.load([b, head, first, 0]).reshape(BLOCK, BLOCK_D),
            rest.load([b, head, first, BLOCK_D]).reshape(BLOCK, REST_D),
        )
    else:
        return (boxes.load([b, head, first, 0]).reshape(BLOCK, BLOCK_D),)


@triton.jit
def zeros(BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr):
    """Return a float32 matrix of zeros, the beginning of a sum."""
    if REST_D:
        return (tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK, REST_D), tl.float32))
    else:
        return (tl.zeros((BLOCK, BLOCK_D), tl.float32),)


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Return a @ b^T, the products of all rows of a and b, with float32 accumulation: one tile, not in parts."""
    product = matmul(a[0], tl.trans(b[0]), PRECISION, INTERPRET)
    if len(a) == 2:
        product = matmul_add(a[1], tl.trans(b[1]), product, PRECISION, INTERPRET)
    return product


@triton.jit
def add_product(acc, weights, a, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Return acc + weights @ a with float32 accumulation; weights: one tile."""
    if len(a) == 2:
        return (
            matmul_add(weights, a[0], acc[0], PRECISION, INTERPRET),
            matmul_add(weights, a[1], acc[1], PRECISION, INTERPRET),
        )
    else:
        return (matmul_add(weights, a[0], acc[0], PRECISION, INTERPRET),)


@triton.jit
def times(a, factor):
    """Return a times a scalar or a column of factors."""
    if len(a) == 2:
        return (a[0] * factor, a[1] * factor)
    else:
        return (a[0] * factor,)


@triton.jit
def over(a, divisor):
    """Return a over a column of divisors."""
    if len(a) == 2:
        return (a[0] / divisor, a[1] / divisor)
    else:
        return (a[0] / divisor,)


@triton.jit
def zero_unless(kept, a):
    """Return a with 0 in the rows where the column `kept` is false."""
    if len(a) == 2:
        return (tl.where(kept, a[0], 0.0), tl.where(kept, a[1], 0.0))
    else:
        return (tl.where(kept, a[0], 0.0),)


@triton.jit
def finite(a):
    """Return a with 0 in place of NaN and Inf."""
    if len(a) == 2:
        return (finite_or_zero(a[0]), finite_or_zero(a[1]))
    else:
        return (finite_or_zero(a[0]),)


@triton.jit
def row_sums(a):
    """Return the sum of each row."""
    total = tl.sum(a[0], 1)
    if len(a) == 2:
        total += tl.sum(a[1], 1)
    return total


@triton.jit
def excess(a, WIDEN: tl.constexpr):
    """Return a number per row: 0, or NaN where the row holds NaN or Inf. WIDEN: subtract in float32."""
    total = tl.sum(_minus_itself(a[0], WIDEN), 1)
    if len(a) == 2:
        total += tl.sum(_minus_itself(a[1], WIDEN), 1)
    return total


@triton.jit
def _minus_itself(a, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
    return (a - a).to(tl.float32)


@triton.jit
def store_rows(tile, offsets, a, inside, D: tl.constexpr):
    """Store a matrix of D columns where `inside`, its rows at these offsets from the pointer `tile`, in its dtype."""
    if len(a) == 2:
        WIDE: tl.constexpr = a[0].shape[1]
        _store_part(tile, offsets, a[0], inside, WIDE)
        _store_part(tile + WIDE, offsets, a[1], inside, D - WIDE)
    else:
        _store_part(tile, offsets, a[0], inside, D)


@triton.jit
def _store_part(tile, offsets, a, inside, D: tl.constexpr):
    cols = tl.arange(0, a.shape[1])
    mask = inside[:, None] & (cols < D)[None, :]
    tl.store(tile + (offsets[:, None] + cols[None, :]), a.to(tile.dtype.element_ty), mask=mask)
