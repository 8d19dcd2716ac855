"""Backward kernels of cross_attention that go by keys: the queries that each key block visits, then dk and dv.

There are no atomics, so the gradients have the same bits every time. Derivation: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.arithmetic import matmul, matmul_add
from calm_fast.kernels.common.intervals import finite_or_zero, load_interval, load_rows, sees


@triton.jit(do_not_specialize=["M", "N"])
def _cross_attention_query_ranges_kernel(
    lo_ptr,  # (B, M) int32 or None
    hi_ptr,  # (B, M) int32 or None
    ranges_ptr,  # (B, cdiv(N, BLOCK_N), 4) int32, written, in rows: first, full_first, full_last, last
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,  # query tiles that one step looks at
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
):
    """The query tiles that a key block visits: tiles outside [first, last) see none of it.

    [full_first, full_last) is the first run of tiles whose rows all see the whole block (for monotone intervals there
    is only one). These tiles need no mask. A row that sees nothing ends the run, because it may hold NaN. All other
    visited tiles are masked, so any intervals are handled correctly.
    """
    key_block = tl.program_id(0) % tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tl.cdiv(N, BLOCK_N)).to(tl.int64)
    key_first = key_block * BLOCK_N
    key_last = tl.minimum(key_first + BLOCK_N, N)
    tiles = tl.cdiv(M, BLOCK_M)

    first = tiles
    last = tiles * 0
    run_first = tiles  # the run [run_first, run_last) of full tiles, found in one pass from left to right
    run_last = tiles
    for start in tl.range(0, tiles, TILES):
        # load the intervals of TILES tiles
        tile = start + tl.arange(0, TILES)
        rows = tile[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
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
            False,
        )
        # touched: some row sees a key of the block; broken: some row misses a key of it
        touched = tl.max((seen & (lo < key_last) & (hi > key_first)).to(tl.int32), 1) > 0
        missing = (seen == 0) | (lo > key_first) | (hi < key_last)
        broken = tl.max(((rows < M) & missing).to(tl.int32), 1) > 0
        first = tl.minimum(first, tl.min(tl.where(touched, tile, tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(touched, tile + 1, 0), 0))
        run_first = tl.minimum(run_first, tl.min(tl.where(touched & (broken == 0), tile, tiles), 0))
        run_last = tl.minimum(run_last, tl.min(tl.where(broken & (tile > run_first), tile, tiles), 0))

    # store
    first = tl.minimum(first, last)
    run_first = tl.minimum(run_first, last)
    run_last = tl.maximum(tl.minimum(run_last, last), run_first)
    at = ranges_ptr + tl.program_id(0) * 4
    tl.store(at, first * BLOCK_M)
    tl.store(at + 1, run_first * BLOCK_M)
    tl.store(at + 2, run_last * BLOCK_M)
    tl.store(at + 3, last * BLOCK_M)


@triton.jit
def _collect_key_grads(
    dk,
    dv,
    k,
    v,
    q_base,
    dout_base,
    lse2_base,
    delta_base,
    lo_ptr,
    hi_ptr,
    stride_qm,
    stride_qh,
    stride_gm,
    stride_gh,
    stride_lom,
    stride_him,
    key_first,
    first,
    gap_first,
    gap_last,
    last,
    scale_log2,
    M,
    N,
    GROUP,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add to dk and dv (both still without the scale) of one key block the query tiles outside the gap.

    The loop visits rows [first, gap_first) and [gap_last, last) of every head of the group. A loop per head or per
    side would fill the load pipeline again, and would cost registers that this kernel does not have.
    """
    left = (gap_first - first) // BLOCK_M
    tiles = left + (last - gap_last) // BLOCK_M
    for step in tl.range(0, tiles * GROUP):
        head = (step // tiles).to(tl.int64)
        tile = step % tiles
        start = tl.where(tile < left, first, gap_last - left * BLOCK_M) + tile * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < M
        # load: rows beyond M get +inf and drop out like rows that see nothing
        lse2 = tl.load(lse2_base + head * M + rows, mask=inside, other=float("inf"))
        delta = tl.load(delta_base + head * M + rows, mask=inside, other=0.0)
        q = load_rows(q_base + head * stride_qh, start, stride_qm, M, D, BLOCK_M, BLOCK_D, True)
        dout = load_rows(dout_base + head * stride_gh, start, stride_gm, M, D, BLOCK_M, BLOCK_D, True)
        if MASKED:  # a row that is not finite has p NaN; here it would also reach the keys that it does not see
            q = finite_or_zero(q)
            dout = finite_or_zero(dout)
        # scores, softmax: transposed, (keys, queries), so that p and ds feed their products straight from registers
        p = tl.exp2(matmul(k, tl.trans(q), PRECISION, INTERPRET) * scale_log2 - lse2[None, :])
        if MASKED:
            lo, hi, seen = load_interval(lo_ptr, hi_ptr, stride_lom, stride_him, rows, M, N, HAS_LO, HAS_HI, CAUSAL)
            keys = key_first + tl.arange(0, BLOCK_N)
            p = tl.where(sees(lo[None, :], hi[None, :], keys[:, None], HAS_LO) & seen[None, :], p, 0.0)
        # accumulate
        dv = matmul_add(p.to(dout.dtype), dout, dv, PRECISION, INTERPRET)
        dp = matmul(v, tl.trans(dout), PRECISION, INTERPRET)
        ds = p * (dp - delta[None, :])
        dk = matmul_add(ds.to(q.dtype), q, dk, PRECISION, INTERPRET)
    return dk, dv


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def _cross_attention_bwd_dkdv_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D)
    v_ptr,  # (B, N, H // GROUP, D)
    dout_ptr,  # (B, M, H, D)
    lse2_ptr,  # (B, H, M) float32
    delta_ptr,  # (B, H, M) float32
    lo_ptr,  # (B, M) int32 or None
    hi_ptr,  # (B, M) int32 or None
    ranges_ptr,  # (B, cdiv(N, BLOCK_N), 4) int32, or None without intervals
    dk_ptr,  # (B, N, H // GROUP, D) contiguous
    dv_ptr,  # (B, N, H // GROUP, D) contiguous
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gm,
    stride_gh,
    stride_lob,
    stride_lom,
    stride_hib,
    stride_him,
    scale,
    scale_log2,
    M,
    N,
    H,
    GROUP,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dk and dv of one block of keys of one KV head."""
    key_blocks = tl.cdiv(N, BLOCK_N)
    kv_heads = H // GROUP
    key_block = tl.program_id(0) % key_blocks
    kv_head = tl.program_id(0) // key_blocks % kv_heads
    b = (tl.program_id(0) // key_blocks // kv_heads).to(tl.int64)
    key_first = key_block * BLOCK_N
    kv_head64 = kv_head.to(tl.int64)

    # the query tiles to visit
    if HAS_LO or HAS_HI:
        at = ranges_ptr + (b * key_blocks + key_block) * 4
        first = tl.load(at)
        full_first = tl.load(at + 1)
        full_last = tl.load(at + 2)
        last = tl.load(at + 3)
    elif CAUSAL:  # row i sees the keys j <= i + N - M
        last = tl.cdiv(M, BLOCK_M) * BLOCK_M
        first = tl.minimum(tl.maximum(key_first - (N - M), 0) // BLOCK_M * BLOCK_M, last)
        # the first row that sees the whole block
        whole = tl.maximum(tl.minimum(key_first + BLOCK_N, N) - 1 - (N - M), 0)
        full_first = tl.minimum(tl.cdiv(whole, BLOCK_M) * BLOCK_M, last)
        full_last = last
    else:
        last = tl.cdiv(M, BLOCK_M) * BLOCK_M
        first = last * 0
        full_first = first
        full_last = last

    # load
    k_base = k_ptr + b * stride_kb + kv_head64 * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head64 * stride_vh
    k = load_rows(k_base, key_first, stride_kn, N, D, BLOCK_N, BLOCK_D, True)
    # who sees a value that is not finite has p NaN; for the others p is 0, and 0 * NaN would be NaN
    v = finite_or_zero(load_rows(v_base, key_first, stride_vn, N, D, BLOCK_N, BLOCK_D, True))
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    lo_base = lo_ptr + b * stride_lob if HAS_LO else lo_ptr
    hi_base = hi_ptr + b * stride_hib if HAS_HI else hi_ptr

    # scores, softmax, accumulate: the tiles that need a mask, then those that do not
    head64 = kv_head64 * GROUP  # the first query head of the group
    q_base = q_ptr + b * stride_qb + head64 * stride_qh
    dout_base = dout_ptr + b * stride_gb + head64 * stride_gh
    lse2_base = lse2_ptr + (b * H + head64) * M
    delta_base = delta_ptr + (b * H + head64) * M
    if HAS_LO or HAS_HI or CAUSAL:
        dk, dv = _collect_key_grads(
            dk, dv, k, v, q_base, dout_base, lse2_base, delta_base, lo_base, hi_base, stride_qm, stride_qh,
            stride_gm, stride_gh, stride_lom, stride_him, key_first, first, full_first, full_last, last,
            scale_log2, M, N, GROUP,
            D, BLOCK_D, BLOCK_M, BLOCK_N, True, HAS_LO, HAS_HI, CAUSAL, PRECISION, INTERPRET,
        )  # fmt: skip
    dk, dv = _collect_key_grads(
        dk, dv, k, v, q_base, dout_base, lse2_base, delta_base, lo_base, hi_base, stride_qm, stride_qh,
        stride_gm, stride_gh, stride_lom, stride_him, key_first, full_first, full_last, full_last, full_last,
        scale_log2, M, N, GROUP,
        D, BLOCK_D, BLOCK_M, BLOCK_N, False, HAS_LO, HAS_HI, CAUSAL, PRECISION, INTERPRET,
    )  # fmt: skip

    # store
    keys = key_first + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (keys < N)[:, None] & (cols < D)[None, :]
    tile = (b * N + key_first) * kv_heads * D + kv_head64 * D
    offsets = tl.arange(0, BLOCK_N)[:, None] * (kv_heads * D) + cols[None, :]
    tl.store(dk_ptr + tile + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + tile + offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)
