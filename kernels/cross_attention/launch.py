"""Launchers of the Triton kernels of cross_attention.

The public op (calm_fast.ops.cross_attention) has validated the arguments. The launchers give tensors strides that the
kernels can address, choose configs, and start kernels on the tensors' device and its current stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from calm_fast.core.launch_config import Config
from calm_fast.kernels.common.arithmetic import LOG2_E
from calm_fast.kernels.common.config_table import ConfigTable, padded
from calm_fast.kernels.common.launching import addressable, float32_precision, interpreted, launch
from calm_fast.kernels.cross_attention.bwd_kv import (
    _cross_attention_bwd_dkdv_kernel,
    _cross_attention_query_ranges_kernel,
)
from calm_fast.kernels.cross_attention.bwd_q import _cross_attention_bwd_dq_kernel, _cross_attention_bwd_rows_kernel
from calm_fast.kernels.cross_attention.configs import (
    COMBINE,
    DECODE,
    DKDV,
    DQ,
    FWD,
    RANGES,
    AttentionConfig,
    BackwardConfig,
    DecodeConfig,
    row_terms_config,
    table_size,
)
from calm_fast.kernels.cross_attention.decode import _cross_attention_combine_kernel, _cross_attention_decode_kernel
from calm_fast.kernels.cross_attention.fwd import _cross_attention_fwd_kernel

__all__ = ["launch_cross_attention_bwd", "launch_cross_attention_fwd"]

_LOG2_E: float = LOG2_E.value
_MAX_HEAD_DIM = 256
_DECODE_ROWS = 64  # the split-key kernel takes over at this many query rows of a KV head ...
_DECODE_M = 16  # ... or at this many queries, whatever the group
_INTERPRETED = interpreted(_cross_attention_fwd_kernel)


@dataclass(frozen=True)
class _Problem:
    """One call's inputs as the kernels take them; shape letters as in the op."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lo: torch.Tensor | None
    hi: torch.Tensor | None
    causal: bool
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, M, N, H, Hkv, D."""
        batch, m, heads, d = self.q.shape
        return batch, m, self.k.shape[1], heads, self.k.shape[2], d

    @property
    def strides(self) -> tuple[int, ...]:
        """(b, row, head) strides of q, k and v."""
        return tuple(s for t in (self.q, self.k, self.v) for s in t.stride()[:3])

    @property
    def interval_strides(self) -> tuple[int, ...]:
        """(b, m) strides of lo and hi, 0 for an absent one."""
        return tuple(s for t in (self.lo, self.hi) for s in (t.stride() if t is not None else (0, 0)))

    def scalars(self) -> dict[str, Any]:
        """Run-time sizes that every attention kernel takes."""
        _, m, n, heads, kv_heads, _ = self.sizes
        return {"scale_log2": self.scale * _LOG2_E, "M": m, "N": n, "H": heads, "GROUP": heads // kv_heads}

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every attention kernel takes."""
        d = self.q.shape[3]
        return {
            "D": d,
            "BLOCK_D": padded(d),
            "HAS_LO": self.lo is not None,
            "HAS_HI": self.hi is not None,
            "CAUSAL": self.causal,
            "PRECISION": float32_precision(self.q.dtype),
            "INTERPRET": _INTERPRETED,
        }

    def config(self, table: ConfigTable[int, Config]) -> Config:
        """Return the launch config of a kernel for this call."""
        _, m, n, heads, kv_heads, d = self.sizes
        shape, block_d = {"M": m, "N": n, "H": heads, "Hkv": kv_heads}, padded(d)
        return table.pick(self.q.device, self.q.dtype, table_size(block_d), block_d, shape, _INTERPRETED)


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> _Problem:
    if q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(f"cross_attention: `q` must have a head dim of at most {_MAX_HEAD_DIM}, got {q.shape[3]}")
    if not scale > 0:
        raise ValueError(f"cross_attention: `scale` must be positive in the Triton kernels, got {scale}")
    q, k, v = (addressable(t, rows=1) for t in (q, k, v))
    return _Problem(q, k, v, lo, hi, causal, scale)


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
    """Interval attention and its log-sum-exp, by the forward kernel or, for few queries, the decode kernel.

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
    interval.
    """
    p = _problem(q, k, v, lo, hi, causal, scale)
    batch, m, n, heads, kv_heads, d = p.sizes
    out = torch.empty((batch, m, heads, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, m), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or n == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if config is None:
        few = m <= _DECODE_M or m * (heads // kv_heads) <= _DECODE_ROWS
        config = p.config(DECODE) if few else p.config(FWD)
    if isinstance(config, DecodeConfig):
        _launch_decode(p, out, lse, config)
        return out, lse
    launch(
        _cross_attention_fwd_kernel,
        triton.cdiv(m, config.block_m) * heads * batch,
        q.device,
        config,
        *(p.q, p.k, p.v, lo, hi, out, lse),
        *p.strides,
        *p.interval_strides,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **p.scalars(),
        **p.constants(),
    )
    return out, lse


def _launch_decode(p: _Problem, out: torch.Tensor, lse: torch.Tensor, config: DecodeConfig) -> None:
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
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        SPLIT_KEYS=config.split_keys,
        DIRECT=splits == 1,
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
    p = _problem(q, k, v, lo, hi, causal, scale)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    config = config or BackwardConfig(dkdv=p.config(DKDV), dq=p.config(DQ))
    dout = addressable(dout, rows=1)
    lse2, delta = _launch_rows(p, out, dout, lse, dlse)
    _launch_dkdv(p, dout, lse2, delta, dk, dv, config.dkdv)
    _launch_dq(p, dout, lse2, delta, dq, config.dq)
    return dq, dk, dv


def _launch_rows(
    p: _Problem, out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, dlse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the terms the backward pass needs of each row: lse in log2 units, and rowsum(dout * out) - dlse."""
    batch, m, _, heads, _, d = p.sizes
    out = addressable(out, rows=1)
    lse2, delta = (torch.empty((batch, heads, m), dtype=torch.float32, device=out.device) for _ in range(2))
    config = row_terms_config(padded(d))
    launch(
        _cross_attention_bwd_rows_kernel,
        triton.cdiv(m, config.block_m) * heads * batch,
        out.device,
        config,
        *(out, dout, lse.contiguous(), dlse if dlse is None else dlse.contiguous(), lse2, delta),
        *out.stride()[:3],
        *dout.stride()[:3],
        M=m,
        H=heads,
        D=d,
        BLOCK_D=padded(d),
        BLOCK_M=config.block_m,
        HAS_DLSE=dlse is not None,
    )
    return lse2, delta


def _launch_dkdv(
    p: _Problem,
    dout: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    config: AttentionConfig,
) -> None:
    """Fill dk and dv."""
    batch, m, n, _, kv_heads, _ = p.sizes
    key_blocks = triton.cdiv(n, config.block_n)
    ranges = None
    if p.lo is not None or p.hi is not None:
        ranges = torch.empty((batch, key_blocks, 4), dtype=torch.int32, device=dk.device)
        launch(
            _cross_attention_query_ranges_kernel,
            key_blocks * batch,
            dk.device,
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
    launch(
        _cross_attention_bwd_dkdv_kernel,
        key_blocks * kv_heads * batch,
        dk.device,
        config,
        *(p.q, p.k, p.v, dout, lse2, delta, p.lo, p.hi, ranges, dk, dv),
        *p.strides,
        *dout.stride()[:3],
        *p.interval_strides,
        scale=p.scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **p.scalars(),
        **p.constants(),
    )


def _launch_dq(
    p: _Problem,
    dout: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    config: AttentionConfig,
) -> None:
    """Fill dq."""
    batch, m, _, heads, _, _ = p.sizes
    if p.causal or p.lo is not None or p.hi is not None:
        # a hidden key's weight of 0 times NaN would be NaN. Who sees a NaN has weights NaN; Inf stays huge, so that a
        # score of -inf keeps its weight of 0. In the kernel this would take registers that it does not have.
        p = replace(p, k=addressable(torch.nan_to_num(p.k), rows=1))
    launch(
        _cross_attention_bwd_dq_kernel,
        triton.cdiv(m, config.block_m) * heads * batch,
        dq.device,
        config,
        *(p.q, p.k, p.v, dout, lse2, delta, p.lo, p.hi, dq),
        *p.strides,
        *dout.stride()[:3],
        *p.interval_strides,
        scale=p.scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **p.scalars(),
        **p.constants(),
    )
