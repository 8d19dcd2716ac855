"""cross_attention from torch's scaled_dot_product_attention (SDPA), without a mask wherever none is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from calm_fast._ops.cross_attention.masked import masked_scores, masked_sum
from calm_fast._ops.cross_attention.sealed import all_finite, seal
from calm_fast.core.checks import readable
from calm_fast.core.devices import product_dtype
from calm_fast.core.dispatch import FORWARD, active_transform, autograd_records

# query rows at a time of the explicit path: bounds its (rows, N) scores to a few MiB per head
_LSE_ROWS = 256
# heights of query blocks that `_plan_blocks` tries
_BLOCK_ROWS = (64, 128, 256)
# cost of a call of SDPA beside its scores, in scores of head dim 64
_CALL_COST = 25_000


def plain_form(lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, m: int, n: int) -> str | None:
    """Return "full" or "causal" if the intervals are just that, None if they need a mask.

    Values are read on CPU tensors only, and never while tracing. Other tensors are taken to need a mask.
    """
    if causal:
        if m == 1 and n > 0:
            return "full"  # the only query is the last one and sees every key
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


def _may_read(q: torch.Tensor, lo: torch.Tensor | None, hi: torch.Tensor | None) -> bool:
    """Return True if the values of lo and hi may choose the blocks: real CPU tensors, no tracing, no torch.func."""
    if not all(readable(t) for t in (q, lo, hi) if t is not None) or q.numel() == 0:
        return False
    return not torch._C._are_functorch_transforms_active()


def _mask(
    lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, m: int, n: int, device: torch.device
) -> torch.Tensor:
    """Return the mask (1 or B, 1, M, N) bool; rows shared by the batch (stride 0) are built once."""
    key = torch.arange(n, device=device, dtype=torch.int32)
    if causal:
        return (key < torch.arange(1 + n - m, 1 + n, device=device, dtype=torch.int32).unsqueeze(-1))[None, None]
    bounds = [t if t is None or t.dim() == 1 or t.stride(0) != 0 else t[0] for t in (lo, hi)]
    low, high = (None if t is None else t.reshape(-1, 1, m, 1) for t in bounds)
    if low is not None and high is not None:
        return (key >= low) & (key < high)
    if low is not None:
        return key >= low
    assert high is not None  # without causal, lo and hi no mask is made
    return key < high


@dataclass(frozen=True)
class _Block:
    """Query rows [start, stop) of sequence `batch` (None: of all) and the keys [first, last) they may see."""

    batch: int | None
    start: int
    stop: int
    first: int
    last: int

    def sequences(self, count: int) -> slice:
        """Return the block's sequences among `count`."""
        return slice(0, count) if self.batch is None else slice(self.batch, self.batch + 1)


