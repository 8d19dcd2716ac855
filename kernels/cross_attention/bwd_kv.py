"""Backward kernels of cross_attention that go by keys: the queries that each key block visits, then dk and dv.

There are no atomics, so the gradients have the same bits every time. Derivation: docs/ops/cross_attention.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from calm_fast.kernels.common.intervals import load_interval
from calm_fast.kernels.cross_attention import parts
from calm_fast.kernels.cross_attention.parts import load_boxes, load_parts


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
def _hide(
    ds,
    lo_ptr,
    hi_ptr,
    stride_lom,
    stride_him,
    start,
    key_first,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Return ds (BLOCK_M, BLOCK_N) with 0 where a row does not see the key: anything may stand there, NaN too.

    Keys beyond N and rows beyond M need no mask: nobody stores the former, the latter have p 0.
    """
    # all run-time numbers on the side of the rows, of which a thread has two
    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)[None, :]
    if CAUSAL:
        ds = tl.where(keys <= (rows + (start + (N - M) - key_first))[:, None], ds, 0.0)
    if HAS_LO:
        lo = tl.load(lo_ptr + (start + rows).to(tl.int64) * stride_lom, mask=rows < M - start, other=0) - key_first
        ds = tl.where(keys >= lo[:, None], ds, 0.0)
    if HAS_HI:
        hi = tl.load(hi_ptr + (start + rows).to(tl.int64) * stride_him, mask=rows < M - start, other=0) - key_first
        ds = tl.where(keys < hi[:, None], ds, 0.0)
    return ds


