"""Row kernels of the one-pass training step of linear_nce: from stored logits of a chunk of tokens to gradients.

One program takes one token. Derivation and arithmetic: docs/ops/linear_nce.md, "On a GPU".
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, LOG2_E, apply_softcap, softcap_slope

# The logit of padding, and of a token that a bias of -inf bans. It is finite, so its product with a weight of 0 is 0.
_BANNED = tl.constexpr(-1.0e30)

STATS = 5  # rows of `stats`: maxima, and log2 of the sums of exponentials
_TOP = tl.constexpr(0)
_NORM = tl.constexpr(1)
_NORM_SOFT = tl.constexpr(2)
_TOP_NAT = tl.constexpr(3)
_NORM_NAT_SOFT = tl.constexpr(4)


@triton.jit
def finite_logits(z, bias_ptr, cols, inside, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Return softcap * tanh((z + bias) / softcap) in float32, _BANNED for a banned token."""
    z = z.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = apply_softcap(z, softcap)
    elif HAS_BIAS:
        z = tl.where(z < _BANNED, _BANNED, z)  # tl.maximum would swallow NaN
    return z


@triton.jit
def load_logits(row, cols, bias_ptr, V, stride, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Load a block of one token's logits, _BANNED from V on. Rows are padded to `stride`, so whole vectors are read."""
    z = tl.load(row + cols, mask=cols < stride, other=0.0)
    inside = cols < V
    return tl.where(inside, finite_logits(z, bias_ptr, cols, inside, softcap, HAS_BIAS, HAS_SOFTCAP), _BANNED)


@triton.jit
def lane_maximum(top, z):
    """Return the running maximum of each lane after (LANES, WIDTH) more logits."""
    return tl.maximum(top, tl.max(z, 1))


@triton.jit
def lane_weights(z, old, new, scale_log2):
    """Return exp2(scale_log2 (z - new)), and the factor for sums that are relative to the `old` maximum."""
    return tl.exp2((z - new[:, None]) * scale_log2), tl.exp2((old - new) * scale_log2)


@triton.jit(do_not_specialize=["first", "rows", "total", "ignore_index"])
def _linear_nce_stats_kernel(
    logits_ptr,  # (3, rows, stride): student, nat, neg
    bias_ptr,  # (V,) or None
    targets_ptr,  # (total,) int64
    stats_ptr,  # (STATS, rows) float32
    terms_ptr,  # (3, total) float32: hard and soft cross-entropy, KL(neg || nat)
    first,
    rows,
    total,
    V,
    stride,
    tau,
    softcap,
    ignore_index,
    TAU_IS_1: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Log-sum-exps and means of token first + program_id; tau is 1 / temperature. An ignored token gets zero terms.

    LANES running sums each take every LANES-th vector of WIDTH logits and are joined at the end, so that inside the
    loop no thread waits for another. Suffixes: s student, p nat, n neg, q the student over tau, r nat over tau.
    """
    row = tl.program_id(0)
    token = first + row
    terms = terms_ptr + token
    target = tl.load(targets_ptr + token)
    if target == ignore_index:
        for i in tl.static_range(3):
            tl.store(terms + i * total, 0.0)
        return
    plane = tl.cast(rows, tl.int64) * stride
    own = logits_ptr + tl.cast(row, tl.int64) * stride
    block = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]

    nothing = tl.zeros((LANES,), tl.float32)
    top_s, sum_s, sum_q = nothing + _BANNED, nothing, nothing
    top_p, sum_p, sum_r = nothing + _BANNED, nothing, nothing
    top_n, sum_n = nothing + _BANNED, nothing
    mean_r, mean_n = nothing, nothing
    for start in range(0, V, LANES * WIDTH):
        # load
        cols = start + block
        z_s = load_logits(own, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_p = load_logits(own + plane, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_n = load_logits(own + 2 * plane, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)

        # softmax, accumulate: student, nat, neg
        new = lane_maximum(top_s, z_s)
        w, shrink = lane_weights(z_s, top_s, new, LOG2_E)
        sum_s = sum_s * shrink + tl.sum(w, 1)
        if not TAU_IS_1:
            w, shrink = lane_weights(z_s, top_s, new, tau * LOG2_E)
            sum_q = sum_q * shrink + tl.sum(w, 1)
        top_s = new

        new = lane_maximum(top_p, z_p)
        w, shrink = lane_weights(z_p, top_p, new, LOG2_E)
        sum_p = sum_p * shrink + tl.sum(w, 1)
        if not TAU_IS_1:
            w, shrink = lane_weights(z_p, top_p, new, tau * LOG2_E)
            sum_r = sum_r * shrink + tl.sum(w, 1)
        mean_r = mean_r * shrink + tl.sum(w * z_s, 1)
        top_p = new

        new = lane_maximum(top_n, z_n)
        w, shrink = lane_weights(z_n, top_n, new, LOG2_E)
        sum_n = sum_n * shrink + tl.sum(w, 1)
        mean_n = mean_n * shrink + tl.sum(w * (z_n - z_p), 1)
        top_n = new

    # join the lanes
    most_s, most_p, most_n = tl.max(top_s, 0), tl.max(top_p, 0), tl.max(top_n, 0)
    shrink_s = tl.exp2((top_s - most_s) * LOG2_E)
    shrink_p = tl.exp2((top_p - most_p) * LOG2_E)
    shrink_n = tl.exp2((top_n - most_n) * LOG2_E)
    norm_s = tl.log2(tl.sum(sum_s * shrink_s, 0))
    norm_p = tl.log2(tl.sum(sum_p * shrink_p, 0))
    all_n = tl.sum(sum_n * shrink_n, 0)
    if TAU_IS_1:
        norm_q = norm_s
        norm_r = norm_p
        mean = tl.sum(mean_r * shrink_p, 0) / tl.sum(sum_p * shrink_p, 0)
    else:
        shrink_r = tl.exp2((top_p - most_p) * (tau * LOG2_E))
        all_r = tl.sum(sum_r * shrink_r, 0)
        norm_q = tl.log2(tl.sum(sum_q * tl.exp2((top_s - most_s) * (tau * LOG2_E)), 0))
        norm_r = tl.log2(all_r)
        mean = tl.sum(mean_r * shrink_r, 0) / all_r

    # store
    known = (target >= 0) & (target < V)
    # NaN for a target that is not in the vocabulary: nothing is read for it
    z = tl.load(own + target, mask=known, other=float("nan"))
    z = finite_logits(z, bias_ptr, target, known, softcap, HAS_BIAS, HAS_SOFTCAP)
    gap = tl.sum(mean_n * shrink_n, 0) / all_n
    tl.store(terms, norm_s * LN_2 + (most_s - z))
    tl.store(terms + total, norm_q * LN_2 + tau * (most_s - mean))
    tl.store(terms + 2 * total, gap - (most_n - most_p) - (tl.log2(all_n) - norm_p) * LN_2)
    stats = stats_ptr + row
    tl.store(stats + _TOP * rows, most_s)
    tl.store(stats + _NORM * rows, norm_s)
    tl.store(stats + _NORM_SOFT * rows, norm_q)
    tl.store(stats + _TOP_NAT * rows, most_p)
    tl.store(stats + _NORM_NAT_SOFT * rows, norm_r)


@triton.jit
def sequence_weight(terms_ptr, seq_ids_ptr, token, first, rows, total, tokens, offset, BLOCK_J: tl.constexpr):
    """Return offset + tanh(mean KL of the token's sequence), all of which is in tokens first .. first + rows.

    NaN for an id that is not one, 0 <= id < tokens.
    """
    own = tl.load(seq_ids_ptr + token)
    kl = tl.zeros((BLOCK_J,), tl.float32)
    members = tl.zeros((BLOCK_J,), tl.float32)
    for start in range(0, rows, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        same = (tl.load(seq_ids_ptr + first + others, mask=others < rows, other=-1) == own) & (others < rows)
        kl += tl.load(terms_ptr + 2 * total + first + others, mask=same, other=0.0)
        members += same.to(tl.float32)
    mean = tl.sum(kl, 0) / tl.sum(members, 0)
    mean = tl.where((own >= 0) & (own < tokens), mean, float("nan"))
    return offset + 2.0 * tl.sigmoid(2.0 * mean) - 1.0


@triton.jit(do_not_specialize=["first", "rows", "total", "tokens", "ignore_index"])
def _linear_nce_dz_kernel(
    logits_ptr,  # (3, rows, stride): the student's, and nat's with PARTS, are overwritten
    bias_ptr,  # (V,) or None
    targets_ptr,  # (total,) int64
    seq_ids_ptr,  # (total,) int64
    stats_ptr,  # (STATS, rows) float32
    terms_ptr,  # (3, total) float32
    losses_ptr,  # (total,) float32, written without PARTS
    first,
    rows,
    total,
    tokens,  # of the call, above every sequence id; total may leave out ignored ones
    V,
    stride,
    alpha,
    tau,
    offset,
    softcap,
    scale,
    ignore_index,
    PARTS: tl.constexpr,
    TAU_IS_1: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Gradients of token first + program_id, times scale, in place of its logits; tau is 1 / temperature.

    With PARTS, hard = p - 1_target replaces the student's logits and soft = p^tau - p_nat^tau replaces nat's; an
    ignored token gets zeros. Without, (1 - alpha) hard + alpha / tau (offset + beta) soft replaces the student's, and
    the token's share of the loss is written; every token counts, and its whole sequence is in the chunk.
    """
    row = tl.program_id(0)
    token = first + row
    own = logits_ptr + tl.cast(row, tl.int64) * stride
    nat = own + tl.cast(rows, tl.int64) * stride
    block = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + token)
    # coefficients
    if PARTS:
        hard = scale
        soft = scale
        if target == ignore_index:
            nothing = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK):
                cols = start + block
                tl.store(own + cols, nothing, mask=cols < stride)
                tl.store(nat + cols, nothing, mask=cols < stride)
            return
    else:
        hard = 1.0 - alpha
        weight = sequence_weight(terms_ptr, seq_ids_ptr, token, first, rows, total, tokens, offset, BLOCK_J)
        soft = weight * (alpha / tau)
        loss = hard * tl.load(terms_ptr + token) + soft / tau * tl.load(terms_ptr + total + token)
        tl.store(losses_ptr + token, loss)
        hard *= scale
        soft *= scale

    hard = tl.where((target >= 0) & (target < V), hard, float("nan"))
    # load the statistics
    stats = stats_ptr + row
    top = tl.load(stats + _TOP * rows)
    norm = tl.load(stats + _NORM * rows)
    norm_soft = tl.load(stats + _NORM_SOFT * rows)
    top_nat = tl.load(stats + _TOP_NAT * rows)
    norm_nat = tl.load(stats + _NORM_NAT_SOFT * rows)
    for start in range(0, V, BLOCK):
        # load
        cols = start + block
        z = load_logits(own, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_nat = load_logits(nat, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        # softmax and its gradient
        p = tl.exp2((z - top) * LOG2_E - norm)
        q = p
        if not TAU_IS_1:
            q = tl.exp2((z - top) * (tau * LOG2_E) - norm_soft)
        q -= tl.exp2((z_nat - top_nat) * (tau * LOG2_E) - norm_nat)
        p = tl.where(cols == target, p - 1.0, p)
        if HAS_SOFTCAP:
            slope = tl.where(cols < V, softcap_slope(z, softcap), 0.0)
            p *= slope
            q *= slope
        # store
        if PARTS:
            tl.store(own + cols, (hard * p).to(logits_ptr.dtype.element_ty), mask=cols < stride)
            tl.store(nat + cols, (soft * q).to(logits_ptr.dtype.element_ty), mask=cols < stride)
        else:
            tl.store(own + cols, (hard * p + soft * q).to(logits_ptr.dtype.element_ty), mask=cols < stride)
