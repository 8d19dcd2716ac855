"""Kernels of linear_logprob: the sweep over the vocabulary, the combination of its splits, a chunk of logit gradients.

Derivation: docs/ops/linear_logprob.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, LOG2_E, NEG_HUGE, apply_softcap, softcap_slope
from calm_fast.kernels.vocabulary.tiles import (
    bias_and_softcap,
    finite_difference,
    in_vocabulary,
    load_block,
    load_targets,
    logits_tile,
    raise_maximum,
    row_pointers,
    tile_position,
    zero_banned,
)


@triton.jit(do_not_specialize=["T", "ignore_index"])
def _linear_logprob_target_kernel(
    hidden_ptr,  # (T, d)
    weight_ptr,  # (V, d)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (T,) int64
    threshold_ptr,  # (T,) float32, written
    stride_h,
    stride_w,
    T,
    V,
    softcap,
    ignore_index,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The logits of the targets alone, the thresholds of their ranks."""
    first = tl.program_id(0) * BLOCK_T
    rows = first + tl.arange(0, BLOCK_T)
    targets, valid, _ = load_targets(targets_ptr, rows, T, ignore_index)
    targets = tl.where(in_vocabulary(targets, valid, V), targets, 0)
    # scores
    hidden = row_pointers(hidden_ptr, first, T, stride_h, BLOCK_T)
    weight = weight_ptr + targets * stride_w  # int64, as the targets are
    z = tl.zeros((BLOCK_T,), tl.float32)
    for k in range(0, D, BLOCK_D):
        a = load_block(hidden, k, D, BLOCK_D).to(tl.float32)
        z += tl.sum(a * load_block(weight, k, D, BLOCK_D).to(tl.float32), 1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + targets).to(tl.float32)
    if HAS_SOFTCAP:
        z = apply_softcap(z, softcap)
    # store
    tl.store(threshold_ptr + rows, z, mask=valid)


