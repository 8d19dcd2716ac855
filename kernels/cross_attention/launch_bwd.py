"""Launchers of the backward kernels of cross_attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

from calm_fast.kernels.common import hardware
from calm_fast.kernels.common.config_table import padded
from calm_fast.kernels.common.launching import addressable, describable, launch
from calm_fast.kernels.cross_attention.bwd_kv import (
    _cross_attention_bwd_dkdv_kernel,
    _cross_attention_query_ranges_kernel,
)
from calm_fast.kernels.cross_attention.bwd_q import _cross_attention_bwd_dq_kernel, _cross_attention_bwd_rows_kernel
from calm_fast.kernels.cross_attention.configs import (
    BOX_TARGETS,
    DKDV,
    DQ,
    DQ_BOX_TARGETS,
    DQ_POINTERS,
    RANGES,
    REPAIR,
    ROW_PADDING,
    AttentionConfig,
    BackwardConfig,
    dv_config,
    row_terms_config,
    table_size,
)
from calm_fast.kernels.cross_attention.problem import NO_BOXES, Problem, boxes_of, make_problem

__all__ = ["launch_cross_attention_bwd"]


@dataclass(frozen=True)
class _Upstream:
    """The upstream gradient, and the terms of each row that the kernels of the gradients read."""

    dout: torch.Tensor  # (B, M, H, D)
    lse2: torch.Tensor  # (B, H, ROWS) float32
    delta: torch.Tensor  # (B, H, ROWS) float32
    poison: torch.Tensor | None  # (B, H, tiles of rows) int32, if anything is masked: 1 where q or dout is not finite

    @property
    def rows(self) -> int:
        """M, padded."""
        return self.lse2.shape[2]


def launch_cross_attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
    config: BackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of interval attention, with p computed again from lse.

        ds = p * (dout . v - rowsum(dout * out) + dlse)

    Args:
        dout: (B, M, H, D) in q's dtype, any strides.
        dlse: (B, H, M) float32 or None (zero).
        out, lse: results of the forward pass.
        q, k, v, lo, hi, causal, scale: as in the forward pass.
        config: launch configs. None chooses them.
    Returns:
        dq (B, M, H, D), dk and dv (B, N, Hkv, D), contiguous, in the inputs' dtype. A row that sees nothing gets and
        gives zero.
    Raises:
        ValueError: the head dim is above 256 or the scale is not positive.

    Deterministic: no atomics; dk and dv sum the query heads of a KV head inside one program.
    """
    p = make_problem(q, k, v, lo, hi, causal, scale)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout = addressable(dout, rows=1)
    boxes = _boxes(p, BOX_TARGETS, p.q, dout)
    config = config or _config(p, boxes)
    upstream = _launch_rows(p, out, dout, lse, dlse)
    if config.dv is None:
        _launch_dkdv(p, upstream, dk, dv, config.dkdv, boxes)
    else:
        _launch_dkdv(p, upstream, None, dv, config.dv, boxes)
        _launch_dkdv(p, upstream, dk, None, config.dkdv, boxes)
    if upstream.poison is not None:
        # a query that is not finite must not reach the keys that it does not see: 0 times NaN. To zero it where tiles
        # are masked took registers that the kernel does not have, so this launch does such KV heads again
        _launch_dkdv(p, upstream, dk, dv, p.config(REPAIR, measured=False), boxes=False, repair=True)
    _launch_dq(p, upstream, dq, config.dq)
    return dq, dk, dv


def _boxes(p: Problem, targets: tuple[str, ...], *tensors: torch.Tensor) -> bool:
    """Return whether a kernel reads these tensors, q and dout or k and v, through tensor descriptors."""
    return p.target in targets and all(describable(t) for t in tensors)


def _config(p: Problem, boxes: bool) -> BackwardConfig:
    """Return the configs of a call; boxes: q and dout are read through tensor descriptors."""
    if p.interpreted or p.q.dtype == torch.float32:
        return BackwardConfig(dkdv=p.config(DKDV), dq=p.config(DQ))
    arch, size = hardware.gpu(p.q.device).arch, table_size(padded(p.q.shape[3]))
    pointers = p.target in DQ_BOX_TARGETS and not _boxes(p, DQ_BOX_TARGETS, p.k, p.v)
    dq = p.config(DQ_POINTERS if pointers else DQ)
    if not boxes:
        return BackwardConfig(dkdv=DKDV.defaults["sm_80"][size], dq=dq)
    return BackwardConfig(dkdv=p.config(DKDV), dq=dq, dv=dv_config(arch, p.q.dtype, size))


