"""SDPA multiplies the numbers of hidden keys by 0, and 0 times NaN is NaN. `seal` keeps NaN and Inf out of it.

On the way in, numbers that are not finite become 0. On the way out, the rows that see one, or hold one, become NaN. The
backward pass does the same with the upstream gradient: dq of such a row and dk, dv of the keys it sees become NaN.
Which keys a row sees follows from counts along the keys: O(M + N), no (M, N) mask, no host sync.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def all_finite(*tensors: torch.Tensor) -> bool:
    """Return True if every number of these tensors is finite, by their sums; False also if a sum overflows. Syncs.

    A sum in the tensors' own dtype accumulates in float32 anyway; asked for float32, torch reads 16-bit tensors through
    a loop that converts one number at a time, three times as slow. Only float16 has sums that fit float32 alone.
    """
    return all(
        math.isfinite(t.sum().item()) or (t.dtype == torch.float16 and math.isfinite(t.sum(dtype=torch.float32).item()))
        for t in tensors
    )


def seal(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    finite: bool,
) -> torch.Tensor:
    """Return attend(q, k, v) as if hidden keys did not exist, in both directions.

    Args:
        attend: q (B, H, M, D), k, v (B, Hkv, N, D) -> (B, H, M, D), for the intervals lo, hi.
        lo, hi: (1 or B, M) int32.
        finite: q, k and v are known to be finite. Then only the upstream gradient is looked at, by its sum.
    """
    q, k, v, dirty = _Enter.apply(q, k, v, lo, hi, finite)
    out: torch.Tensor = _Leave.apply(attend(q, k, v), dirty, finite)
    return out


def _bounds(lo: torch.Tensor, hi: torch.Tensor, batch: int, heads: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lo and hi as (B, heads, M) int64 with 0 <= lo <= hi <= N."""
    low, high = (t.long().clamp(0, n).unsqueeze(1).expand(batch, heads, -1) for t in (lo, hi))
    return low, torch.maximum(low, high)


class _Enter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lo: torch.Tensor,
        hi: torch.Tensor,
        finite: bool,
    ) -> tuple[torch.Tensor, ...]:
        if finite:
            return q.view_as(q), k.view_as(k), v.view_as(v), q.new_zeros(q.shape[:3], dtype=torch.float32)
        (batch, kv_heads, n, _), group = k.shape, q.shape[1] // k.shape[1]
        low, high = _bounds(lo, hi, batch, kv_heads, n)
        good = [t.isfinite() for t in (q, k, v)]
        broken = ~(good[1].all(-1) & good[2].all(-1))
        before = F.pad(broken.long().cumsum(-1), (1, 0))  # broken keys before key j
        sees = before.gather(-1, high) > before.gather(-1, low)
        holds = ~good[0].all(-1) & (low < high).repeat_interleave(group, dim=1)
        dirty = (sees.repeat_interleave(group, dim=1) | holds).float()
        return (*(t.masked_fill(~g, 0.0) for t, g in zip((q, k, v), good, strict=True)), dirty)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[3], inputs[4])
        ctx.group, ctx.sizes = inputs[0].shape[1] // inputs[1].shape[1], inputs[1].shape

    @staticmethod
    def backward(
        ctx: Any,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        reached: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        if reached is None:
            return dq, dk, dv, None, None, None
        batch, kv_heads, n, _ = ctx.sizes
        lo, hi = ctx.saved_tensors
        low, high = _bounds(lo, hi, batch, kv_heads, n)
        rows = (reached > 0) & (low < high).repeat_interleave(ctx.group, dim=1)
        # a row enters the count at its first key and leaves it behind its last
        count = rows.unflatten(1, (-1, ctx.group)).long().sum(2)
        edges = torch.zeros_like(count[..., :1]).expand(-1, -1, n + 1)
        edges = edges.scatter_add(-1, low, count).scatter_add(-1, high, -count)
        keys = (edges.cumsum(-1)[..., :n] > 0).unsqueeze(-1)
        nan = float("nan")
        dq = None if dq is None else dq.masked_fill(rows.unsqueeze(-1), nan)
        dk, dv = (None if t is None else t.masked_fill(keys, nan) for t in (dk, dv))
        return dq, dk, dv, None, None, None


class _Leave(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(out: torch.Tensor, dirty: torch.Tensor, finite: bool) -> torch.Tensor:
        return out.view_as(out) if finite else out.masked_fill((dirty > 0).unsqueeze(-1), float("nan"))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, dirty, ctx.finite = inputs
        ctx.save_for_backward(dirty)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.finite and all_finite(dout):
            return dout, None, None
        (dirty,) = ctx.saved_tensors
        reached = (dirty > 0) | ~dout.isfinite().all(-1)
        return dout.masked_fill(reached.unsqueeze(-1), 0.0), reached.float(), None
