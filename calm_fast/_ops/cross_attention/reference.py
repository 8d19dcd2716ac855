"""Definition of cross_attention: attention where query i sees the keys lo[i] <= j < hi[i]."""

from __future__ import annotations

import torch

from calm_fast._ops.cross_attention.masked import masked_scores, masked_sum


def interval_mask(
    lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, m: int, n: int, device: torch.device
) -> torch.Tensor:
    """Return which keys each query sees, (1 or B, M, N) bool.

    Args:
        lo: (B, M) or (M,) int32, first visible key; None = 0.
        hi: (B, M) or (M,) int32, one past the last visible key; None = N.
        causal: hi_i = clamp(i + 1 + (N - M), 0, N), so the last query sees every key; lo and hi must be None.
        m, n: M queries and N keys.
    """
    if causal:
        hi = (torch.arange(m, device=device) + 1 + (n - m)).clamp(0, n)
    lo = torch.zeros(m, dtype=torch.int32, device=device) if lo is None else lo
    hi = torch.full((m,), n, dtype=torch.int32, device=device) if hi is None else hi
    key = torch.arange(n, device=device)
    mask = (lo.unsqueeze(-1) <= key) & (key < hi.unsqueeze(-1))
    return mask if mask.dim() == 3 else mask.unsqueeze(0)


def cross_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute interval-masked multi-head attention, stated as directly as torch allows.

        s_ij = scale * q_i . k_j  for lo_i <= j < hi_i;  out_i = sum_j softmax_j(s_ij) v_j;  lse_i = log sum_j exp(s_ij)

    A query with an empty interval gives out 0 and lse -inf. The sums run over lo_i <= j < hi_i only: a key or value
    outside a query's interval reaches neither its output nor its gradients, even if it is NaN or Inf.

    Args:
        q: (B, M, H, D), any float dtype.
        k, v: (B, N, Hkv, D) in q's dtype, H % Hkv == 0; query head h reads KV head h // (H / Hkv).
        lo, hi, causal: as in `interval_mask`.
        scale: multiplies the scores; default 1 / sqrt(D).
    Returns:
        out (B, M, H, D) in q's dtype; lse (B, H, M) float32 (float64 for float64 input).
    Differentiable by autograd in any order. Source: CALM (arXiv 2401.02412) section 3.
    """
    _, m, heads, d = q.shape
    n, kv_heads = k.shape[1], k.shape[2]
    scale = d**-0.5 if scale is None else scale
    compute = torch.promote_types(q.dtype, torch.float32)
    group = heads // kv_heads
    qf = q.to(compute).transpose(1, 2)  # (B, H, M, D)
    kf, vf = (t.to(compute).repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))  # (B, H, N, D)

    visible = interval_mask(lo, hi, causal, m, n, q.device).unsqueeze(1)  # (1 or B, 1, M, N)
    empty = ~visible.any(dim=-1, keepdim=True)  # (1 or B, 1, M, 1)
    scores = masked_scores(qf, kf, visible) * scale
    # an empty row keeps scores of 0 until after the softmax, so that no NaN enters the graph
    scores = scores.masked_fill(~visible & ~empty, float("-inf"))
    lse = scores.logsumexp(dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
    out = masked_sum(scores.softmax(dim=-1), vf, visible)
    return out.transpose(1, 2).to(q.dtype), lse
