"""Baselines of the composition layer and of its attention core, in plain torch.

Weights are a dict shared by every contestant: norm (DB,), proj (DB, DA), q (H D, DB), k, v (Hkv D, DB), o (DB, H D).
The layer is that of CALM (arXiv 2401.02412), section 3. `ReleasedHook` has the arithmetic of the authors' released
layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
Weights = Mapping[str, torch.Tensor]


def init_weights(da: int, db: int, h: int, d: int, dtype: torch.dtype, device: torch.device, seed: int) -> Weights:
    """Return the random weights of a layer that has been trained for a few steps: W_o is not zero."""
    g = torch.Generator(device).manual_seed(seed)

    def linear(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=g, device=device) * cols**-0.5).to(dtype)

    norm = (1 + 0.1 * torch.randn(db, generator=g, device=device)).to(dtype)
    shapes = {"proj": (db, da), "q": (h * d, db), "k": (h * d, db), "v": (h * d, db), "o": (db, h * d)}
    return {"norm": norm, **{name: linear(*shape) for name, shape in shapes.items()}}


def visible(
    m: int, n: int, device: torch.device, lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool
) -> torch.Tensor | None:
    """Return the mask (1 or B, 1, M, N) bool of visible keys, or None if every key is visible."""
    if causal:
        return torch.ones(m, n, dtype=torch.bool, device=device).tril(n - m)[None, None]
    if lo is None and hi is None:
        return None
    key = torch.arange(n, device=device)
    seen = torch.ones(1, 1, 1, n, dtype=torch.bool, device=device)
    if lo is not None:
        seen = seen & (key >= lo.reshape(-1, 1, m, 1))
    return seen if hi is None else seen & (key < hi.reshape(-1, 1, m, 1))


def explicit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return softmax(scale q k^T) v with the scores in memory, in q's dtype. All tensors are (B, H, tokens, D)."""
    scores = torch.matmul(q * scale, k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), v)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x / rms(x) * weight as model code writes it, computed in float32 (float64 for float64)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def unfolded_layer(
    w: Weights,
    hb: torch.Tensor,
    ha: torch.Tensor,
    heads: int,
    *,
    sdpa: bool,
    causal: bool,
    mask: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> torch.Tensor:
    """Return H_B + W_o Attention(W_q n(H_B), W_k P H_A, W_v P H_A), product by product.

    Args:
        w: weights. hb: (B, M, DB). ha: (B, n, DA). heads: H.
        sdpa: use scaled_dot_product_attention instead of explicit scores.
        causal: mask out j > i (M = N). mask: the same as a bool tensor, for explicit scores.
        cache: as for calm_fast.CrossAttention.
    Returns:
        (B, M, DB).
    """

    def split(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = split(F.linear(rms_norm(hb, w["norm"]), w["q"]))
    projected = F.linear(ha, w["proj"])
    k, v = split(F.linear(projected, w["k"])), split(F.linear(projected, w["v"]))
    if cache is not None:
        k, v = cache.update(k, v)
    if sdpa:
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    else:
        attended = explicit_attention(q, k, v, mask, q.shape[-1] ** -0.5)
    return hb + F.linear(attended.transpose(1, 2).flatten(-2), w["o"])


class Cache(Protocol):
    """A cache of keys and values, as transformers' cache layers have it."""

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class ReleasedHook(nn.Module):
    """The released layer's arithmetic.

    A biased projection, computed once for the keys and once for the values; torch's MultiheadAttention returning its
    weights (so not fused); RMSNorm on the result; residual. It has no mask and needs H D = DB.
    """

    def __init__(self, w: Weights, heads: int) -> None:
        """w: weights as for `unfolded_layer`, where norm is the one after attention. The biases are zero."""
        super().__init__()
        db, da = w["proj"].shape
        self.proj = nn.Linear(da, db)
        self.cross_attention = nn.MultiheadAttention(db, heads, batch_first=True)
        self.norm = nn.Parameter(torch.empty(db))
        self.to(w["proj"])
        with torch.no_grad():
            for bias in (self.proj.bias, self.cross_attention.in_proj_bias, self.cross_attention.out_proj.bias):
                bias.zero_()
            self.proj.weight.copy_(w["proj"])
            self.cross_attention.in_proj_weight.copy_(torch.cat((w["q"], w["k"], w["v"])))
            self.cross_attention.out_proj.weight.copy_(w["o"])
            self.norm.copy_(w["norm"])

    def forward(self, hb: torch.Tensor, ha: torch.Tensor) -> torch.Tensor:
        """hb: (B, M, DB). ha: (B, N, DA). Return (B, M, DB)."""
        keys, values = self.proj(ha), self.proj(ha)
        attended, _ = self.cross_attention(hb, keys, values, need_weights=True)
        return hb + rms_norm(attended, self.norm)


class PlainHook(nn.Module):
    """`ReleasedHook` with explicit attention instead of torch's module, under the same parameter names."""

    def __init__(self, hook: ReleasedHook, heads: int) -> None:
        super().__init__()
        self.hook, self.heads = hook, heads

    def forward(self, hb: torch.Tensor, ha: torch.Tensor) -> torch.Tensor:
        mha = self.hook.cross_attention
        weights, biases = mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3)
        projected = ha @ self.hook.proj.weight.T + self.hook.proj.bias
        q, k, v = (
            (x @ w.T + b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, w, b in zip((hb, projected, projected), weights, biases, strict=True)
        )
        attended = explicit_attention(q, k, v, None, q.shape[-1] ** -0.5).transpose(1, 2).flatten(-2)
        return hb + rms_norm(attended @ mha.out_proj.weight.T + mha.out_proj.bias, self.hook.norm)


class FixedCache:
    """A cache whose `update` always writes the last slot and returns everything, so all steps are alike."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: (B, Hkv, N, D)."""
        self.keys, self.values = keys.clone(), values.clone()

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """keys, values: (B, Hkv, 1, D)."""
        self.keys[:, :, -1:] = keys
        self.values[:, :, -1:] = values
        return self.keys, self.values
