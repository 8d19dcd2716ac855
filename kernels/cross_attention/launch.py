"""Launchers of the forward kernels of cross_attention: prefill and decode.

The public op (calm_fast.ops.cross_attention) has validated the arguments. The launchers give tensors strides that the
kernels can address, choose configs, and start kernels on the tensors' device and its current stream.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common import hardware
from calm_fast.kernels.common.config_table import ConfigTable, padded
from calm_fast.kernels.common.launching import describable, launch
from calm_fast.kernels.cross_attention.configs import (
    BOX_TARGETS,
    COMBINE,
    DECODE,
    FWD,
    FWD_POINTERS,
    PACKED_64,
    PACKED_128,
    PACKED_MAX_D,
    AttentionConfig,
    DecodeConfig,
    packed_config,
    searches,
)
from calm_fast.kernels.cross_attention.decode import _cross_attention_combine_kernel, _cross_attention_decode_kernel
from calm_fast.kernels.cross_attention.fwd import _cross_attention_fwd_kernel
from calm_fast.kernels.cross_attention.problem import NO_BOXES, Problem, boxes_of, make_problem

__all__ = ["launch_cross_attention_fwd"]

# The decode kernel takes calls of at most _PACKED_M queries. Up to _DECODE_ROWS rows (query, head of the group) of a KV
# head are tiles of 16, more are tiles of 64 or 128; see `_config`.
_DECODE_ROWS = 32
_PACKED_M = 128
_DECODE_M, _DECODE_ROWS_WIDE = 16, 64  # the limits where there are no tiles for packed rows


def launch_cross_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
    config: AttentionConfig | DecodeConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interval attention and its log-sum-exp, by the forward kernel or, up to 128 queries, the decode kernel.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j over lo_i <= j < hi_i

    Args:
        q: (B, M, H, D) float32, bfloat16 or float16, any strides.
        k, v: (B, N, Hkv, D), q's dtype.
        lo, hi: (B, M) int32 or None (0 and N). Values outside 0..N are clamped.
        causal: hi_i = i + 1 + N - M.
        scale: positive.
        config: launch config; a DecodeConfig runs the decode kernel. None chooses one.
    Returns:
        out (B, M, H, D) in q's dtype and lse (B, H, M) float32, both contiguous. A row that sees nothing has 0 and
        -inf.
    Raises:
        ValueError: the head dim is above 256 or the scale is not positive.

    Deterministic. Without `config`, a row's bits do not depend on the batch size or on keys to the right of its
    interval. They do depend on M, H and Hkv and, up to 128 queries, on the GPU's number of multiprocessors.
    """
    p = make_problem(q, k, v, lo, hi, causal, scale)
    batch, m, n, heads, kv_heads, d = p.sizes
    out = torch.empty((batch, m, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, m), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or n == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if config is None:
        config = _config(p)
    if isinstance(config, DecodeConfig):
        _launch_decode(p, out, lse, config)
        return out, lse
    boxes, search, _ = _forward_form(p)
    parts = p.column_parts("fwd")
    launch(
        _cross_attention_fwd_kernel,
        triton.cdiv(m, config.block_m) * heads * batch,
        q.device,
        config,
        *(p.q, p.k, p.v),
        *(box for t in (p.k, p.v) for box in (boxes_of(t, config.block_n, parts) if boxes else NO_BOXES)),
        *(lo, hi, out, lse),
        *p.strides,
        *p.interval_strides,
        BLOCK_D=parts[0],
        REST_D=parts[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BOXES=boxes,
        SEARCH=search,
        **p.scalars(),
        **p.constants(),
    )
    return out, lse


def _config(p: Problem) -> AttentionConfig | DecodeConfig:
    """Return the launch config, and with it the kernel, of a call. The batch size and N have no say."""
    _, m, _, heads, kv_heads, d = p.sizes
    rows = m * (heads // kv_heads)
    wide_tiles = p.q.dtype != torch.float32 and d <= PACKED_MAX_D
    if rows <= _DECODE_ROWS or (not wide_tiles and (m <= _DECODE_M or rows <= _DECODE_ROWS_WIDE)):
        return p.config(DECODE)
    if m > _PACKED_M or d > PACKED_MAX_D:
        return p.config(_forward_form(p)[2])
    tile = p.config(PACKED_64 if rows <= 64 else PACKED_128, measured=False)
    if p.interpreted:
        return tile
    tiles = triton.cdiv(rows, tile.block_r) * kv_heads
    return packed_config(tile, tiles, hardware.gpu(p.q.device).multiprocessors)


def _forward_form(p: Problem) -> tuple[bool, bool, ConfigTable[int, AttentionConfig]]:
    """Return BOXES and SEARCH of the forward kernel for a call, and the table of its configs."""
    search = searches(p.target, p.q.dtype)
    if p.target not in BOX_TARGETS:
        return False, search, FWD
    boxes = describable(p.k) and describable(p.v)
    return boxes, search, FWD if boxes else FWD_POINTERS


def _launch_decode(p: Problem, out: torch.Tensor, lse: torch.Tensor, config: DecodeConfig) -> None:
    """Fill out and lse: split the keys over programs, then combine the splits."""
    batch, m, n, heads, kv_heads, d = p.sizes
    splits = triton.cdiv(n, config.split_keys)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty((batch, m, heads, splits, d), dtype=torch.float32, device=out.device)
        part_lse = torch.empty((batch, heads, m, splits), dtype=torch.float32, device=out.device)
    launch(
        _cross_attention_decode_kernel,
        splits * triton.cdiv(m * (heads // kv_heads), config.block_r) * kv_heads * batch,
        out.device,
        config,
        *(p.q, p.k, p.v, p.lo, p.hi, part, part_lse),
        *p.strides,
        *p.interval_strides,
        SPLITS=splits,
        BLOCK_D=padded(d),
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        SPLIT_KEYS=config.split_keys,
        DIRECT=splits == 1,
        EDGES=config.mask_edges_only,
        **p.scalars(),
        **p.constants(),
    )
    if splits > 1:
        launch(
            _cross_attention_combine_kernel,
            batch * m * heads,
            out.device,
            COMBINE,
            *(part, part_lse, out, lse),
            M=m,
            H=heads,
            SPLITS=splits,
            D=d,
            BLOCK_D=padded(d),
            BLOCK_S=COMBINE.block_s,
        )
