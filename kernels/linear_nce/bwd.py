"""Backward kernel of linear_nce: the gradient of a chunk of logits, from logits computed again."""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LOG2_E, matmul_add, softcap_slope
from calm_fast.kernels.vocabulary.tiles import bias_and_softcap, load_block, row_pointers, tile_position


@triton.jit
def weighted_softmax(difference, total, coefficient, scale):
    """Return coefficient * exp(scale * difference) / total for a tile, with one total and one coefficient a row.

    difference: logits minus the largest of their row, exact where it matters, whatever the size of the logits.
    """
    return (coefficient / total)[:, None] * tl.exp2(difference * (scale * LOG2_E))


@triton.jit(do_not_specialize=["first_row", "end_row", "first_column", "end_column", "T", "blocks"])
def _linear_nce_dlogits_kernel(
    student_ptr,  # (T, d)
    nat_ptr,  # (T, d)
    weight_ptr,  # (V, d)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (T,) int64
    norms_ptr,  # (5, T) float32: top, sum and sum over tau of the student, top and sum over tau of nat
    coefficients_ptr,  # (2, T) float32
    dloss_ptr,  # () float32
    chunk_ptr,  # (end_row - first_row, end_column - first_column) contiguous
    stride_s,
    stride_p,
    stride_w,
    first_row,
    end_row,
    first_column,
    end_column,
    T,
    V,
    blocks,  # of columns
    tau,
    softcap,
    TAU_IS_1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dz = dloss (hard (softmax z - 1_target) + soft tau (softmax(tau z) - softmax(tau z_nat))); tau = 1 / temperature.

    Rows whose coefficients are 0 (ignored tokens) get 0. A tile with only such rows is not computed.
    """
    tile, block = tile_position(end_row - first_row, blocks, BLOCK_T, GROUP)
    first = first_row + tile * BLOCK_T
    start = first_column + block * BLOCK_V
    rows = first + tl.arange(0, BLOCK_T)
    cols = start + tl.arange(0, BLOCK_V)
    inside = rows < end_row
    # load: the coefficients say which rows count
    dloss = tl.load(dloss_ptr)
    hard = tl.load(coefficients_ptr + rows, mask=inside, other=0.0)
    soft = tl.load(coefficients_ptr + T + rows, mask=inside, other=0.0)
    counts = (hard != 0.0) | (soft != 0.0)
    dz = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    if tl.max(counts.to(tl.int32), 0) > 0:
        # scores, computed again
        student = row_pointers(student_ptr, first, end_row, stride_s, BLOCK_T)
        nat = row_pointers(nat_ptr, first, end_row, stride_p, BLOCK_T)
        weight = row_pointers(weight_ptr, start, end_column, stride_w, BLOCK_V)
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        z_nat = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_D):
            w = tl.trans(load_block(weight, k, D, BLOCK_D))
            z = matmul_add(load_block(student, k, D, BLOCK_D), w, z, PRECISION, INTERPRET)
            z_nat = matmul_add(load_block(nat, k, D, BLOCK_D), w, z_nat, PRECISION, INTERPRET)
        z = bias_and_softcap(z, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_nat = bias_and_softcap(z_nat, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)

        # softmax and its gradient
        hard = hard * dloss
        soft = soft * dloss * tau
        targets = tl.load(targets_ptr + rows, mask=inside, other=0)
        hard = tl.where((targets >= 0) & (targets < V), hard, float("nan"))  # nothing is known of other targets
        norms = norms_ptr + rows
        top = tl.load(norms, mask=inside, other=0.0)
        top_nat = tl.load(norms + 3 * T, mask=inside, other=0.0)
        total_soft = tl.load(norms + 2 * T, mask=inside, other=1.0)
        total_nat = tl.load(norms + 4 * T, mask=inside, other=1.0)
        difference = z - top[:, None]
        if TAU_IS_1:
            dz = weighted_softmax(difference, total_soft, hard + soft, 1.0)
        else:
            total = tl.load(norms + T, mask=inside, other=1.0)
            dz = weighted_softmax(difference, total_soft, soft, tau) + weighted_softmax(difference, total, hard, 1.0)
        dz -= weighted_softmax(z_nat - top_nat[:, None], total_nat, soft, tau)
        dz = tl.where(cols[None, :] == targets[:, None], dz - hard[:, None], dz)
        if HAS_SOFTCAP:
            dz *= softcap_slope(z, softcap)
        dz = tl.where(counts[:, None], dz, 0.0)
    # store
    width = (end_column - first_column).to(tl.int64)
    out = chunk_ptr + (rows - first_row).to(tl.int64)[:, None] * width + (cols - first_column)[None, :]
    tl.store(out, dz.to(chunk_ptr.dtype.element_ty), mask=inside[:, None] & (cols < end_column)[None, :])
