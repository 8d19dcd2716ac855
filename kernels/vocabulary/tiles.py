"""Device helpers that the kernels of linear_nce and linear_logprob share: tiles of logits and running sums over them.

Shape letters: T tokens, d hidden size, V vocabulary. A tile is BLOCK_T tokens x BLOCK_V vocabulary entries (columns).
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import apply_softcap, matmul_add


@triton.jit
def tile_position(T, splits, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """Return (token tile, split) of this program.

    GROUP token tiles walk through all splits side by side before the next GROUP starts, so programs that run together
    share rows of weight and hidden states in L2.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    group = tl.program_id(0) // (GROUP * splits)
    inside = tl.program_id(0) % (GROUP * splits)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    return group * GROUP + inside % size, inside // size


@triton.jit
def row_pointers(base, first, end, stride, BLOCK: tl.constexpr):
    """Return pointers to rows first .. first + BLOCK of a matrix. From `end` on they repeat the last row: no mask."""
    relative = tl.minimum(tl.arange(0, BLOCK), end - 1 - first)
    return base + tl.cast(first, tl.int64) * stride + relative * stride


@triton.jit
def load_block(rows, k, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load columns k .. k + BLOCK_D of the rows; 0 from D on."""
    cols = k + tl.arange(0, BLOCK_D)
    ptrs = rows[:, None] + cols[None, :]
    if D % BLOCK_D == 0:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def logits_tile(
    hidden,
    weight,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Return hidden rows @ weight rows^T, (BLOCK_T, BLOCK_V) float32; both arguments come from `row_pointers`."""
    acc = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        a = load_block(hidden, k, D, BLOCK_D)
        b = load_block(weight, k, D, BLOCK_D)
        acc = matmul_add(a, tl.trans(b), acc, PRECISION, INTERPRET)
    return acc


@triton.jit
def bias_and_softcap(z, bias_ptr, cols, V, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return softcap * tanh((z + bias) / softcap)."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + tl.minimum(cols, V - 1)).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = apply_softcap(z, softcap)
    return z


@triton.jit
def zero_banned(z, HAS_BIAS: tl.constexpr):
    """Return z with 0 for -inf: a bias of -inf bans a token, and its p = 0 times -inf would be NaN."""
    if HAS_BIAS:
        z = tl.where(z == float("-inf"), 0.0, z)
    return z


@triton.jit
def raise_maximum(row_max, z, inside):
    """Raise row maxima to those of a tile of logits. Returns (row_max, z - row_max, old minus new maximum).

    The maximum is that of the logits themselves, before any scale, and the differences to it are exact where they
    matter: a probability computed from maximum and sum loses nothing to the size of the logits, from their log-sum-exp,
    which is one rounded number, it would. Columns that are not `inside` become -inf, whose power is 0. row_max starts
    at NEG_HUGE, which is finite, so that inf - inf never occurs.
    """
    # masked before the maximum: masked behind it, ptxas spills the largest tiles
    z = tl.where(inside[None, :], z, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(z, 1))
    return new_max, z - new_max[:, None], row_max - new_max


@triton.jit
def finite_difference(z):
    """Return differences to a maximum with 0 for -inf (a banned token, or none): 0 times -inf would be NaN."""
    return tl.where(z == float("-inf"), 0.0, z)


@triton.jit
def load_targets(targets_ptr, rows, T, ignore_index):
    """Return the targets of a tile's rows, a mask of those that count, and True if any counts."""
    targets = tl.load(targets_ptr + rows, mask=rows < T, other=0)
    valid = (rows < T) & (targets != ignore_index)
    return targets, valid, tl.max(valid.to(tl.int32), 0) > 0


@triton.jit
def in_vocabulary(targets, valid, V):
    """Return which targets are token ids. Nothing is read for others, which no one has checked on a GPU."""
    return valid & (targets >= 0) & (targets < V)