def _interval(
    lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, m: int, n: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lo and hi as (1 or B, M) tensors; rows shared by the whole batch become one row."""
    if causal:
        hi = torch.arange(1 + n - m, 1 + n, dtype=torch.int32, device=device).clamp(min=0)
    low = torch.zeros(m, dtype=torch.int32, device=device) if lo is None else lo
    high = torch.full((m,), n, dtype=torch.int32, device=device) if hi is None else hi
    low, high = (t[0] if t.dim() == 2 and t.stride(0) == 0 and t.shape[0] > 0 else t for t in (low, high))
    low, high = torch.broadcast_tensors(low.reshape(-1, m), high.reshape(-1, m))
    return low, high


def _plan_blocks(lo: torch.Tensor, hi: torch.Tensor, batch: int, heads: int, n: int, d: int) -> list[_Block] | None:
    """Return blocks of query rows with their key ranges, or None if one call with an (M, N) mask costs no more.

    The cost is scores plus calls. The cheapest plan is taken: blocks of one of `_BLOCK_ROWS` rows, for all sequences
    together (a block's range is then the union of theirs) or one by one. lo, hi: (1 or B, M), read here.
    """
    own, m = lo.shape
    call = _CALL_COST * 76 // (d + 12)  # a score's time grows with its products; the exponential is worth 12 columns
    best, found = batch * heads * m * n + call, None
    if best < 4 * call:  # too small to repay the planning
        return None
    for rows in _BLOCK_ROWS:
        pad = -m % rows
        empty, height = lo >= hi, torch.full((-(-m // rows),), rows)
        height[-1] -= pad
        # (own, blocks): first and last key of the rows that see any
        first = F.pad(lo.masked_fill(empty, n), (0, pad), value=n).unflatten(1, (-1, rows)).amin(2)
        last = F.pad(hi.masked_fill(empty, 0), (0, pad), value=0).unflatten(1, (-1, rows)).amax(2)
        forms = [(first.amin(0, keepdim=True), last.amax(0, keepdim=True), batch)]
        if own > 1:
            forms.append((first, last, 1))
        for low, high, together in forms:
            width = (high - low).clamp(min=0)
            cost = int((width * height).sum()) * heads * together + call * int((width > 0).sum())
            if cost < best:
                best, found = cost, (rows, low.tolist(), high.tolist(), together < batch)
    if found is None:
        return None
    rows, low, high, single = found
    return [
        _Block(b if single else None, i * rows, min((i + 1) * rows, m), first, last)
        for b, pairs in enumerate(zip(low, high, strict=True))
        for i, (first, last) in enumerate(zip(*pairs, strict=True))
        if first < last
    ]


def _one_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: _Block, lo: torch.Tensor, hi: torch.Tensor, scale: float
) -> torch.Tensor:
    """Run SDPA on one block with a mask of its rows and keys alone; rows that see no key are 0."""
    own = slice(None) if lo.shape[0] == 1 else block.sequences(lo.shape[0])
    key = torch.arange(block.first, block.last, dtype=torch.int32)
    low, high = (t[own, None, block.start : block.stop, None] for t in (lo, hi))
    mask, empty = (key >= low) & (key < high), low >= high
    some_empty = bool(empty.any())
    if some_empty:  # see cross_attention_torch
        mask = mask | empty
    gqa = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.masked_fill(empty, 0.0) if some_empty else out


class _InBlocks(torch.autograd.Function):
    """Attention block by block.

    Each block keeps its own small graph, and the gradients of keys are added up in one tensor. With autograd's slices
    every block would make a tensor of all keys.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        blocks: Sequence[_Block],
        lo: torch.Tensor,
        hi: torch.Tensor,
        scale: float,
        grad: bool,
    ) -> torch.Tensor:
        out = torch.zeros_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.parts, ctx.shapes = [], (q.shape, k.shape, q.dtype)
        for block in blocks:
            own = block.sequences(q.shape[0])
            keys, rows = slice(block.first, block.last), slice(block.start, block.stop)
            parts = q[own, :, rows].detach(), k[own, :, keys].detach(), v[own, :, keys].detach()
            with torch.set_grad_enabled(grad):
                for part in parts:
                    part.requires_grad_(grad)
                result = _one_block(*parts, block, lo, hi, scale)
            out[own, :, rows] = result.detach()
            if grad:
                ctx.parts.append((block, parts, result))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_shape, k_shape, dtype = ctx.shapes
        wide = torch.promote_types(dtype, torch.float32)  # sums over blocks are rounded once

        def zeros(shape: torch.Size) -> torch.Tensor:
            return torch.zeros((shape[0], shape[2], shape[1], shape[3]), dtype=wide).transpose(1, 2)

        dq, dk, dv = zeros(q_shape), zeros(k_shape), zeros(k_shape)
        for block, parts, result in ctx.parts:
            own = block.sequences(q_shape[0])
            keys, rows = slice(block.first, block.last), slice(block.start, block.stop)
            # keep the graph: the caller may run backward again
            grads = torch.autograd.grad(result, parts, dout[own, :, rows], retain_graph=True)
            dq[own, :, rows] = grads[0]
            dk[own, :, keys] += grads[1]
            dv[own, :, keys] += grads[2]
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None, None, None


def _with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and lse, computed in float32 (float64 for float64) a chunk of query rows at a time.

    SDPA returns no lse. q (B, H, M, D), k and v (B, Hkv, N, D), mask (1 or B, 1, M, N) bool or None.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    kf = k.to(compute).repeat_interleave(group, dim=1)
    vf = v.to(compute).repeat_interleave(group, dim=1)
    outs, lses = [], []
    # torch.compile would unroll a loop over chunks, one graph per length: there all rows are one chunk
    one_chunk = torch.compiler.is_compiling() or q.shape[2] <= _LSE_ROWS
    for start in (0,) if one_chunk else range(0, q.shape[2], _LSE_ROWS):
        rows = slice(None) if one_chunk else slice(start, start + _LSE_ROWS)
        visible = None if mask is None else mask[:, :, rows]
        scores = masked_scores(q[:, :, rows].to(compute) * scale, kf, visible)
        if visible is None:
            lse = scores.logsumexp(dim=-1)
        else:  # as in the reference: an empty row keeps scores of 0 until after the softmax
            empty = ~visible.any(dim=-1, keepdim=True)
            scores = scores.masked_fill(~visible & ~empty, float("-inf"))
            lse = scores.logsumexp(dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
        outs.append(masked_sum(scores.softmax(dim=-1), vf, visible))
        lses.append(lse)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _trains_slowly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Return True if SDPA's backward pass follows in a dtype without products here; its forward pass has its own."""
    return product_dtype(q.device.type, q.dtype) != q.dtype and autograd_records(q, k, v)


def attend_plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Return full or causal attention with the default scale: `cross_attention_torch` in a quarter of its calls.

    Its choice of a form and its functions take as long as SDPA over a short text. CPU tensors; causal only without
    gradients.
    """
    n = k.shape[1]
    if n == 0 or (causal and not (q.shape[1] == n and all_finite(k, v))) or _trains_slowly(q, k, v):
        return cross_attention_torch(q, k, v, None, None, causal, q.shape[3] ** -0.5, False)[0]
    gqa = k.shape[2] != q.shape[2]
    query, key, value = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=gqa).transpose(1, 2)


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
    """Return out and lse as `cross_attention_reference` does; arguments are checked already. lse is None unless wanted.

    return_lse=True takes the explicit path (float32 scores, a chunk of rows at a time), which is slower than SDPA.
    """
    if _trains_slowly(q, k, v):
        out, lse = cross_attention_torch(q.float(), k.float(), v.float(), lo, hi, causal, scale, return_lse)
        return out.to(q.dtype), lse
    m, n = q.shape[1], k.shape[1]
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, tokens, D), a view
    if n == 0:  # out is 0 and lse -inf whatever q holds, but both stay connected to q, k and v: gradients exist
        everything = torch.ones((), dtype=torch.bool, device=q.device)
        out = query.masked_fill(everything, 0.0) + (key.sum() + value.sum())
        lse = out[..., 0].to(torch.promote_types(q.dtype, torch.float32)).masked_fill(everything, float("-inf"))
        return out.transpose(1, 2), lse if return_lse else None
    form = plain_form(lo, hi, causal, m, n)
    if return_lse:
        mask = None if form == "full" else _mask(lo, hi, causal, m, n, q.device)
        out, lse = _with_lse(query, key, value, mask, scale)
        return out.transpose(1, 2), lse

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _sdpa(query, key, value, lo, hi, causal, scale, form)

    # nothing is hidden, or a GPU's plain causal kernel, which a look at every key would slow down by a third
    open_to_all = form == "full" or (form == "causal" and q.device.type != "cpu")
    transform = active_transform()
    if open_to_all or transform == FORWARD or m == 0:  # SDPA has no forward mode, and says so itself
        return attend(query, key, value).transpose(1, 2), None
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    # forward, a NaN in q stays in its row by itself
    watched = (q, k, v) if grad else (k, v)
    finite = transform is None and all(readable(t) for t in (q, k, v)) and all_finite(*watched)
    if finite and not grad:
        return attend(query, key, value).transpose(1, 2), None
    low, high = _interval(lo, hi, causal, m, n, q.device)
    return seal(attend, query, key, value, low, high, finite).transpose(1, 2), None


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
    form: str | None,
) -> torch.Tensor:
    """Attend with SDPA: plain, block by block or with an (M, N) mask. query (B, H, M, D), key, value (B, Hkv, N, D)."""
    (batch, heads, m, d), n = query.shape, key.shape[2]
    if form is None and _may_read(query, lo, hi):
        low, high = _interval(lo, hi, causal, m, n, query.device)
        blocks = _plan_blocks(low, high, batch, heads, n, d)
        if blocks is not None:
            grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            rows: torch.Tensor = _InBlocks.apply(query, key, value, blocks, low, high, scale, grad)
            return rows
    gqa = True if key.shape[1] != heads else False  # SDPA needs a bool, not a symbol of torch.compile
    if form is not None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=form == "causal", scale=scale, enable_gqa=gqa
        )
    mask = _mask(lo, hi, causal, m, n, query.device)
    # SDPA backends disagree on rows that see no key: let them see every key, then erase the result
    empty = ~mask.any(dim=-1, keepdim=True)  # (1 or B, 1, M, 1)
    some_empty = not readable(empty) or bool(empty.any())
    if some_empty:
        mask = mask | empty
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return out.masked_fill(empty, 0.0) if some_empty else out


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
    """Return dq, dk and dv of a forward pass that saved out and lse. It stores (M, N) scores: for few queries.

        P = exp(scale q k - lse),   dS = P (dout v - (dout . out) + dlse)
        dq = scale dS k,   dk = scale dS^T q,   dv = P^T dout

    Args:
        dout: (B, M, H, D) in q's dtype.
        dlse: (B, H, M) float32, or None for zero.
        q (B, M, H, D), k, v (B, N, Hkv, D), lo, hi, causal, scale: arguments of the forward pass, checked there.
        out (B, M, H, D), lse (B, H, M): its results.
    Returns:
        dq, dk, dv in the shapes and dtypes of q, k and v; computed in float32.
    """
    compute, group = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    query, given, result = (t.to(compute).transpose(1, 2) for t in (q, dout, out))
    key, value = (t.to(compute).repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
    mask = None if not causal and lo is None and hi is None else _mask(lo, hi, causal, q.shape[1], k.shape[1], q.device)
    # an lse is infinite only if a score is, or if its row sees nothing, which the mask erases
    lse = lse.masked_fill(~lse.isfinite(), float("nan")).unsqueeze(-1)
    p = (masked_scores(query, key, mask) * scale - lse).exp()
    shift = (given * result).sum(dim=-1)
    shift = shift if dlse is None else shift - dlse
    ds = p * (masked_scores(given, value, mask) - shift.unsqueeze(-1)) * scale
    dq = masked_sum(ds, key, mask).transpose(1, 2)
    over = None if mask is None else mask.mT
    # the heads of a group add up
    dk, dv = (
        masked_sum(weights.mT, rows, over).unflatten(1, (-1, group)).sum(dim=2).transpose(1, 2)
        for weights, rows in ((ds, query), (p, given))
    )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