@triton.jit(do_not_specialize=["T", "ignore_index", "splits"])
def _linear_logprob_sweep_kernel(
    hidden_ptr,  # (T, d)
    weight_ptr,  # (V, d)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (T,) int64
    threshold_ptr,  # (T,) float32, or None without ranks
    part_ptr,  # (2 + HAS_ENTROPY, splits, T) float32: maxima, sums, mean differences to the maximum
    above_ptr,  # (splits, T) int32, or None without ranks
    at_target_ptr,  # (T,) float32
    stride_h,
    stride_w,
    T,
    V,
    splits,
    tau,
    softcap,
    ignore_index,
    SPLIT_V: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_RANK: tl.constexpr,
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
    """One tile of tokens against SPLIT_V columns; tau is 1 / temperature. A tile without valid tokens is skipped."""
    tile, split = tile_position(T, splits, BLOCK_T, GROUP)
    first = tile * BLOCK_T
    rows = first + tl.arange(0, BLOCK_T)
    targets, valid, any_valid = load_targets(targets_ptr, rows, T, ignore_index)
    if not any_valid:
        return
    # load: pointers to the rows, accumulators
    hidden = row_pointers(hidden_ptr, first, T, stride_h, BLOCK_T)
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    row_max, row_sum, mean, at_target = nothing + NEG_HUGE, nothing, nothing, nothing
    above = tl.zeros((BLOCK_T,), tl.int32)
    if HAS_RANK:
        threshold = tl.load(threshold_ptr + rows, mask=valid, other=0.0)
    begin = split * SPLIT_V
    for start in range(begin, tl.minimum(begin + SPLIT_V, V), BLOCK_V):
        # scores
        weight = row_pointers(weight_ptr, start, V, stride_w, BLOCK_V)
        z = logits_tile(hidden, weight, D, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION, INTERPRET)
        cols = start + tl.arange(0, BLOCK_V)
        inside = cols < V
        z = bias_and_softcap(z, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        # softmax, accumulate
        own = cols[None, :] == targets[:, None]
        at_target += tl.sum(tl.where(own, z, 0.0), 1)
        if HAS_RANK:  # the target's own logit, computed twice, may differ by a rounding: it never counts
            above += tl.sum(((z > threshold[:, None]) & inside[None, :] & (own == 0)).to(tl.int32), 1)
        row_max, z, moved = raise_maximum(row_max, z, inside)
        shrink = tl.exp2(moved * (tau * LOG2_E))
        weights = tl.exp2(z * (tau * LOG2_E))
        if HAS_ENTROPY:
            mean = (mean + row_sum * moved) * shrink + tl.sum(weights * finite_difference(z), 1)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
    # store
    part = part_ptr + tl.cast(split, tl.int64) * T + rows
    plane = tl.cast(splits, tl.int64) * T
    tl.store(part, row_max, mask=valid)
    tl.store(part + plane, row_sum, mask=valid)
    if HAS_ENTROPY:
        # a split with only banned tokens has no mean, and weighs nothing
        tl.store(part + 2 * plane, tl.where(row_sum == 0.0, 0.0, mean / row_sum), mask=valid)
    if HAS_RANK:
        tl.store(above_ptr + tl.cast(split, tl.int64) * T + rows, above, mask=valid)
    own_split = (targets >= begin) & (targets < begin + SPLIT_V)
    tl.store(at_target_ptr + rows, at_target, mask=valid & own_split)


@triton.jit(do_not_specialize=["T", "ignore_index", "splits"])
def _linear_logprob_combine_kernel(
    part_ptr,  # (2 + HAS_ENTROPY, splits, T) float32
    above_ptr,  # (splits, T) int32 or None
    at_target_ptr,  # (T,) float32
    targets_ptr,  # (T,) int64
    logprob_ptr,  # (T,) float32
    entropy_ptr,  # (T,) float32 or None
    rank_ptr,  # (T,) int64 or None
    norms_ptr,  # (2, T) float32: the largest logit, the sum of exp(tau (z - top))
    T,
    V,
    splits,
    tau,
    ignore_index,
    HAS_ENTROPY: tl.constexpr,
    HAS_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Log-probability, entropy, rank and norms of each token from its splits; zeros for ignored tokens.

    A target that is not in the vocabulary gets NaN and rank 0.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets, valid, _ = load_targets(targets_ptr, rows, T, ignore_index)
    # accumulate the splits, in their order
    row_max = tl.zeros((BLOCK_T,), tl.float32) + NEG_HUGE
    row_sum = tl.zeros((BLOCK_T,), tl.float32)
    mean = tl.zeros((BLOCK_T,), tl.float32)
    rank = tl.zeros((BLOCK_T,), tl.int64) + 1
    plane = tl.cast(splits, tl.int64) * T
    for split in range(0, splits):
        place = tl.cast(split, tl.int64) * T + rows
        part_max = tl.load(part_ptr + place, mask=valid, other=0.0)
        new_max = tl.maximum(row_max, part_max)
        moved = row_max - new_max
        shrink = tl.exp2(moved * (tau * LOG2_E))
        share = tl.exp2((part_max - new_max) * (tau * LOG2_E)) * tl.load(
            part_ptr + plane + place, mask=valid, other=1.0
        )
        if HAS_ENTROPY:
            part_mean = tl.load(part_ptr + 2 * plane + place, mask=valid, other=0.0)
            mean = (mean + row_sum * moved) * shrink + share * (part_mean + (part_max - new_max))
        row_sum = row_sum * shrink + share
        row_max = new_max
        if HAS_RANK:
            rank += tl.load(above_ptr + place, mask=valid, other=0)
    # store: relative to the maximum, so that the size of a certain token's logit costs no digits; never above 0
    known = in_vocabulary(targets, valid, V)
    at_target = tl.load(at_target_ptr + rows, mask=known, other=float("nan"))
    logprob = ((at_target - row_max) * (tau * LOG2_E) - tl.log2(row_sum)) * LN_2
    logprob = tl.where(logprob > 0.0, 0.0, logprob)
    inside = rows < T
    tl.store(logprob_ptr + rows, tl.where(valid, logprob, 0.0), mask=inside)
    tl.store(norms_ptr + rows, tl.where(valid, row_max, 0.0), mask=inside)
    tl.store(norms_ptr + T + rows, tl.where(valid, row_sum, 0.0), mask=inside)
    if HAS_ENTROPY:
        entropy = (tl.log2(row_sum) - mean / row_sum * (tau * LOG2_E)) * LN_2
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(entropy_ptr + rows, tl.where(valid, entropy, 0.0), mask=inside)
    if HAS_RANK:
        tl.store(rank_ptr + rows, tl.where(known, rank, 0), mask=inside)


@triton.jit(do_not_specialize=["first_row", "end_row", "first_column", "end_column", "T", "ignore_index", "blocks"])
def _linear_logprob_dlogits_kernel(
    hidden_ptr,  # (T, d)
    weight_ptr,  # (V, d)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (T,) int64
    norms_ptr,  # (2, T) float32
    entropy_ptr,  # (T,) float32, read only with dentropy
    dlogprob_ptr,  # (T,) float32
    dentropy_ptr,  # (T,) float32 or None
    chunk_ptr,  # (end_row - first_row, end_column - first_column) contiguous
    stride_h,
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
    ignore_index,
    HAS_DENTROPY: tl.constexpr,
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
    """dz = tau (dlogprob (1_target - p) - dentropy p (log p + entropy)); tau = 1 / temperature, and 0 if ignored."""
    tile, block = tile_position(end_row - first_row, blocks, BLOCK_T, GROUP)
    first = first_row + tile * BLOCK_T
    start = first_column + block * BLOCK_V
    rows = first + tl.arange(0, BLOCK_T)
    cols = start + tl.arange(0, BLOCK_V)
    inside = rows < end_row
    targets, valid, any_valid = load_targets(targets_ptr, rows, end_row, ignore_index)
    dz = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    if any_valid:
        # scores, computed again
        hidden = row_pointers(hidden_ptr, first, end_row, stride_h, BLOCK_T)
        weight = row_pointers(weight_ptr, start, end_column, stride_w, BLOCK_V)
        z = logits_tile(hidden, weight, D, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION, INTERPRET)
        z = bias_and_softcap(z, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        # softmax and its gradient
        top = tl.load(norms_ptr + rows, mask=valid, other=0.0)
        total = tl.load(norms_ptr + T + rows, mask=valid, other=1.0)
        dlogprob = tl.load(dlogprob_ptr + rows, mask=valid, other=0.0) * tau
        dlogprob = tl.where(in_vocabulary(targets, valid, V), dlogprob, float("nan"))
        # a probability is a power over `total`, which joins the factors of a row
        difference = z - top[:, None]
        p = tl.exp2(difference * (tau * LOG2_E))
        if HAS_DENTROPY:
            dentropy = tl.load(dentropy_ptr + rows, mask=valid, other=0.0) * tau
            entropy = tl.load(entropy_ptr + rows, mask=valid, other=0.0)
            constant = (dentropy * (tl.log2(total) * LN_2 - entropy) - dlogprob) / total
            dz = p * (constant[:, None] - (dentropy * tau / total)[:, None] * zero_banned(difference, HAS_BIAS))
        else:
            dz = p * (-dlogprob / total)[:, None]
        dz = tl.where(cols[None, :] == targets[:, None], dz + dlogprob[:, None], dz)
        if HAS_SOFTCAP:
            dz *= softcap_slope(z, softcap)
        dz = tl.where(valid[:, None], dz, 0.0)
    # store
    width = (end_column - first_column).to(tl.int64)
    out = chunk_ptr + (rows - first_row).to(tl.int64)[:, None] * width + (cols - first_column)[None, :]
    tl.store(out, dz.to(chunk_ptr.dtype.element_ty), mask=inside[:, None] & (cols < end_column)[None, :])
