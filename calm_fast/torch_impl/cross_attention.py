"""cross_attention from torch's scaled_dot_product_attention (SDPA), without a mask wherever none is needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from calm_fast._validate import readable

# query rows per step of the explicit path: bounds its (rows, N) scores to a few MiB per head
_ROWS = 256


def plain_form(lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, m: int, n: int) -> str | None:
    """ "full" or "causal" where the intervals say just that, None where they need a mask.

    Values are read on CPU tensors only, and never while tracing; elsewhere only what the types say is used.
    """
    if causal:
        if m == 1 and n > 0:
            return "full"  # the one query is the last one and sees every key
        return "causal" if m == n else None
    if lo is None and hi is None:
        return "full"
    if not all(t is None or readable(t) for t in (lo, hi)):
        return None
    lo, hi = (t[:1] if t is not None and t.dim() == 2 and t.stride(0) == 0 else t for t in (lo, hi))
    if lo is not None and bool((lo != 0).any()):
        return None
    if hi is None or bool((hi == n).all()):
        return "full"
    if m == n and bool((hi == torch.arange(1, m + 1, dtype=torch.int32)).all()):
        return "causal"
    return None


def _mask(
    lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, m: int, n: int, device: torch.device
) -> torch.Tensor:
    """(1 or B, 1, M, N) bool; rows shared by the whole batch (stride 0) are built once."""
    key = torch.arange(n, device=device, dtype=torch.int32)
    if causal:
        return (key < torch.arange(1 + n - m, 1 + n, device=device, dtype=torch.int32).unsqueeze(-1))[None, None]
    bounds = [t if t is None or t.dim() == 1 or t.stride(0) != 0 else t[0] for t in (lo, hi)]
    low, high = (None if t is None else t.reshape(-1, 1, m, 1) for t in bounds)
    if low is None:
        return key < high
    return key >= low if high is None else (key >= low) & (key < high)


def _with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Explicit attention in float32 (float64 for float64), a block of query rows at a time; SDPA returns no lse."""
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    kt = k.to(compute).repeat_interleave(group, dim=1).mT
    vf = v.to(compute).repeat_interleave(group, dim=1)
    outs, lses = [], []
    # torch.compile would unroll a loop over blocks, one graph per length: there all rows are one block
    one_block = torch.compiler.is_compiling() or q.shape[2] <= _ROWS
    for start in (0,) if one_block else range(0, q.shape[2], _ROWS):
        rows = slice(None) if one_block else slice(start, start + _ROWS)
        scores = (q[:, :, rows].to(compute) * scale) @ kt
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, rows], float("-inf"))
        lse = scores.logsumexp(dim=-1)
        # exp(-inf - 0) = 0: a row without keys has weights 0, and no inf - inf on the way
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)).exp()
        outs.append(weights @ vf)
        lses.append(lse)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def cross_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `cross_attention_reference`; arguments are validated already. lse is None unless asked for.

    Asking for lse takes the explicit path (float32 scores, a block of rows at a time): slower than SDPA.
    """
    m, n = q.shape[1], k.shape[1]
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, tokens, D), a view
    if n == 0:  # nothing to see: 0 and -inf (whatever q holds), still connected to q, k and v so that gradients exist
        everything = torch.ones((), dtype=torch.bool, device=q.device)
        out = query.masked_fill(everything, 0.0) + (key.sum() + value.sum())
        lse = out[..., 0].to(torch.promote_types(q.dtype, torch.float32)).masked_fill(everything, float("-inf"))
        return out.transpose(1, 2), lse if return_lse else None
    form = plain_form(lo, hi, causal, m, n)
    mask = None if form == "full" else _mask(lo, hi, causal, m, n, q.device)
    if return_lse:
        out, lse = _with_lse(query, key, value, mask, scale)
        return out.transpose(1, 2), lse

    gqa = True if key.shape[1] != query.shape[1] else False  # SDPA wants a bool, no symbol of torch.compile
    if form is not None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=form == "causal", scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2), None
    # SDPA backends disagree on rows that see nothing: show them everything, then erase what they got
    empty = ~mask.any(dim=-1, keepdim=True)  # (1 or B, 1, M, 1)
    some_empty = not readable(empty) or bool(empty.any())
    if some_empty:
        mask = mask | empty
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
    if some_empty:
        out = out.masked_fill(empty, 0.0)
    return out.transpose(1, 2), None


def cross_attention_torch_bwd(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of a forward pass that kept out and lse; (M, N) scores are stored, so for few queries.

    P = exp(scale q k - lse);  dS = P (dout v - (dout . out) + dlse);  dq = scale dS k, dk = scale dS^T q, dv = P^T dout

    Args:
        dout: (B, M, H, D) q's dtype. dlse: (B, H, M) float32 or None (zero).
        q (B, M, H, D), k, v (B, N, Hkv, D), lo, hi, causal, scale: of the forward pass, validated there.
        out (B, M, H, D), lse (B, H, M): what it returned.
    Returns:
        dq, dk, dv of q's, k's and v's shape and dtype; computed in float32.
    """
    compute, group = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    query, given, result = (t.to(compute) for t in (q, dout, out))
    key, value = (t.to(compute).repeat_interleave(group, dim=2) for t in (k, v))
    mask = None if not causal and lo is None and hi is None else _mask(lo, hi, causal, q.shape[1], k.shape[1], q.device)
    p = (torch.einsum("bmhd,bnhd->bhmn", query, key) * scale - lse.unsqueeze(-1)).exp()
    if mask is not None:  # also what a row without keys holds: exp(s + inf)
        p = p.masked_fill(~mask, 0.0)
    shift = (given * result).sum(dim=-1).transpose(1, 2)
    shift = shift if dlse is None else shift - dlse
    ds = p * (torch.einsum("bmhd,bnhd->bhmn", given, value) - shift.unsqueeze(-1)) * scale
    dq = torch.einsum("bhmn,bnhd->bmhd", ds, key)
    # the heads of a group add up
    dk, dv = (
        torch.einsum("bhmn,bmhd->bnhd", weights, rows).unflatten(2, (-1, group)).sum(dim=3)
        for weights, rows in ((ds, query), (p, given))
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
