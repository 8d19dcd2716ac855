"""Forward kernels of linear_nce: the sweep over the vocabulary, the combination of its splits, the calibration.

Derivation: docs/ops/linear_nce.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, LOG2_E, NEG_HUGE, matmul_add
from calm_fast.kernels.vocabulary.tiles import (
    bias_and_softcap,
    load_block,
    load_targets,
    online_softmax,
    row_pointers,
    tile_position,
    zero_banned,
)

# Rows of `part`: log-sum-exps in log2 units, and means. The last two exist only if the temperature is not 1.
PARTS_TAU_1 = 5
PARTS_ANY_TAU = 7
_LSE = tl.constexpr(0)
_LSE_NAT = tl.constexpr(1)
_MEAN_NAT = tl.constexpr(2)
_LSE_NEG = tl.constexpr(3)
_MEAN_NEG = tl.constexpr(4)
_LSE_SOFT = tl.constexpr(5)
_LSE_NAT_SOFT = tl.constexpr(6)


@triton.jit
def finite_logits(z, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return z with 0 for a banned token's -inf, which a softcap makes finite anyway."""
    if HAS_SOFTCAP:
        return z
    return zero_banned(z, HAS_BIAS)


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
    max_q, sum_q = nothing + NEG_HUGE, nothing
    max_r, sum_r = nothing + NEG_HUGE, nothing
    mean_p, mean_n, at_target = nothing, nothing, nothing
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

        # softmax, accumulate
        at_target += tl.sum(tl.where(cols[None, :] == targets[:, None], z_s, 0.0), 1)
        max_s, sum_s, weights, shrink = online_softmax(max_s, sum_s, z_s, inside, LOG2_E)
        max_p, sum_p, weights, shrink = online_softmax(max_p, sum_p, z_p, inside, LOG2_E)
        if not TAU_IS_1:
            max_q, sum_q, weights, shrink = online_softmax(max_q, sum_q, z_s, inside, tau * LOG2_E)
            max_r, sum_r, weights, shrink = online_softmax(max_r, sum_r, z_p, inside, tau * LOG2_E)
        mean_p = mean_p * shrink + tl.sum(weights * finite_logits(z_s, HAS_BIAS, HAS_SOFTCAP), 1)
        max_n, sum_n, weights, shrink = online_softmax(max_n, sum_n, z_n, inside, LOG2_E)
        gap = finite_logits(z_n, HAS_BIAS, HAS_SOFTCAP) - finite_logits(z_p, HAS_BIAS, HAS_SOFTCAP)
        mean_n = mean_n * shrink + tl.sum(weights * gap, 1)

    # store
    part = part_ptr + tl.cast(split, tl.int64) * T + rows
    plane = tl.cast(splits, tl.int64) * T
    tl.store(part + _LSE * plane, max_s + tl.log2(sum_s), mask=valid)
    tl.store(part + _LSE_NAT * plane, max_p + tl.log2(sum_p), mask=valid)
    tl.store(part + _LSE_NEG * plane, max_n + tl.log2(sum_n), mask=valid)
    # a split with only banned tokens has no mean, and weighs nothing
    tl.store(part + _MEAN_NEG * plane, tl.where(sum_n == 0.0, 0.0, mean_n / sum_n), mask=valid)
    if TAU_IS_1:
        tl.store(part + _MEAN_NAT * plane, tl.where(sum_p == 0.0, 0.0, mean_p / sum_p), mask=valid)
    else:
        tl.store(part + _MEAN_NAT * plane, tl.where(sum_r == 0.0, 0.0, mean_p / sum_r), mask=valid)
        tl.store(part + _LSE_SOFT * plane, max_q + tl.log2(sum_q), mask=valid)
        tl.store(part + _LSE_NAT_SOFT * plane, max_r + tl.log2(sum_r), mask=valid)
    own = (targets >= begin) & (targets < begin + SPLIT_V)
    tl.store(at_target_ptr + rows, at_target, mask=valid & own)


@triton.jit
def add_split(row_max, row_sum, row_mean, lse_ptr, mean_ptr, valid, HAS_MEAN: tl.constexpr):
    """Add one split's log-sum-exp and mean. Returns (row_max, row_sum, weighted mean)."""
    lse = tl.load(lse_ptr, mask=valid, other=0.0)
    new_max = tl.maximum(row_max, lse)
    shrink = tl.exp2(row_max - new_max)
    share = tl.exp2(lse - new_max)
    if HAS_MEAN:
        row_mean = row_mean * shrink + share * tl.load(mean_ptr, mask=valid, other=0.0)
    return new_max, row_sum * shrink + share, row_mean


