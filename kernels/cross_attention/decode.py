"""Decode kernels of cross_attention: up to 128 queries against many keys, split over programs and then combined.

The query heads of a KV head share tiles, so a tile's keys and values are read once for all of them.
Derivation: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import LN_2, NEG_HUGE
from calm_fast.kernels.common.intervals import key_block_ranges, load_interval
from calm_fast.kernels.cross_attention import parts
from calm_fast.kernels.cross_attention.fwd import attend_blocks


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP", "SPLITS", "SPLIT_KEYS"])
def _cross_attention_decode_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D)
    v_ptr,  # (B, N, H // GROUP, D)
    lo_ptr,  # (B, M) int32 or None
    hi_ptr,  # (B, M) int32 or None
    part_ptr,  # (B, M, H, SPLITS, D) float32; where DIRECT, out (B, M, H, D) itself
    part_lse_ptr,  # (B, H, M, SPLITS) float32, natural log
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    scale_log2,
    M,
    N,
    H,
    GROUP,
    SPLITS,
    SPLIT_KEYS,  # a multiple of BLOCK_N
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a tile: (query, head of the group) pairs
    BLOCK_N: tl.constexpr,
    DIRECT: tl.constexpr,  # a single split: nothing to combine
    EDGES: tl.constexpr,  # mask only the blocks at the edges of the intervals
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of rows of one KV head against SPLIT_KEYS keys: attention over these keys alone, and its lse."""
    tiles = tl.cdiv(M * GROUP, BLOCK_R)
    kv_heads = H // GROUP
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS % tiles
    kv_head = tl.program_id(0) // SPLITS // tiles % kv_heads
    b = (tl.program_id(0) // SPLITS // tiles // kv_heads).to(tl.int64)

    # intervals of the tile's rows
    pair = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = pair // GROUP
    heads = kv_head * GROUP + pair % GROUP
    lo, hi, seen = load_interval(
        lo_ptr + b * stride_lob if HAS_LO else lo_ptr,
        hi_ptr + b * stride_hib if HAS_HI else hi_ptr,
        stride_lom,
        stride_him,
        rows,
        M,
        N,
        HAS_LO,
        HAS_HI,
        CAUSAL,
    )
    # the part of each interval inside this split; from here on this is the forward pass on that part
    lo = tl.maximum(lo, split * SPLIT_KEYS)
    hi = tl.minimum(hi, (split + 1) * SPLIT_KEYS)
    seen = seen & (lo < hi)
    first, full_first, full_last, last = key_block_ranges(lo, hi, seen, N, BLOCK_N, True)

    # load
    cols = tl.arange(0, BLOCK_D)
    inside = rows < M
    row64 = rows.to(tl.int64)
    head64 = heads.to(tl.int64)
    q_ptrs = q_ptr + b * stride_qb + (row64 * stride_qm + head64 * stride_qh)[:, None] + cols[None, :]
    q = (tl.load(q_ptrs, mask=inside[:, None] & (cols < D)[None, :], other=0.0),)  # always one part of columns

    acc = parts.zeros(BLOCK_R, BLOCK_D, 0)
    row_sum = tl.zeros((BLOCK_R,), tl.float32)
    row_max = tl.zeros((BLOCK_R,), tl.float32) + NEG_HUGE
    k_base = k_ptr + b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    # scores, softmax, accumulate
    if EDGES:  # from 64 rows on a mask would cost more time than reading the keys
        if HAS_LO:  # without lower bounds a split begins with a whole block
            acc, row_sum, row_max = attend_blocks(
                acc, row_sum, row_max, q, k_base, v_base, b, kv_head, stride_kn, stride_vn, lo, hi, first, full_first,
                scale_log2, N, D, BLOCK_D, 0, BLOCK_N, True, HAS_LO, False, True, PRECISION, INTERPRET,
            )  # fmt: skip
        acc, row_sum, row_max = attend_blocks(
            acc, row_sum, row_max, q, k_base, v_base, b, kv_head, stride_kn, stride_vn, lo, hi, full_first, full_last,
            scale_log2, N, D, BLOCK_D, 0, BLOCK_N, False, HAS_LO, False, True, PRECISION, INTERPRET,
        )  # fmt: skip
        acc, row_sum, row_max = attend_blocks(
            acc, row_sum, row_max, q, k_base, v_base, b, kv_head, stride_kn, stride_vn, lo, hi, full_last, last,
            scale_log2, N, D, BLOCK_D, 0, BLOCK_N, True, HAS_LO, False, True, PRECISION, INTERPRET,
        )  # fmt: skip
    else:  # reading the keys takes far longer than masking so few rows
        acc, row_sum, row_max = attend_blocks(
            acc, row_sum, row_max, q, k_base, v_base, b, kv_head, stride_kn, stride_vn, lo, hi, first, last,
            scale_log2, N, D, BLOCK_D, 0, BLOCK_N, True, True, False, True, PRECISION, INTERPRET,
        )  # fmt: skip

    # store
    row_sum = tl.where(seen, row_sum, 1.0)
    part = parts.zero_unless(seen[:, None], parts.over(acc, row_sum[:, None]))
    lse = tl.where(seen, (row_max + tl.log2(row_sum)) * LN_2, float("-inf"))
    part_rows = ((b * M + row64) * H + head64) * SPLITS + split
    # a row that sees nothing of the split writes only its lse of -inf: the combine kernel skips the part
    written = inside if DIRECT else inside & seen
    parts.store_rows(part_ptr, part_rows * D, part, written, D)
    tl.store(part_lse_ptr + ((b * H + head64) * M + row64) * SPLITS + split, lse, mask=inside)


@triton.jit(do_not_specialize=["M", "H", "SPLITS"])
def _cross_attention_combine_kernel(
    part_ptr,  # (B, M, H, SPLITS, D) float32; undefined where the lse is -inf
    part_lse_ptr,  # (B, H, M, SPLITS) float32
    out_ptr,  # (B, M, H, D) contiguous
    lse_ptr,  # (B, H, M) float32 contiguous
    M,
    H,
    SPLITS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out = sum_s exp(lse_s) part_s / sum_s exp(lse_s) for one (b, m, h), in the order of the splits."""
    row = tl.program_id(0).to(tl.int64)  # (b * M + m) * H + h
    head = row % H
    lse_row = (row // H // M * H + head) * M + row // H % M  # (b * H + h) * M + m
    cols = tl.arange(0, BLOCK_D)
    splits = tl.arange(0, BLOCK_S)

    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    peak = NEG_HUGE
    for start in tl.range(0, SPLITS, BLOCK_S):
        # load
        s = start + splits
        lse = tl.load(part_lse_ptr + lse_row * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
        present = lse != float("-inf")  # true for NaN, which must survive
        # softmax over the splits
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        weight = tl.exp(lse - new_peak)
        shrink = tl.exp(peak - new_peak)
        # accumulate
        part_ptrs = part_ptr + (row * SPLITS + s)[:, None] * D + cols[None, :]
        part = tl.load(part_ptrs, mask=present[:, None] & (cols < D)[None, :], other=0.0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = new_peak

    # store
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    out = tl.where(seen, acc / total, 0.0)
    lse = tl.where(seen, peak + tl.log(total), float("-inf"))
    tl.store(out_ptr + row * D + cols, out.to(out_ptr.dtype.element_ty), mask=cols < D)
    tl.store(lse_ptr + lse_row, lse)