@triton.jit
def _collect_key_grads(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    q_boxes,
    q_rest,
    dout_boxes,
    dout_rest,
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
    b,
    first_head,
    key_first,
    first,
    gap_first,
    gap_last,
    last,
    scale_log2,
    M,
    N,
    GROUP,
    ROWS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    BOXES: tl.constexpr,
    REPAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """Add to dk and dv (both still without the scale) of one key block the query tiles outside the gap.

    The loop visits rows [first, gap_first) and [gap_last, last) of every head of the group. A loop per head or per
    side would fill the load pipeline again, and would cost registers that this kernel does not have.
    """
    # Scores are (keys, queries), so that p and ds feed their products straight from registers. dk alone is for wide
    # heads, whose accumulator takes half of the registers: there they are (queries, keys), because then a thread has
    # two rows, and so two numbers of lse2 and of delta, not 16. ds is turned on its way to the product.
    ROWS_FIRST: tl.constexpr = not HAS_DV
    ROW_AXIS: tl.constexpr = 1 if ROWS_FIRST else 0  # the axis that a vector of rows lacks
    # One loop over [first, last) with a branch around the mask: two loops take more registers than there are.
    BRANCH: tl.constexpr = MASKED and ROWS_FIRST
    GAP: tl.constexpr = MASKED and (HAS_LO or HAS_HI) and not BRANCH  # causal: all masked tiles come first
    begin = first
    tiles = ((last if BRANCH else gap_first) - first) // BLOCK_M
    if GAP:
        begin = tl.where(first < gap_first, first, gap_last)
        tiles += (last - gap_last) // BLOCK_M
    # A loop that may run zero times sets the accumulators by moves on that edge; ptxas then serialises all its wgmma.
    if tiles > 0:
        head = begin * 0
        start = begin
        for _ in tl.range(0, tiles * GROUP):
            # load: rows beyond M have lse2 +inf and drop out like rows that see nothing
            rows = start + tl.arange(0, BLOCK_M)
            terms = head * ROWS  # 32-bit: 2**31 rows of a group would be 8 GiB of lse2 alone
            lse2 = tl.load(lse2_base + terms + rows)
            if BOXES:
                q = load_boxes(q_boxes, q_rest, b, first_head + head, start, BLOCK_M, BLOCK_D, REST_D)
                dout = load_boxes(dout_boxes, dout_rest, b, first_head + head, start, BLOCK_M, BLOCK_D, REST_D)
            else:
                q_base = q_ptr + head.to(tl.int64) * stride_qh
                dout_base = dout_ptr + head.to(tl.int64) * stride_gh
                q = load_parts(q_base, start, stride_qm, M, D, BLOCK_M, BLOCK_D, REST_D, True)
                dout = load_parts(dout_base, start, stride_gm, M, D, BLOCK_M, BLOCK_D, REST_D, True)
            if REPAIR:  # a row that is not finite has p NaN; here it would also reach the keys that it does not see
                q = parts.finite(q)
                dout = parts.finite(dout)
            # scores, softmax
            if ROWS_FIRST:
                scores = parts.dot_rows(q, k, PRECISION, INTERPRET)
            else:
                scores = parts.dot_rows(k, q, PRECISION, INTERPRET)
            p = tl.exp2(scores * scale_log2 - tl.expand_dims(lse2, ROW_AXIS))
            # keys beyond N and rows beyond M need no mask: nobody stores the former, the latter have p 0
            if MASKED and not BRANCH:
                keys = key_first + tl.arange(0, BLOCK_N)
                if CAUSAL:  # all run-time numbers on the side of the keys, which have two registers, not 16
                    p = tl.where((keys - (start + (N - M)))[:, None] <= tl.arange(0, BLOCK_M)[None, :], p, 0.0)
                if HAS_LO:
                    at = lo_ptr + start.to(tl.int64) * stride_lom + tl.arange(0, BLOCK_M) * stride_lom
                    lo = tl.load(at, mask=tl.arange(0, BLOCK_M) < M - start, other=0)
                    p = tl.where(keys[:, None] >= lo[None, :], p, 0.0)
                if HAS_HI:
                    at = hi_ptr + start.to(tl.int64) * stride_him + tl.arange(0, BLOCK_M) * stride_him
                    hi = tl.load(at, mask=tl.arange(0, BLOCK_M) < M - start, other=0)
                    p = tl.where(keys[:, None] < hi[None, :], p, 0.0)
            # accumulate
            if HAS_DV:
                dv = parts.add_product(dv, p.to(dout[0].dtype), dout, PRECISION, INTERPRET)
            if HAS_DK:
                if ROWS_FIRST:
                    dp = parts.dot_rows(dout, v, PRECISION, INTERPRET)
                else:
                    dp = parts.dot_rows(v, dout, PRECISION, INTERPRET)
                # loaded here, not above: registers that would be held through the products above
                delta = tl.load(delta_base + terms + rows)
                ds = p * (dp - tl.expand_dims(delta, ROW_AXIS))
                if BRANCH:
                    if (start < gap_first) | (start >= gap_last):
                        ds = _hide(
                            ds, lo_ptr, hi_ptr, stride_lom, stride_him, start, key_first, M, N,
                            BLOCK_M, BLOCK_N, HAS_LO, HAS_HI, CAUSAL,
                        )  # fmt: skip
                elif MASKED:  # a hidden value may be NaN. To make v itself finite would take v through registers
                    ds = tl.where(p == 0.0, 0.0, ds)
                ds = ds.to(q[0].dtype)
                if ROWS_FIRST:
                    ds = tl.trans(ds)
                dk = parts.add_product(dk, ds, q, PRECISION, INTERPRET)
            # the next tile, the next head behind the last tile: divisions of the step would cost 60 instructions
            start += BLOCK_M
            if GAP:
                start = tl.where(start == gap_first, gap_last, start)
                end = start == last
            else:
                end = start == (last if BRANCH else gap_first)
            if end:  # a branch: as a selection it cost registers that spilled in Triton 3.6
                head += 1
                start = begin
    return dk, dv


@triton.jit(do_not_specialize=["M", "N", "H", "GROUP"])
def _cross_attention_bwd_dkdv_kernel(
    q_ptr,  # (B, M, H, D)
    k_ptr,  # (B, N, H // GROUP, D)
    v_ptr,  # (B, N, H // GROUP, D)
    dout_ptr,  # (B, M, H, D)
    q_boxes,  # tensor descriptor of q as (B, H, M, D) in boxes (1, 1, BLOCK_M, BLOCK_D), or None
    q_rest,  # the same with boxes of REST_D columns, or None
    dout_boxes,  # the same two of dout
    dout_rest,
    lse2_ptr,  # (B, H, ROWS) float32
    delta_ptr,  # (B, H, ROWS) float32
    lo_ptr,  # (B, M) int32 or None
    hi_ptr,  # (B, M) int32 or None
    ranges_ptr,  # (B, cdiv(N, BLOCK_N), 4) int32; None without intervals and in a repair
    poison_ptr,  # (B, H, POISON_TILES) int32, not 0: some row of q or dout is not finite; None except in a repair
    dk_ptr,  # (B, N, H // GROUP, D) contiguous, or None
    dv_ptr,  # (B, N, H // GROUP, D) contiguous, or None
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
    ROWS,
    POISON_TILES,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    HAS_HI: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    BOXES: tl.constexpr,
    REPAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dk and dv, or one of them, of one block of keys of one KV head.

    REPAIR: only of a KV head with a row of q or dout that is not finite: it must not reach keys that it does not see.
    """
    key_blocks = tl.cdiv(N, BLOCK_N)
    kv_heads = H // GROUP
    key_block = tl.program_id(0) % key_blocks
    kv_head = tl.program_id(0) // key_blocks % kv_heads
    b32 = tl.program_id(0) // key_blocks // kv_heads
    b = b32.to(tl.int64)
    key_first = key_block * BLOCK_N
    kv_head64 = kv_head.to(tl.int64)
    head64 = kv_head64 * GROUP  # the first query head of the group

    # the query tiles to visit
    last = tl.cdiv(M, BLOCK_M) * BLOCK_M
    first = last * 0
    full_first = first
    full_last = last
    if REPAIR:
        poison = tl.zeros((256,), tl.int32)
        for start in tl.range(0, GROUP * POISON_TILES, 256):
            flags = start + tl.arange(0, 256)
            at = poison_ptr + (b * H + head64) * POISON_TILES + flags
            poison = poison | tl.load(at, mask=flags < GROUP * POISON_TILES, other=0)
        if tl.max(poison, 0) == 0:
            return
        full_first = last  # all are masked
    elif HAS_LO or HAS_HI:  # known multiples, as below: loads at `start` are wide only if it is one
        at = ranges_ptr + (b * key_blocks + key_block) * 4
        first = tl.multiple_of(tl.load(at), BLOCK_M)
        full_first = tl.multiple_of(tl.load(at + 1), BLOCK_M)
        full_last = tl.multiple_of(tl.load(at + 2), BLOCK_M)
        last = tl.multiple_of(tl.load(at + 3), BLOCK_M)
    elif CAUSAL:  # row i sees the keys j <= i + N - M
        first = tl.minimum(tl.maximum(key_first - (N - M), 0) // BLOCK_M * BLOCK_M, last)
        # the first row that sees the whole block
        whole = tl.maximum(tl.minimum(key_first + BLOCK_N, N) - 1 - (N - M), 0)
        full_first = tl.minimum(tl.cdiv(whole, BLOCK_M) * BLOCK_M, last)

    # load: k and v by pointers, once; as 4-dimensional boxes Triton would hold them in registers
    k_base = k_ptr + b * stride_kb + kv_head64 * stride_kh
    v_base = v_ptr + b * stride_vb + kv_head64 * stride_vh
    k = load_parts(k_base, key_first, stride_kn, N, D, BLOCK_N, BLOCK_D, REST_D, True)
    v = k  # not read without dk
    if HAS_DK:
        v = load_parts(v_base, key_first, stride_vn, N, D, BLOCK_N, BLOCK_D, REST_D, True)
    dk = parts.zeros(BLOCK_N, BLOCK_D, REST_D)
    dv = parts.zeros(BLOCK_N, BLOCK_D, REST_D)
    lo_base = lo_ptr + b * stride_lob if HAS_LO else lo_ptr
    hi_base = hi_ptr + b * stride_hib if HAS_HI else hi_ptr

    # scores, softmax, accumulate: the tiles that need a mask, then those that do not
    q_base = q_ptr + b * stride_qb + head64 * stride_qh
    dout_base = dout_ptr + b * stride_gb + head64 * stride_gh
    lse2_base = lse2_ptr + (b * H + head64) * ROWS
    delta_base = delta_ptr + (b * H + head64) * ROWS
    if HAS_LO or HAS_HI or CAUSAL:
        dk, dv = _collect_key_grads(
            dk, dv, k, v, q_base, dout_base, q_boxes, q_rest, dout_boxes, dout_rest,
            lse2_base, delta_base, lo_base, hi_base,
            stride_qm, stride_qh, stride_gm, stride_gh, stride_lom, stride_him, b32, kv_head * GROUP,
            key_first, first, full_first, full_last, last, scale_log2, M, N, GROUP, ROWS,
            D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, True, HAS_LO, HAS_HI, CAUSAL, HAS_DK, HAS_DV, BOXES, REPAIR,
            PRECISION, INTERPRET,
        )  # fmt: skip
    if not REPAIR and (HAS_DV or not (HAS_LO or HAS_HI or CAUSAL)):
        dk, dv = _collect_key_grads(
            dk, dv, k, v, q_base, dout_base, q_boxes, q_rest, dout_boxes, dout_rest,
            lse2_base, delta_base, lo_base, hi_base,
            stride_qm, stride_qh, stride_gm, stride_gh, stride_lom, stride_him, b32, kv_head * GROUP,
            key_first, full_first, full_last, full_last, full_last, scale_log2, M, N, GROUP, ROWS,
            D, BLOCK_D, REST_D, BLOCK_M, BLOCK_N, False, HAS_LO, HAS_HI, CAUSAL, HAS_DK, HAS_DV, BOXES, REPAIR,
            PRECISION, INTERPRET,
        )  # fmt: skip

    # store
    inside = key_first + tl.arange(0, BLOCK_N) < N
    tile = (b * N + key_first) * kv_heads * D + kv_head64 * D
    offsets = tl.arange(0, BLOCK_N) * (kv_heads * D)
    if HAS_DK:
        parts.store_rows(dk_ptr + tile, offsets, parts.times(dk, scale), inside, D)
    if HAS_DV:
        parts.store_rows(dv_ptr + tile, offsets, dv, inside, D)
