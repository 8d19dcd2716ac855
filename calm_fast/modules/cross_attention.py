"""The composition layer of CALM: an anchor's hidden states read an augmenter's through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from calm_fast import ops
from calm_fast._validate import bad_type, bad_value
from calm_fast.modules.folding import FoldedWeights, key_value_cost, may_cache, slowness

_NAME = "CrossAttention"


class KeyValueCache(Protocol):
    """What `forward(cache=...)` needs: a layer of a transformers cache is one."""

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys, values (B, Hkv, n, D); return all of them (B, Hkv, N, D)."""


class CrossAttention(nn.Module):
    """H_B + W_o Attention(q = W_q n(H_B), k = W_k P H_A, v = W_v P H_A), the composition layer of CALM.

    n is an RMSNorm or the identity, P a linear map from the augmenter's width to the anchor's. W_o starts at zero: a
    new layer returns the anchor's hidden states unchanged, bit for bit. W_k P and W_v P are folded into one weight,
    n's weight into W_q, wherever that costs less (docs/folding.md; a cost model chooses, not a flag); without
    gradients the folded weights are kept until a parameter changes.

    Args:
        anchor_dim: DB, width of the anchor's hidden states.
        augmenter_dim: DA, width of the augmenter's hidden states.
        num_heads: H query heads. head_dim: D, default anchor_dim // num_heads.
        num_kv_heads: Hkv, default num_heads; must divide it.
        pre_norm: apply an RMSNorm n to H_B before W_q.
        post_norm: H_B + n2(W_o Attention(...)) with an RMSNorm n2.
        bias: biases on P, W_q, W_k, W_v and W_o. A query with an empty interval still gets no residual at all.
        proj: with P; without it W_k and W_v read H_A directly.
        eps: of the norms.
    Raises:
        TypeError, ValueError: a size that is not a positive int, or sizes that do not divide.
    Source: CALM (arXiv 2401.02412) section 3. The released code's layer is `CrossAttention.from_released`.
    """

    def __init__(
        self,
        anchor_dim: int,
        augmenter_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        pre_norm: bool = True,
        post_norm: bool = False,
        bias: bool = False,
        proj: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in (("anchor_dim", anchor_dim), ("augmenter_dim", augmenter_dim), ("num_heads", num_heads)):
            _check_size(name, value)
        if head_dim is None and anchor_dim % num_heads:
            raise bad_value(
                _NAME, "num_heads", f"a divisor of anchor_dim {anchor_dim} where head_dim is None", str(num_heads)
            )
        head_dim = anchor_dim // num_heads if head_dim is None else head_dim
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_size("head_dim", head_dim)
        _check_size("num_kv_heads", num_kv_heads)
        if num_heads % num_kv_heads:
            raise bad_value(_NAME, "num_kv_heads", f"a divisor of num_heads {num_heads}", str(num_kv_heads))
        self.anchor_dim, self.augmenter_dim = anchor_dim, augmenter_dim
        self.num_heads, self.num_kv_heads, self.head_dim, self.eps = num_heads, num_kv_heads, head_dim, eps
        q_dim, kv_dim, inner = num_heads * head_dim, num_kv_heads * head_dim, anchor_dim if proj else augmenter_dim
        self.norm = nn.RMSNorm(anchor_dim, eps=eps) if pre_norm else None
        self.proj = nn.Linear(augmenter_dim, anchor_dim, bias=bias) if proj else None
        self.q_proj = nn.Linear(anchor_dim, q_dim, bias=bias)
        self.k_proj = nn.Linear(inner, kv_dim, bias=bias)
        self.v_proj = nn.Linear(inner, kv_dim, bias=bias)
        self.o_proj = nn.Linear(q_dim, anchor_dim, bias=bias)
        self.post_norm = nn.RMSNorm(anchor_dim, eps=eps) if post_norm else None
        self._folded_q, self._folded_kv = FoldedWeights(), FoldedWeights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers as torch initialises them, biases zero, norms one, W_o zero."""
        for module in self.children():
            module.reset_parameters()
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.o_proj.weight)

    def extra_repr(self) -> str:
        return (
            f"anchor_dim={self.anchor_dim}, augmenter_dim={self.augmenter_dim}, num_heads={self.num_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}"
        )

    def forward(
        self,
        anchor_hidden: torch.Tensor,
        augmenter_hidden: torch.Tensor,
        lo: torch.Tensor | None = None,
        hi: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        *,
        causal: bool = False,
    ) -> torch.Tensor:
        """The anchor's hidden states with the layer's residual added.

        Args:
            anchor_hidden: H_B (B, M, DB), any float dtype. The computation runs in this dtype, under autocast in
                autocast's; the parameters may have another.
            augmenter_hidden: H_A (B, n, DA); with a cache only the new tokens (n = 0 allowed).
            lo, hi: (B, M) or (M,) int32, the interval of augmenter tokens each query sees, counted from the cache's
                first token; None = from the first, to the last.
            cache: keys and values of earlier calls; this call's are appended.
            causal: shorthand for hi_i = i + 1 + (N - M), N counting the cache's tokens too; excludes lo and hi.
        Returns:
            (B, M, DB) in anchor_hidden's dtype. A query with an empty interval keeps its hidden state exactly.
        Raises:
            TypeError, ValueError: a wrong shape, dtype or device, named.
        """
        self._check(anchor_hidden, augmenter_hidden)
        device_type = anchor_hidden.device.type
        dtype = anchor_hidden.dtype
        if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):  # every cast below is explicit
            q = self._queries(anchor_hidden, dtype)
            k, v = self._keys_values(augmenter_hidden.to(dtype))
            if cache is not None:
                k, v = (t.transpose(1, 2) for t in cache.update(k.transpose(1, 2), v.transpose(1, 2)))
            out = ops.cross_attention(q, k, v, lo=lo, hi=hi, causal=causal)
            biased = self.o_proj.bias is not None  # without one, a row that attends to nothing adds 0 by itself
            sees = _sees_something(lo, hi, causal, out, k.shape[1]) if biased else None
            return self._add_residual(anchor_hidden, out, sees)

    def clear_folded(self) -> None:
        """Forget folded weights; only needed after writing to a parameter through `.data` without gradients."""
        self._folded_q.clear()
        self._folded_kv.clear()

    def _queries(self, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W_q n(H_B) as (B, M, H, D)."""
        weight, bias = self.q_proj.weight, self.q_proj.bias
        scale = None if self.norm is None else self.norm.weight
        normed = hidden if scale is None else _normalised(hidden, self.eps)
        params = (weight, bias, scale)

        def fold() -> tuple[torch.Tensor | None, ...]:
            return (weight if scale is None else weight * scale).to(dtype), None if bias is None else bias.to(dtype)

        if may_cache(params):
            weight, bias = self._folded_q.get(params, (dtype,), fold)
        else:
            self._folded_q.clear()
            if scale is None or normed.shape[0] * normed.shape[1] > weight.shape[0]:  # fewer rows to scale: fold
                weight, bias = fold()
            else:
                normed, weight, bias = normed * scale.to(normed.dtype), weight.to(dtype), _cast(bias, dtype)
        q = F.linear(normed.to(dtype), weight, bias)
        return q.unflatten(-1, (self.num_heads, self.head_dim))

    def _keys_values(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_k P H_A and W_v P H_A, each (B, n, Hkv, D), in the cheaper association order."""
        dtype, heads = hidden.dtype, (self.num_kv_heads, self.head_dim)
        pk, pv, p = self.k_proj, self.v_proj, self.proj
        params = (pk.weight, pk.bias, pv.weight, pv.bias, *((p.weight, p.bias) if p is not None else ()))
        cached = may_cache(params)
        if not cached:
            self._folded_kv.clear()
        if cached or self._folding_pays(hidden, params):
            weight, bias = (
                self._folded_kv.get(params, (dtype,), lambda: self._fold_keys_values(dtype))
                if cached
                else self._fold_keys_values(dtype)
            )
            k, v = F.linear(hidden, weight, bias).chunk(2, dim=-1)
        else:
            inner = hidden if p is None else F.linear(hidden, p.weight.to(dtype), _cast(p.bias, dtype))
            k, v = (F.linear(inner, m.weight.to(dtype), _cast(m.bias, dtype)) for m in (pk, pv))
        return k.unflatten(-1, heads), v.unflatten(-1, heads)

    def _folding_pays(self, hidden: torch.Tensor, params: tuple[torch.Tensor | None, ...]) -> bool:
        if self.proj is None:  # nothing to multiply: stacking W_k and W_v is a copy, two products are not slower
            return False
        device_type, param_dtype = hidden.device.type, self.proj.weight.dtype
        return key_value_cost(
            hidden.shape[0] * hidden.shape[1],
            self.augmenter_dim,
            self.anchor_dim,
            self.num_kv_heads * self.head_dim,
            training=torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in params),
            augmenter_grad=torch.is_grad_enabled() and hidden.requires_grad,
            cached=False,
            param_slowness=slowness(param_dtype, device_type),
            compute_slowness=slowness(hidden.dtype, device_type),
        ).fold

    def _fold_keys_values(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[W_k P; W_v P] (2 Hkv D, DA) and its bias: multiplied in the parameters' dtype, rounded once."""
        weight = torch.cat((self.k_proj.weight, self.v_proj.weight))
        bias = None if self.k_proj.bias is None else torch.cat((self.k_proj.bias, self.v_proj.bias))
        if self.proj is not None:
            if bias is not None:
                bias = torch.addmv(bias, weight, self.proj.bias)
            weight = weight @ self.proj.weight
        return weight.to(dtype), _cast(bias, dtype)

    def _add_residual(self, hidden: torch.Tensor, attended: torch.Tensor, sees: torch.Tensor | None) -> torch.Tensor:
        """H_B + n2(W_o attended + b_o); rows for which `sees` (1 or B, M, 1) is False keep H_B."""
        attended = attended.flatten(-2)
        dtype = attended.dtype
        weight, bias = self.o_proj.weight.to(dtype), _cast(self.o_proj.bias, dtype)
        if self.post_norm is None and bias is None and hidden.dtype == dtype:
            flat = torch.addmm(hidden.flatten(0, 1), attended.flatten(0, 1), weight.t())
            return flat.view_as(hidden)
        update = F.linear(attended, weight, bias)
        if self.post_norm is not None:
            update = _normalised(update, self.eps) * self.post_norm.weight.to(dtype)
        if bias is not None and sees is not None:
            update = update.masked_fill(~sees, 0.0)
        return hidden + update.to(hidden.dtype)

    def _check(self, anchor: torch.Tensor, augmenter: torch.Tensor) -> None:
        for name, value, letters, width in (
            ("anchor_hidden", anchor, "(B, M, DB)", self.anchor_dim),
            ("augmenter_hidden", augmenter, "(B, N, DA)", self.augmenter_dim),
        ):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise bad_type(_NAME, name, f"a floating-point tensor {letters}", value)
            if value.dim() != 3 or value.shape[2] != width:
                raise bad_value(_NAME, name, f"{letters} of width {width}", f"shape {tuple(value.shape)}")
        if augmenter.shape[0] != anchor.shape[0]:
            raise bad_value(
                _NAME, "augmenter_hidden", f"of batch size {anchor.shape[0]}", f"shape {tuple(augmenter.shape)}"
            )
        for name, device in (
            ("augmenter_hidden", augmenter.device),
            ("the layer's parameters", self.q_proj.weight.device),
        ):
            if device != anchor.device:
                raise bad_value(_NAME, name, f"on {anchor.device} like anchor_hidden", f"device {device}")

    @classmethod
    def from_released(cls, state_dict: Mapping[str, torch.Tensor], num_heads: int) -> CrossAttention:
        """The layer that computes what the released google-deepmind/calm hook computes, with its weights.

        That hook is a biased projection, torch's MultiheadAttention without a mask, then Gemma's RMSNorm (whose weight
        is stored minus one) on the attention's output, then the residual. Call the result without lo, hi and causal.

        Args:
            state_dict: the hook's, with keys proj.*, cross_attention.in_proj_*, cross_attention.out_proj.* and
                post_attention_layernorm.weight.
            num_heads: of its MultiheadAttention (a state dict does not say).
        Raises:
            ValueError: keys are missing or unknown.
        """
        wanted = {
            *(f"proj.{s}" for s in ("weight", "bias")),
            *(f"cross_attention.in_proj_{s}" for s in ("weight", "bias")),
            *(f"cross_attention.out_proj.{s}" for s in ("weight", "bias")),
            "post_attention_layernorm.weight",
        }
        if set(state_dict) != wanted:
            off = ", ".join(sorted(wanted ^ set(state_dict)))
            raise ValueError(f"{_NAME}: `state_dict` must be a released CALM hook's; missing or unknown keys: {off}")
        dim, augmenter_dim = state_dict["proj.weight"].shape
        layer = cls(dim, augmenter_dim, num_heads, pre_norm=False, post_norm=True, bias=True)
        layer = layer.to(state_dict["proj.weight"])
        own = {f"proj.{s}": state_dict[f"proj.{s}"] for s in ("weight", "bias")}
        for s in ("weight", "bias"):
            parts = state_dict[f"cross_attention.in_proj_{s}"].chunk(3)
            own |= {f"{name}_proj.{s}": part for name, part in zip("qkv", parts, strict=True)}
            own[f"o_proj.{s}"] = state_dict[f"cross_attention.out_proj.{s}"]
        own["post_norm.weight"] = state_dict["post_attention_layernorm.weight"] + 1
        layer.load_state_dict(own)
        return layer


def _check_size(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(_NAME, name, "a positive int", value)
    if value < 1:
        raise bad_value(_NAME, name, "a positive int", str(value))


def _cast(bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if bias is None else bias.to(dtype)


def _normalised(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """hidden / rms(hidden), in hidden's dtype, computed in float32 (at least)."""
    if hidden.is_cuda:
        return F.rms_norm(hidden, hidden.shape[-1:], None, eps)  # one fused kernel there
    # on a CPU the backward of rms_norm costs more than these three steps (about 1.5x, float32, 8192 x 768)
    compute = torch.promote_types(hidden.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=compute)
    return (hidden * torch.rsqrt(norm.square() / hidden.shape[-1] + eps)).to(hidden.dtype)


def _sees_something(
    lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, out: torch.Tensor, n: int
) -> torch.Tensor | None:
    """Whether each query's interval holds a key, (1 or B, M, 1) bool; None where all of them surely do."""
    m = out.shape[1]
    if causal:
        return None if n >= m and n > 0 else (torch.arange(m, device=out.device) + n >= m)[None, :, None] & (n > 0)
    if lo is None and hi is None:
        return None if n > 0 else torch.zeros((1, m, 1), dtype=torch.bool, device=out.device)
    low = 0 if lo is None else lo
    high = n if hi is None else hi
    seen = low < high
    return seen[None, :, None] if seen.dim() == 1 else seen[:, :, None]
