"""Forward kernels of linear_nce: sweep the vocabulary, combine its splits, weigh tokens by their sequence.

Derivation: docs/ops/linear_nce.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.vocabulary.tiles import (
    LN_2,
    LOG2_E,
    NEG_HUGE,
    any_valid,
    cap,
    load_block,
    matmul_add,
    row_pointers,
    running_sum,
    tile_position,
    without_banned,
)

# rows of `part`: log-sum-exps in log2 units and means; the last two only where the temperature is not 1
PARTS_PLAIN = 5
PARTS_SOFT = 7
_LSE = tl.constexpr(0)
_LSE_NAT = tl.constexpr(1)
_MEAN_NAT = tl.constexpr(2)
_LSE_NEG = tl.constexpr(3)
_MEAN_NEG = tl.constexpr(4)
_LSE_SOFT = tl.constexpr(5)
_LSE_NAT_SOFT = tl.constexpr(6)


@triton.jit
def finite(z, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """z with 0 for a banned token's -inf, which a softcap makes finite anyway."""
    if HAS_SOFTCAP:
        return z
    return without_banned(z, HAS_BIAS)


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
    PLAIN: tl.constexpr,
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
    """One tile of tokens against SPLIT_V columns; tau is 1 / temperature. A tile without valid tokens is left out."""
    tile, split = tile_position(T, splits, BLOCK_T, GROUP)
    first = tile * BLOCK_T
    rows = first + tl.arange(0, BLOCK_T)
    targets, valid, some = any_valid(targets_ptr, rows, T, ignore_index)
    if not some:
        return
    student = row_pointers(student_ptr, first, T, stride_s, BLOCK_T)
    nat = row_pointers(nat_ptr, first, T, stride_p, BLOCK_T)
    neg = row_pointers(neg_ptr, first, T, stride_n, BLOCK_T)

    nothing = tl.zeros((BLOCK_T,), tl.float32)
    max_s, sum_s = nothing + NEG_HUGE, nothing
    max_p, sum_p = nothing + NEG_HUGE, nothing
    max_n, sum_n = nothing + NEG_HUGE, nothing
    max_q, sum_q = nothing + NEG_HUGE, nothing  # the student over tau
    max_r, sum_r = nothing + NEG_HUGE, nothing  # nat over tau
    mean_p, mean_n, at_target = nothing, nothing, nothing
    begin = split * SPLIT_V
    for start in range(begin, tl.minimum(begin + SPLIT_V, V), BLOCK_V):
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
        z_s = cap(z_s, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_p = cap(z_p, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_n = cap(z_n, bias_ptr, cols, V, softcap, HAS_BIAS, HAS_SOFTCAP)

        at_target += tl.sum(tl.where(cols[None, :] == targets[:, None], z_s, 0.0), 1)
        max_s, sum_s, weights, shrink = running_sum(max_s, sum_s, z_s, inside, LOG2_E)
        max_p, sum_p, weights, shrink = running_sum(max_p, sum_p, z_p, inside, LOG2_E)
        if not PLAIN:
            max_q, sum_q, weights, shrink = running_sum(max_q, sum_q, z_s, inside, tau * LOG2_E)
            max_r, sum_r, weights, shrink = running_sum(max_r, sum_r, z_p, inside, tau * LOG2_E)
        mean_p = mean_p * shrink + tl.sum(weights * finite(z_s, HAS_BIAS, HAS_SOFTCAP), 1)
        max_n, sum_n, weights, shrink = running_sum(max_n, sum_n, z_n, inside, LOG2_E)
        gap = finite(z_n, HAS_BIAS, HAS_SOFTCAP) - finite(z_p, HAS_BIAS, HAS_SOFTCAP)
        mean_n = mean_n * shrink + tl.sum(weights * gap, 1)

    part = part_ptr + tl.cast(split, tl.int64) * T + rows
    plane = tl.cast(splits, tl.int64) * T
    tl.store(part + _LSE * plane, max_s + tl.log2(sum_s), mask=valid)
    tl.store(part + _LSE_NAT * plane, max_p + tl.log2(sum_p), mask=valid)
    tl.store(part + _LSE_NEG * plane, max_n + tl.log2(sum_n), mask=valid)
    # a split of nothing but banned tokens has no mean, and weighs nothing
    tl.store(part + _MEAN_NEG * plane, tl.where(sum_n == 0.0, 0.0, mean_n / sum_n), mask=valid)
    if PLAIN:
        tl.store(part + _MEAN_NAT * plane, tl.where(sum_p == 0.0, 0.0, mean_p / sum_p), mask=valid)
    else:
        tl.store(part + _MEAN_NAT * plane, tl.where(sum_r == 0.0, 0.0, mean_p / sum_r), mask=valid)
        tl.store(part + _LSE_SOFT * plane, max_q + tl.log2(sum_q), mask=valid)
        tl.store(part + _LSE_NAT_SOFT * plane, max_r + tl.log2(sum_r), mask=valid)
    own = (targets >= begin) & (targets < begin + SPLIT_V)
    tl.store(at_target_ptr + rows, at_target, mask=valid & own)


@triton.jit
def add_split(row_max, row_sum, row_mean, lse_ptr, mean_ptr, valid, HAS_MEAN: tl.constexpr):
    """Account for one split's log-sum-exp and mean: returns (row_max, row_sum, weighted mean)."""
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
    PLAIN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """What one token's splits add up to; zeros for tokens that do not count."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets, valid, some = any_valid(targets_ptr, rows, T, ignore_index)
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
        max_p, sum_p, mean_p = add_split(max_p, sum_p, mean_p, part + _LSE_NAT * plane, mean, valid, PLAIN)
        max_n, sum_n, mean_n = add_split(
            max_n, sum_n, mean_n, part + _LSE_NEG * plane, part + _MEAN_NEG * plane, valid, True
        )
        if not PLAIN:
            max_q, sum_q, unused = add_split(max_q, sum_q, unused, part + _LSE_SOFT * plane, mean, valid, False)
            max_r, sum_r, mean_p = add_split(max_r, sum_r, mean_p, part + _LSE_NAT_SOFT * plane, mean, valid, True)
    lse_s = (max_s + tl.log2(sum_s)) * LN_2
    lse_p = (max_p + tl.log2(sum_p)) * LN_2
    lse_n = (max_n + tl.log2(sum_n)) * LN_2
    if PLAIN:
        lse_q = lse_s
        lse_r = lse_p
        mean_p = mean_p / sum_p
    else:
        lse_q = (max_q + tl.log2(sum_q)) * LN_2
        lse_r = (max_r + tl.log2(sum_r)) * LN_2
        mean_p = mean_p / sum_r
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

    Every token reads the KL of all tokens of its sequence: T^2 comparisons, nothing beside the products, and the sum
    is the same in every run (no atomics).
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    targets, valid, some = any_valid(targets_ptr, rows, T, ignore_index)
    ids = tl.load(seq_ids_ptr + rows, mask=rows < T, other=-1)
    total = tl.zeros((BLOCK_T,), tl.float32)
    members = tl.zeros((BLOCK_T,), tl.float32)
    count = 0
    for start in range(0, T, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        other_targets, other_valid, some = any_valid(targets_ptr, others, T, ignore_index)
        other_ids = tl.load(seq_ids_ptr + others, mask=others < T, other=-2)
        kl = tl.load(terms_ptr + 2 * T + others, mask=others < T, other=0.0)
        same = (ids[:, None] == other_ids[None, :]) & other_valid[None, :]
        total += tl.sum(tl.where(same, kl[None, :], 0.0), 1)
        members += tl.sum(same.to(tl.float32), 1)
        count += tl.sum(other_valid.to(tl.int32), 0)
    mean = total / tl.maximum(members, 1.0)
    beta = 2.0 * tl.sigmoid(2.0 * mean) - 1.0
    each = 1.0 / tl.maximum(count, 1).to(tl.float32)
    soft = alpha / (tau * tau) * each * (offset + beta)
    hard = tl.zeros((BLOCK_T,), tl.float32) + (1.0 - alpha) * each
    inside = rows < T
    tl.store(coefficients_ptr + rows, tl.where(valid, hard, 0.0), mask=inside)
    tl.store(coefficients_ptr + T + rows, tl.where(valid, soft, 0.0), mask=inside)