@triton.jit(do_not_specialize=["T", "ignore_index", "splits"])
def _linear_nce_combine_kernel(
    part_ptr,  # (PARTS, splits, T) float32
    at_target_ptr,  # (T,) float32
    targets_ptr,  # (T,) int64
    lse_ptr,  # (3, T) float32: student, student over tau, nat over tau
    terms_ptr,  # (3, T) float32: hard and soft cross-entropy, KL(neg || nat)
    T,
    splits,
    tau,
    ignore_index,
    TAU_IS_1: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Log-sum-exps and loss terms of each token from its splits; zeros for ignored tokens."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets, valid, _ = load_targets(targets_ptr, rows, T, ignore_index)
    # accumulate the splits, in their order
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    max_s, sum_s = nothing + NEG_HUGE, nothing
    max_p, sum_p = nothing + NEG_HUGE, nothing
    max_n, sum_n = nothing + NEG_HUGE, nothing
    max_q, sum_q = nothing + NEG_HUGE, nothing
    max_r, sum_r = nothing + NEG_HUGE, nothing
    mean_p, mean_n, unused = nothing, nothing, nothing
    plane = tl.cast(splits, tl.int64) * T
    for split in range(0, splits):
        part = part_ptr + tl.cast(split, tl.int64) * T + rows
        mean = part + _MEAN_NAT * plane
        max_s, sum_s, unused = add_split(max_s, sum_s, unused, part + _LSE * plane, mean, valid, False)
        max_p, sum_p, mean_p = add_split(max_p, sum_p, mean_p, part + _LSE_NAT * plane, mean, valid, TAU_IS_1)
        max_n, sum_n, mean_n = add_split(
            max_n, sum_n, mean_n, part + _LSE_NEG * plane, part + _MEAN_NEG * plane, valid, True
        )
        if not TAU_IS_1:
            max_q, sum_q, unused = add_split(max_q, sum_q, unused, part + _LSE_SOFT * plane, mean, valid, False)
            max_r, sum_r, mean_p = add_split(max_r, sum_r, mean_p, part + _LSE_NAT_SOFT * plane, mean, valid, True)
    # log-sum-exps and means of the whole vocabulary
    lse_s = (max_s + tl.log2(sum_s)) * LN_2
    lse_p = (max_p + tl.log2(sum_p)) * LN_2
    lse_n = (max_n + tl.log2(sum_n)) * LN_2
    if TAU_IS_1:
        lse_q = lse_s
        lse_r = lse_p
        mean_p = mean_p / sum_p
    else:
        lse_q = (max_q + tl.log2(sum_q)) * LN_2
        lse_r = (max_r + tl.log2(sum_r)) * LN_2
        mean_p = mean_p / sum_r
    # store
    hard = lse_s - tl.load(at_target_ptr + rows, mask=valid, other=0.0)
    inside = rows < T
    tl.store(lse_ptr + rows, tl.where(valid, lse_s, 0.0), mask=inside)
    tl.store(lse_ptr + T + rows, tl.where(valid, lse_q, 0.0), mask=inside)
    tl.store(lse_ptr + 2 * T + rows, tl.where(valid, lse_r, 0.0), mask=inside)
    tl.store(terms_ptr + rows, tl.where(valid, hard, 0.0), mask=inside)
    tl.store(terms_ptr + T + rows, tl.where(valid, lse_q - tau * mean_p, 0.0), mask=inside)
    tl.store(terms_ptr + 2 * T + rows, tl.where(valid, mean_n / sum_n - lse_n + lse_p, 0.0), mask=inside)


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
    """Coefficients of the hard and the soft cross-entropy of each token in the loss.

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
    each = 1.0 / tl.maximum(count, 1).to(tl.float32)
    soft = alpha / (tau * tau) * each * (offset + beta)
    hard = tl.zeros((BLOCK_T,), tl.float32) + (1.0 - alpha) * each
    inside = rows < T
    tl.store(coefficients_ptr + rows, tl.where(valid, hard, 0.0), mask=inside)
    tl.store(coefficients_ptr + T + rows, tl.where(valid, soft, 0.0), mask=inside)
