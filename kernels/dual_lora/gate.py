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
def gate_probability(zg_base, rows, stride, inside, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return p_neg = sigmoid(z . g), (rows,) float32."""
    logit = tl.zeros_like(rows).to(tl.float32)
    for first in tl.range(0, R, BLOCK_R):
        cols = first + tl.arange(0, BLOCK_R)
        z = load_tile(zg_base, rows, stride, inside, cols, R).to(tl.float32)
        g = load_tile(zg_base + R, rows, stride, inside, cols, R).to(tl.float32)
        logit += tl.sum(z * g, 1)
    return sigmoid(logit)


@triton.jit
def gate_weights(p_neg):
    """Return the weights of the positive and the negative part, a_pos = p_pos + 1/2 and a_neg = p_neg - 1/2."""
    return 1.5 - p_neg, p_neg - 0.5


@triton.jit
def column_weights(p_neg, cols, R_POS: tl.constexpr):
    """Return the gate's weight of each column of z, (rows, cols): a_pos for cols < R_POS, else a_neg."""
    positive = (cols < R_POS)[None, :]
    a_pos, a_neg = gate_weights(p_neg[:, None])
    return tl.where(positive, a_pos, a_neg)