def _launch_rows(
    p: Problem, out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None
) -> _Upstream:
    """Return the terms the backward pass needs of each row: lse in log2 units, and rowsum(dout * out) - dlse."""
    batch, m, _, heads, _, d = p.sizes
    out = addressable(out, rows=1)
    rows = triton.cdiv(m, ROW_PADDING) * ROW_PADDING
    lse2, delta = (torch.empty((batch, heads, rows), dtype=torch.float32, device=out.device) for _ in range(2))
    config = row_terms_config(padded(d))
    tiles = rows // config.block_m
    poison = None
    if p.causal or p.lo is not None or p.hi is not None:
        poison = torch.empty((batch, heads, tiles), dtype=torch.int32, device=out.device)
    launch(
        _cross_attention_bwd_rows_kernel,
        tiles * heads * batch,
        out.device,
        config,
        *(None if poison is None else p.q, out, dout),
        *(lse.contiguous(), dlse if dlse is None else dlse.contiguous(), lse2, delta, poison),
        *p.q.stride()[:3],
        *out.stride()[:3],
        *dout.stride()[:3],
        M=m,
        H=heads,
        ROWS=rows,
        D=d,
        BLOCK_D=padded(d),
        BLOCK_M=config.block_m,
        HAS_DLSE=dlse is not None,
        HAS_POISON=poison is not None,
    )
    return _Upstream(dout, lse2, delta, poison)


def _launch_dkdv(
    p: Problem,
    upstream: _Upstream,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    config: AttentionConfig,
    boxes: bool,
    repair: bool = False,
) -> None:
    """Fill dk and dv, or one of them; in a repair, of the KV heads that poison is for."""
    batch, m, n, _, kv_heads, _ = p.sizes
    key_blocks = triton.cdiv(n, config.block_n)
    ranges = None if repair else _launch_ranges(p, config)
    poison = upstream.poison if repair else None
    parts = p.column_parts("dkdv")
    launch(
        _cross_attention_bwd_dkdv_kernel,
        key_blocks * kv_heads * batch,
        p.q.device,
        config,
        *(p.q, p.k, p.v, upstream.dout),
        *(box for t in (p.q, upstream.dout) for box in (boxes_of(t, config.block_m, parts) if boxes else NO_BOXES)),
        *(upstream.lse2, upstream.delta, p.lo, p.hi, ranges, poison, dk, dv),
        *p.strides,
        *upstream.dout.stride()[:3],
        *p.interval_strides,
        scale=p.scale,
        ROWS=upstream.rows,
        POISON_TILES=0 if poison is None else poison.shape[2],
        BLOCK_D=parts[0],
        REST_D=parts[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        HAS_DK=dk is not None,
        HAS_DV=dv is not None,
        BOXES=boxes,
        REPAIR=repair,
        **p.scalars(),
        **p.constants(),
    )


def _launch_ranges(p: Problem, config: AttentionConfig) -> torch.Tensor | None:
    """Return the query tiles that each key block visits, None without intervals."""
    batch, m, n, _, _, _ = p.sizes
    if p.lo is None and p.hi is None:
        return None
    key_blocks = triton.cdiv(n, config.block_n)
    ranges = torch.empty((batch, key_blocks, 4), dtype=torch.int32, device=p.q.device)
    launch(
        _cross_attention_query_ranges_kernel,
        key_blocks * batch,
        p.q.device,
        RANGES,
        *(p.lo, p.hi, ranges),
        *p.interval_strides,
        M=m,
        N=n,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TILES=RANGES.block_tiles,
        HAS_LO=p.lo is not None,
        HAS_HI=p.hi is not None,
    )
    return ranges


def _launch_dq(p: Problem, upstream: _Upstream, dq: torch.Tensor, config: AttentionConfig) -> None:
    """Fill dq."""
    batch, m, _, heads, _, d = p.sizes
    parts = p.column_parts("dq")
    boxes = _boxes(p, DQ_BOX_TARGETS, p.k, p.v)  # of the k that config is for, not of the copy below
    if padded(d) > 128 and upstream.poison is not None:
        # as the kernel does with narrower keys: who sees a NaN has weights NaN, and Inf stays huge, so that a score of
        # -inf keeps its weight of 0
        p = replace(p, k=addressable(torch.nan_to_num(p.k), rows=1))
    launch(
        _cross_attention_bwd_dq_kernel,
        triton.cdiv(m, config.block_m) * heads * batch,
        dq.device,
        config,
        *(p.q, p.k, p.v, upstream.dout),
        *(box for t in (p.k, p.v) for box in (boxes_of(t, config.block_n, parts) if boxes else NO_BOXES)),
        *(upstream.lse2, upstream.delta, p.lo, p.hi, dq),
        *p.strides,
        *upstream.dout.stride()[:3],
        *p.interval_strides,
        scale=p.scale,
        ROWS=upstream.rows,
        BLOCK_D=parts[0],
        REST_D=parts[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BOXES=boxes,
        **p.scalars(),
        **p.constants(),
    )
