"""Device helpers of the dual_lora gate, and loads of a tile.

R = R_pos + R_neg columns, positive first; zg (T, 2R) = [z, g]. Derivation: docs/ops/dual_lora.md.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, rows, stride, inside, cols, last_col):
    """Load elements (rows, cols) of a matrix with unit column stride; 0 outside `inside` rows and from last_col on."""
    return tl.load(
        base + rows[:, None] * stride + cols[None, :], mask=inside[:, None] & (cols < last_col)[None, :], other=0.0
    )


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), without overflow for any x."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def gate_logit(zg_base, rows, stride, inside, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return z . g, (rows,) float32; p_neg is its sigmoid."""
    logit = tl.zeros_like(rows).to(tl.float32)
    for first in tl.range(0, R, BLOCK_R):
        cols = first + tl.arange(0, BLOCK_R)
        z = load_tile(zg_base, rows, stride, inside, cols, R).to(tl.float32)
        g = load_tile(zg_base + R, rows, stride, inside, cols, R).to(tl.float32)
        logit += tl.sum(z * g, 1)
    return logit


@triton.jit
def negative_weight(logit):
    """Return the weight of the negative part, a_neg = p_neg - 1/2 = tanh(logit / 2) / 2; a_pos is 1 - a_neg.

    The subtraction would lose the bits of a small logit, so there it is the Taylor series. For |logit| < 1/2 the next
    term, 691 / 319334400 logit^11, is below the rounding of the sum.
    """
    square = logit * logit
    series = 0.25 + square * (-1.0 / 48 + square * (1.0 / 480 + square * (-17.0 / 80640 + square * (31.0 / 1451520))))
    small = tl.exp(-tl.abs(logit))
    weight = 0.5 * (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(logit) < 0.5, logit * series, tl.where(logit < 0.0, -weight, weight))


@triton.jit
def column_weights(a_neg, cols, R_POS: tl.constexpr):
    """Return the gate's weight of each column of z, (rows, cols): a_pos for cols < R_POS, else a_neg."""
    positive = (cols < R_POS)[None, :]
    return tl.where(positive, 1.0 - a_neg[:, None], a_neg[:, None])
