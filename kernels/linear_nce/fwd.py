"""Forward kernels of linear_nce: the sweep over the vocabulary, the combination of its splits, the calibration.

Derivation: docs/ops/linear_nce.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, LOG2_E, NEG_HUGE, matmul_add
from calm_fast.kernels.vocabulary.tiles import (
    bias_and_softcap,
    finite_difference,
    in_vocabulary,
    load_block,
    load_targets,
    raise_maximum,
    row_pointers,
    tile_position,
)

# Rows of `part`: maxima of the logits, sums of powers, mean differences. The last two exist only if the temperature is
# not 1.
PARTS_TAU_1 = 8
PARTS_ANY_TAU = 10
_TOP = tl.constexpr(0)
_SUM = tl.constexpr(1)
_TOP_NAT = tl.constexpr(2)
_SUM_NAT = tl.constexpr(3)
_MEAN_NAT = tl.constexpr(4)
_TOP_NEG = tl.constexpr(5)
_SUM_NEG = tl.constexpr(6)
_MEAN_NEG = tl.constexpr(7)
_SUM_SOFT = tl.constexpr(8)
_SUM_NAT_SOFT = tl.constexpr(9)


@triton.jit(do_not_specialize=["T", "ignore_index", "splits"])
def _linear_nce_sweep_kernel(
    student_ptr,  # (T, d)
    nat_ptr,  # (T, d)
    neg_ptr,  # (T, d)
    weight_ptr,  # (V, d)
    bias_ptr,  # (V,) or None
    targets_ptr,  # (T,) int64
    part_ptr,  # (PARTS, splits, T) float32
    at_target_ptr,  # (T,) float32
    stride_s,
    stride_p,
    stride_n,
    stride_w,
    T,
    V,
    splits,
    tau,
    softcap,
    ignore_index,
    SPLIT_V: tl.constexpr,
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
    """One tile of tokens against SPLIT_V columns; tau is 1 / temperature. A tile without valid tokens is skipped.

    Suffixes: s student, p nat, n neg, q the student over tau, r nat over tau.
    """
    tile, split = tile_position(T, splits, BLOCK_T, GROUP)
    first = tile * BLOCK_T
    rows = first + tl.arange(0, BLOCK_T)
    targets, valid, any_valid = load_targets(targets_ptr, rows, T, ignore_index)
    if not any_valid:
        return
    # load: pointers to the rows, accumulators
    student = row_pointers(student_ptr, first, T, stride_s, BLOCK_T)
    nat = row_pointers(nat_ptr, first, T, stride_p, BLOCK_T)
    neg = row_pointers(neg_ptr, first, T, stride_n, BLOCK_T)
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    max_s, sum_s = nothing + NEG_HUGE, nothing
    max_p, sum_p = nothing + NEG_HUGE, nothing
    max_n, sum_n = nothing + NEG_HUGE, nothing
    sum_q, sum_r, mean_p, mean_n, at_target = nothing, nothing, nothing, nothing, nothing
    begin = split * SPLIT_V
    for start in range(begin, tl.minimum(begin + SPLIT_V, V), BLOCK_V):
        # scores: the three streams share each tile of weight
        weight = row_pointers(weight_ptr, start, V, stride_w, BLOCK_V)
        z_s = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        z_p = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        z_n = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, D, BLOCK_D):
            w = tl.trans(load_block(weight, k, D, BLOCK_D))
            z_s = matmul_add(load_block(student, k, D, BLOCK_D), w, z_s, PRECISION, INTERPRET)
            z_p = matmul_add(load_block(nat, k, D, BLOCK_D), w, z_p, PRECISION, INTERPRET)
            z_n = matmul_add(load_block(neg, k, D, BLOCK_D), w, z_n, PRECISION, INTERPRET)
        cols = start + tl.arange(0, BLOCK_V)
        inside = cols < V
        z_s = bias_and_softcap(z_s, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_p = bias_and_softcap(z_p, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_n = bias_and_softcap(z_n, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)

        # softmax, accumulate: from here on a tile of logits holds the differences to its running maximum, and the means
        # are those of differences: two large means would cancel
        own = cols[None, :] == targets[:, None]
        at_target += tl.sum(tl.where(own, z_s, 0.0), 1)
        max_s, z_s, moved_s = raise_maximum(max_s, z_s, inside)
        sum_s = sum_s * tl.exp2(moved_s * LOG2_E) + tl.sum(tl.exp2(z_s * LOG2_E), 1)
        if not TAU_IS_1:
            sum_q = sum_q * tl.exp2(moved_s * (tau * LOG2_E)) + tl.sum(tl.exp2(z_s * (tau * LOG2_E)), 1)
        max_p, z_p, moved_p = raise_maximum(max_p, z_p, inside)
        shrink = tl.exp2(moved_p * LOG2_E)
        weights = tl.exp2(z_p * LOG2_E)
        if TAU_IS_1:
            mean_p = (mean_p + sum_p * moved_s) * shrink
        sum_p = sum_p * shrink + tl.sum(weights, 1)
        if not TAU_IS_1:
            shrink = tl.exp2(moved_p * (tau * LOG2_E))
            weights = tl.exp2(z_p * (tau * LOG2_E))
            mean_p = (mean_p + sum_r * moved_s) * shrink
            sum_r = sum_r * shrink + tl.sum(weights, 1)
        mean_p += tl.sum(weights * finite_difference(z_s), 1)
        max_n, z_n, moved_n = raise_maximum(max_n, z_n, inside)
        shrink = tl.exp2(moved_n * LOG2_E)
        weights = tl.exp2(z_n * LOG2_E)
        mean_n = (mean_n + sum_n * (moved_n - moved_p)) * shrink
        sum_n = sum_n * shrink + tl.sum(weights, 1)
        # 0 for a banned token, and for none, whose differences are both -inf
        mean_n += tl.sum(weights * tl.where(weights > 0.0, z_n - z_p, 0.0), 1)

    # store
    part = part_ptr + tl.cast(split, tl.int64) * T + rows
    plane = tl.cast(splits, tl.int64) * T
    tl.store(part + _TOP * plane, max_s, mask=valid)
    tl.store(part + _SUM * plane, sum_s, mask=valid)
    tl.store(part + _TOP_NAT * plane, max_p, mask=valid)
    tl.store(part + _SUM_NAT * plane, sum_p, mask=valid)
    tl.store(part + _TOP_NEG * plane, max_n, mask=valid)
    tl.store(part + _SUM_NEG * plane, sum_n, mask=valid)
    # a split with only banned tokens has no mean, and weighs nothing
    tl.store(part + _MEAN_NEG * plane, tl.where(sum_n == 0.0, 0.0, mean_n / sum_n), mask=valid)
    if TAU_IS_1:
        tl.store(part + _MEAN_NAT * plane, tl.where(sum_p == 0.0, 0.0, mean_p / sum_p), mask=valid)
    else:
        tl.store(part + _MEAN_NAT * plane, tl.where(sum_r == 0.0, 0.0, mean_p / sum_r), mask=valid)
        tl.store(part + _SUM_SOFT * plane, sum_q, mask=valid)
        tl.store(part + _SUM_NAT_SOFT * plane, sum_r, mask=valid)
    own = (targets >= begin) & (targets < begin + SPLIT_V)
    tl.store(at_target_ptr + rows, at_target, mask=valid & own)


@triton.jit
def raise_split(row_max, part_ptr, plane, TOP: tl.constexpr, valid):
    """Raise row maxima to those of a split. Returns (new maximum, old minus new, the split's minus new)."""
    top = tl.load(part_ptr + TOP * plane, mask=valid, other=0.0)
    new_max = tl.maximum(row_max, top)
    return new_max, row_max - new_max, top - new_max


@triton.jit
def add_split(row_sum, moved, below, part_ptr, plane, SUM: tl.constexpr, scale_log2, valid):
    """Add a split's sum of powers. Returns (new sum, factor of sums relative to the old maximum, the split's share)."""
    shrink = tl.exp2(moved * scale_log2)
    share = tl.exp2(below * scale_log2) * tl.load(part_ptr + SUM * plane, mask=valid, other=1.0)
    return row_sum * shrink + share, shrink, share


@triton.jit
def add_split_mean(mean, old_sum, moved, shrink, below, share, part_ptr, plane, MEAN: tl.constexpr, valid):
    """Add a split's mean, times its share, to a weighted sum whose values are relative to maxima that have `moved`."""
    part_mean = tl.load(part_ptr + MEAN * plane, mask=valid, other=0.0)
    # a split with only banned tokens lies so far below that its share is 0
    return (mean + old_sum * moved) * shrink + share * (part_mean + below)


@triton.jit(do_not_specialize=["T", "ignore_index", "splits"])
def _linear_nce_combine_kernel(
    part_ptr,  # (PARTS, splits, T) float32
    at_target_ptr,  # (T,) float32
    targets_ptr,  # (T,) int64
    norms_ptr,  # (5, T) float32: top, sum and sum over tau of the student, top and sum over tau of nat
    terms_ptr,  # (3, T) float32: hard and soft cross-entropy, KL(neg || nat)
    T,
    V,
    splits,
    tau,
    ignore_index,
    TAU_IS_1: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Norms and loss terms of each token from its splits; zeros for ignored tokens, NaN for an unknown target."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets, valid, _ = load_targets(targets_ptr, rows, T, ignore_index)
    # accumulate the splits, in their order
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    max_s, sum_s = nothing + NEG_HUGE, nothing
    max_p, sum_p = nothing + NEG_HUGE, nothing
    max_n, sum_n = nothing + NEG_HUGE, nothing
    sum_q, sum_r, mean_p, mean_n = nothing, nothing, nothing, nothing
    plane = tl.cast(splits, tl.int64) * T
    for split in range(0, splits):
        part = part_ptr + tl.cast(split, tl.int64) * T + rows
        max_s, moved_s, below_s = raise_split(max_s, part, plane, _TOP, valid)
        max_p, moved_p, below_p = raise_split(max_p, part, plane, _TOP_NAT, valid)
        max_n, moved_n, below_n = raise_split(max_n, part, plane, _TOP_NEG, valid)
        sum_s, shrink, share = add_split(sum_s, moved_s, below_s, part, plane, _SUM, LOG2_E, valid)
        old = sum_p
        sum_p, shrink, share = add_split(sum_p, moved_p, below_p, part, plane, _SUM_NAT, LOG2_E, valid)
        if not TAU_IS_1:
            sum_q, shrink, share = add_split(sum_q, moved_s, below_s, part, plane, _SUM_SOFT, tau * LOG2_E, valid)
            old = sum_r
            sum_r, shrink, share = add_split(sum_r, moved_p, below_p, part, plane, _SUM_NAT_SOFT, tau * LOG2_E, valid)
        mean_p = add_split_mean(mean_p, old, moved_s, shrink, below_s, share, part, plane, _MEAN_NAT, valid)
        old = sum_n
        sum_n, shrink, share = add_split(sum_n, moved_n, below_n, part, plane, _SUM_NEG, LOG2_E, valid)
        mean_n = add_split_mean(
            mean_n, old, moved_n - moved_p, shrink, below_n - below_p, share, part, plane, _MEAN_NEG, valid
        )
    # log-sum-exps relative to the maxima, and means, of the whole vocabulary
    log_s, log_p, log_n = tl.log2(sum_s) * LN_2, tl.log2(sum_p) * LN_2, tl.log2(sum_n) * LN_2
    if TAU_IS_1:
        sum_q = sum_s
        sum_r = sum_p
    # store
    at_target = tl.load(at_target_ptr + rows, mask=in_vocabulary(targets, valid, V), other=float("nan"))
    hard = log_s + (max_s - at_target)
    soft = tl.log2(sum_q) * LN_2 - tau * (mean_p / sum_r)
    inside = rows < T
    tl.store(norms_ptr + rows, tl.where(valid, max_s, 0.0), mask=inside)
    tl.store(norms_ptr + T + rows, tl.where(valid, sum_s, 0.0), mask=inside)
    tl.store(norms_ptr + 2 * T + rows, tl.where(valid, sum_q, 0.0), mask=inside)
    tl.store(norms_ptr + 3 * T + rows, tl.where(valid, max_p, 0.0), mask=inside)
    tl.store(norms_ptr + 4 * T + rows, tl.where(valid, sum_r, 0.0), mask=inside)
    tl.store(terms_ptr + rows, tl.where(valid, hard, 0.0), mask=inside)
    tl.store(terms_ptr + T + rows, tl.where(valid, soft, 0.0), mask=inside)
    tl.store(terms_ptr + 2 * T + rows, tl.where(valid, mean_n / sum_n - log_n + log_p, 0.0), mask=inside)


@triton.jit(do_not_specialize=["T", "ignore_index"])
def _linear_nce_calibrate_kernel(
    terms_ptr,  # (3, T) float32
    targets_ptr,  # (T,) int64
    seq_ids_ptr,  # (T,) int64
    coefficients_ptr,  # (2, T) float32
    T,
    alpha,
    tau,
    offset,
    ignore_index,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Coefficients of the hard and the soft cross-entropy of each token in the loss; NaN unless 0 <= id < T.

    Every token reads the KL of all tokens of its sequence. That takes T^2 comparisons, which is nothing next to the
    matrix products, and without atomics the sum is the same in every run.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets, valid, _ = load_targets(targets_ptr, rows, T, ignore_index)
    # load and accumulate: the mean KL of each row's sequence, and the number of valid tokens
    ids = tl.load(seq_ids_ptr + rows, mask=rows < T, other=-1)
    total = tl.zeros((BLOCK_T,), tl.float32)
    members = tl.zeros((BLOCK_T,), tl.float32)
    count = 0
    for start in range(0, T, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        _, other_valid, _ = load_targets(targets_ptr, others, T, ignore_index)
        other_ids = tl.load(seq_ids_ptr + others, mask=others < T, other=-2)
        kl = tl.load(terms_ptr + 2 * T + others, mask=others < T, other=0.0)
        same = (ids[:, None] == other_ids[None, :]) & other_valid[None, :]
        total += tl.sum(tl.where(same, kl[None, :], 0.0), 1)
        members += tl.sum(same.to(tl.float32), 1)
        count += tl.sum(other_valid.to(tl.int32), 0)
    # store: beta = tanh(mean KL)
    mean = total / tl.maximum(members, 1.0)
    beta = 2.0 * tl.sigmoid(2.0 * mean) - 1.0
    beta = tl.where((ids >= 0) & (ids < T), beta, float("nan"))
    each = 1.0 / tl.maximum(count, 1).to(tl.float32)
    soft = alpha / (tau * tau) * each * (offset + beta)
    hard = tl.zeros((BLOCK_T,), tl.float32) + (1.0 - alpha) * each
    inside = rows < T
    tl.store(coefficients_ptr + rows, tl.where(valid, hard, 0.0), mask=inside)
    tl.store(coefficients_ptr + T + rows, tl.where(valid, soft, 0.0), mask=inside)
