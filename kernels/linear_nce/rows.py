"""Row kernels of linear_nce's one-pass training step: from stored logits of a chunk of tokens to their gradients.

One program takes one token. Derivation and arithmetic: docs/ops/linear_nce.md, "On a GPU".
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.vocabulary.tiles import LN_2, LOG2_E

# the logit of a token that a bias of -inf rules out, and of padding: a finite sum of it, times a weight of 0, is 0
_BANNED = tl.constexpr(-1.0e30)

STATS = 5  # rows of `stats`: maximum and log2 of the sum of exponentials; see the constants
_TOP = tl.constexpr(0)
_NORM = tl.constexpr(1)
_NORM_SOFT = tl.constexpr(2)
_TOP_NAT = tl.constexpr(3)
_NORM_NAT_SOFT = tl.constexpr(4)


@triton.jit
def bend(z, bias_ptr, cols, inside, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh((z + bias) / softcap) in float32, finite for a banned token."""
    z = z.to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * (2.0 * tl.sigmoid(z * (2.0 / softcap)) - 1.0)
    elif HAS_BIAS:
        z = tl.where(z < _BANNED, _BANNED, z)  # not maximum: it would swallow NaN
    return z


@triton.jit
def logits(row, cols, bias_ptr, V, stride, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """A block of one token's logits, _BANNED from V on; rows are `stride` apart, so whole vectors can be read."""
    z = tl.load(row + cols, mask=cols < stride, other=0.0)
    inside = cols < V
    return tl.where(inside, bend(z, bias_ptr, cols, inside, softcap, HAS_BIAS, HAS_SOFTCAP), _BANNED)


@triton.jit
def raised(top, z):
    """The running maximum of each lane after (LANES, WIDTH) more logits."""
    return tl.maximum(top, tl.max(z, 1))


@triton.jit
def weights_of(z, old, new, scale_log2):
    """exp(scale (z - new)) of a block, and what sums relative to the `old` maximum are to be multiplied by."""
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
    PLAIN: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Log-sum-exps and means of token first + program_id; tau is 1 / temperature. Zero terms for an ignored token.

    LANES running sums over every LANES-th vector of WIDTH logits, joined in the end: within the loop no thread waits
    for another one.
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

    none = tl.zeros((LANES,), tl.float32)
    top_s, sum_s, sum_q = none + _BANNED, none, none  # q: the student over tau
    top_p, sum_p, sum_r = none + _BANNED, none, none  # r: nat over tau
    top_n, sum_n = none + _BANNED, none
    mean_r, mean_n = none, none
    for start in range(0, V, LANES * WIDTH):
        cols = start + block
        z_s = logits(own, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_p = logits(own + plane, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_n = logits(own + 2 * plane, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)

        new = raised(top_s, z_s)
        w, shrink = weights_of(z_s, top_s, new, LOG2_E)
        sum_s = sum_s * shrink + tl.sum(w, 1)
        if not PLAIN:
            w, shrink = weights_of(z_s, top_s, new, tau * LOG2_E)
            sum_q = sum_q * shrink + tl.sum(w, 1)
        top_s = new

        new = raised(top_p, z_p)
        w, shrink = weights_of(z_p, top_p, new, LOG2_E)
        sum_p = sum_p * shrink + tl.sum(w, 1)
        if not PLAIN:
            w, shrink = weights_of(z_p, top_p, new, tau * LOG2_E)
            sum_r = sum_r * shrink + tl.sum(w, 1)
        mean_r = mean_r * shrink + tl.sum(w * z_s, 1)
        top_p = new

        new = raised(top_n, z_n)
        w, shrink = weights_of(z_n, top_n, new, LOG2_E)
        sum_n = sum_n * shrink + tl.sum(w, 1)
        mean_n = mean_n * shrink + tl.sum(w * (z_n - z_p), 1)
        top_n = new

    most_s, most_p, most_n = tl.max(top_s, 0), tl.max(top_p, 0), tl.max(top_n, 0)
    shrink_s = tl.exp2((top_s - most_s) * LOG2_E)
    shrink_p = tl.exp2((top_p - most_p) * LOG2_E)
    shrink_n = tl.exp2((top_n - most_n) * LOG2_E)
    norm_s = tl.log2(tl.sum(sum_s * shrink_s, 0))
    norm_p = tl.log2(tl.sum(sum_p * shrink_p, 0))
    all_n = tl.sum(sum_n * shrink_n, 0)
    if PLAIN:
        norm_q = norm_s
        norm_r = norm_p
        mean = tl.sum(mean_r * shrink_p, 0) / tl.sum(sum_p * shrink_p, 0)
    else:
        shrink_r = tl.exp2((top_p - most_p) * (tau * LOG2_E))
        all_r = tl.sum(sum_r * shrink_r, 0)
        norm_q = tl.log2(tl.sum(sum_q * tl.exp2((top_s - most_s) * (tau * LOG2_E)), 0))
        norm_r = tl.log2(all_r)
        mean = tl.sum(mean_r * shrink_r, 0) / all_r

    known = (target >= 0) & (target < V)
    z = tl.load(own + target, mask=known, other=0.0)
    z = bend(z, bias_ptr, target, known, softcap, HAS_BIAS, HAS_SOFTCAP)
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
def calibration(terms_ptr, seq_ids_ptr, token, first, rows, total, offset, BLOCK_J: tl.constexpr):
    """offset + tanh(mean KL of the token's sequence), all of it among tokens first .. first + rows."""
    own = tl.load(seq_ids_ptr + token)
    kl = tl.zeros((BLOCK_J,), tl.float32)
    members = tl.zeros((BLOCK_J,), tl.float32)
    for start in range(0, rows, BLOCK_J):
        others = start + tl.arange(0, BLOCK_J)
        same = tl.load(seq_ids_ptr + first + others, mask=others < rows, other=-1) == own
        kl += tl.load(terms_ptr + 2 * total + first + others, mask=same & (others < rows), other=0.0)
        members += same.to(tl.float32)
    mean = tl.sum(kl, 0) / tl.sum(members, 0)
    return offset + 2.0 * tl.sigmoid(2.0 * mean) - 1.0


@triton.jit(do_not_specialize=["first", "rows", "total", "ignore_index"])
def _linear_nce_dz_kernel(
    logits_ptr,  # (3, rows, stride): student's and, with PARTS, nat's are overwritten
    bias_ptr,  # (V,) or None
    targets_ptr,  # (total,) int64
    seq_ids_ptr,  # (total,) int64
    stats_ptr,  # (STATS, rows) float32
    terms_ptr,  # (3, total) float32
    losses_ptr,  # (total,) float32, without PARTS
    first,
    rows,
    total,
    V,
    stride,
    alpha,
    tau,
    offset,
    softcap,
    scale,
    ignore_index,
    PARTS: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Gradients of token first + program_id, times scale, in place of its logits; tau is 1 / temperature.

    PARTS: hard = p - 1_target over the student's and soft = p^tau - p_nat^tau over nat's, zeros for an ignored token.
    Else: (1 - alpha) hard + alpha / tau (offset + beta) soft over the student's, and the token's share of the loss;
    every token counts, and its whole sequence is in the chunk.
    """
    row = tl.program_id(0)
    token = first + row
    own = logits_ptr + tl.cast(row, tl.int64) * stride
    nat = own + tl.cast(rows, tl.int64) * stride
    block = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + token)
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
        soft = calibration(terms_ptr, seq_ids_ptr, token, first, rows, total, offset, BLOCK_J) * (alpha / tau)
        loss = hard * tl.load(terms_ptr + token) + soft / tau * tl.load(terms_ptr + total + token)
        tl.store(losses_ptr + token, loss)
        hard *= scale
        soft *= scale

    stats = stats_ptr + row
    top = tl.load(stats + _TOP * rows)
    norm = tl.load(stats + _NORM * rows)
    norm_soft = tl.load(stats + _NORM_SOFT * rows)
    top_nat = tl.load(stats + _TOP_NAT * rows)
    norm_nat = tl.load(stats + _NORM_NAT_SOFT * rows)
    for start in range(0, V, BLOCK):
        cols = start + block
        z = logits(own, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_nat = logits(nat, cols, bias_ptr, V, stride, softcap, HAS_BIAS, HAS_SOFTCAP)
        p = tl.exp2((z - top) * LOG2_E - norm)
        q = p
        if not PLAIN:
            q = tl.exp2((z - top) * (tau * LOG2_E) - norm_soft)
        q -= tl.exp2((z_nat - top_nat) * (tau * LOG2_E) - norm_nat)
        p = tl.where(cols == target, p - 1.0, p)
        if HAS_SOFTCAP:
            bent = z / softcap
            slope = tl.where(cols < V, 1.0 - bent * bent, 0.0)
            p *= slope
            q *= slope
        if PARTS:
            tl.store(own + cols, (hard * p).to(logits_ptr.dtype.element_ty), mask=cols < stride)
            tl.store(nat + cols, (soft * q).to(logits_ptr.dtype.element_ty), mask=cols < stride)
        else:
            tl.store(own + cols, (hard * p + soft * q).to(logits_ptr.dtype.element_ty), mask=cols < stride)
