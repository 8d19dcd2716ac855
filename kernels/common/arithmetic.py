"""Device arithmetic that the kernels of several ops share: constants, matrix products, softcap."""

from __future__ import annotations

import triton
import triton.language as tl

# The running row maximum starts at a finite number: exp2(-inf - NEG_HUGE) is 0 where exp2(-inf - -inf) is NaN.
NEG_HUGE = tl.constexpr(-3.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Return a @ b with float32 accumulation."""
    if INTERPRET:  # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, acc, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """Return acc + a @ b with float32 accumulation."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def apply_softcap(z, softcap):
    """Return softcap * tanh(z / softcap); tanh(x) = 2 sigmoid(2 x) - 1, as the interpreter has no libdevice."""
    return softcap * (2.0 * tl.sigmoid(z * (2.0 / softcap)) - 1.0)


@triton.jit
def softcap_slope(z, softcap):
    """Return the derivative of the softcap, 1 - (z / softcap)^2, from its result z."""
    t = z / softcap
    return 1.0 - t * t
