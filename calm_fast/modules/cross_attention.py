"""The composition layer of CALM: an anchor's hidden states read an augmenter's through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import nn

from calm_fast import ops
from calm_fast._ops.packed_linear.api import linear, linear_into
from calm_fast.core.checks import bad_type, bad_value
from calm_fast.modules.cross_attention_weights import choose_factors, fit, read_parameters
from calm_fast.modules.fixed_weights import FoldedWeights, Parameters
from calm_fast.modules.rms import in_dtype, rms_normalise

_NAME = "CrossAttention"
_FLOAT = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # a module takes states in its parameters' dtype


class KeyValueCache(Protocol):
    """One layer's keys and values for `CrossAttention.forward(cache=...)`; a layer of a transformers cache is one."""

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys, values (B, Hkv, n, D); return all of them (B, Hkv, N, D)."""
        ...


class CrossAttention(nn.Module):
    """The composition layer of CALM: the anchor's hidden states H_B read the augmenter's H_A.

        H_B + W_o Attention(q = W_q n(H_B), k = W_k P H_A, v = W_v P H_A)

    n is an RMSNorm or the identity, P a linear map from the augmenter's width to the anchor's. W_o starts at zero: a
    new layer returns the anchor's hidden states unchanged, bit for bit. W_k P and W_v P are folded into one weight, and
    n's weight into W_q, wherever that costs less (docs/folding.md). A cost model chooses, not a flag. Inside
    `calm_fast.fixed_weights` the folded weights are kept. A child that is more than a plain linear layer or norm (LoRA,
    quantised, parametrized, with a hook) is called instead, and nothing is folded.

    Args:
        anchor_dim: DB, the width of the anchor's hidden states.
        augmenter_dim: DA, the width of the augmenter's hidden states.
        num_heads: H, the number of query heads.
        head_dim: D, default anchor_dim // num_heads.
        num_kv_heads: Hkv, default num_heads, which it must divide.
        pre_norm: apply an RMSNorm n to H_B before W_q.
        post_norm: apply an RMSNorm n2 to the update: H_B + n2(W_o Attention(...)).
        bias: give P, W_q, W_k, W_v and W_o biases. A query with an empty interval still gets no residual at all.
        proj: have a P; without it W_k and W_v read H_A directly.
        eps: added to the mean square in both norms.
    Raises:
        TypeError, ValueError: a size is not a positive int, or sizes do not divide.
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
            expected = f"a divisor of anchor_dim {anchor_dim} if head_dim is None"
            raise bad_value(_NAME, "num_heads", expected, str(num_heads))
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
        self._folded = FoldedWeights()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise linear layers as torch does, biases with zero, norms with one, W_o with zero."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]  # every child is a linear layer or a norm
            if isinstance(bias := getattr(module, "bias", None), torch.Tensor):
                nn.init.zeros_(bias)
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
        """Return the anchor's hidden states with the layer's residual added.

        Args:
            anchor_hidden: H_B (B, M, DB), any float dtype. The computation runs in this dtype, or in autocast's.
                The parameters may have another.
            augmenter_hidden: H_A (B, n, DA), any float dtype; with a cache only the new tokens (n = 0 allowed).
            lo, hi: (B, M) or (M,) int32, the interval of augmenter tokens each query sees, counted from the cache's
                first token. None: from the first, to the last.
            cache: keys and values of earlier calls; this call's are appended.
            causal: shorthand for hi_i = i + 1 + (N - M), where N counts the cache's tokens too; excludes lo and hi.
        Returns:
            (B, M, DB) in anchor_hidden's dtype. A query with an empty interval keeps its hidden state exactly.
        Raises:
            TypeError, ValueError: an argument has a wrong shape, dtype or device; the message names it.
        """
        params = read_parameters(self)
        self._check(anchor_hidden, augmenter_hidden, None if params is None else params[1])
        device_type, dtype = anchor_hidden.device.type, anchor_hidden.dtype
        autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        if params is None or not fit(params, self._sizes()):
            return self._attend_calling(anchor_hidden, augmenter_hidden, dtype, lo, hi, cache, causal)
        if not autocast:
            return self._attend(params, anchor_hidden, augmenter_hidden, dtype, lo, hi, cache, causal)
        with torch.autocast(device_type, enabled=False):  # every cast below is explicit
            return self._attend(params, anchor_hidden, augmenter_hidden, dtype, lo, hi, cache, causal)

    def clear_folded(self) -> None:
        """Drop the folded weights that `calm_fast.fixed_weights` kept."""
        self._folded.clear()

    def _sizes(self) -> tuple[int, int, int, int]:
        d = self.head_dim
        return self.anchor_dim, self.augmenter_dim, self.num_heads * d, self.num_kv_heads * d

    def _attend(
        self,
        params: Parameters,
        hidden: torch.Tensor,
        augmenter: torch.Tensor,
        dtype: torch.dtype,
        lo: torch.Tensor | None,
        hi: torch.Tensor | None,
        cache: KeyValueCache | None,
        causal: bool,
    ) -> torch.Tensor:
        """Run `forward` in `dtype`. A decode step is mostly the Python between its ops: keep it short."""
        batch, m, _ = hidden.shape
        new = augmenter.shape[1]
        heads, kv_heads, d = self.num_heads, self.num_kv_heads, self.head_dim
        inner = augmenter if augmenter.dtype == dtype else augmenter.to(dtype)
        w = choose_factors(self._folded, params, dtype, hidden, inner, cache is not None)
        normed = hidden if self.norm is None else rms_normalise(hidden, self.eps)
        if w.scale is not None:
            normed = normed * in_dtype(w.scale, normed.dtype)
        q = linear(normed if normed.dtype == dtype else normed.to(dtype), w.q, w.q_bias).view(batch, m, heads, d)

        if w.proj is not None:
            inner = linear(inner, w.proj, w.proj_bias)
        if w.v is None:
            k, v = linear(inner, w.k, w.k_bias).view(batch, new, 2, kv_heads, d).unbind(2)
        else:
            k = linear(inner, w.k, w.k_bias).view(batch, new, kv_heads, d)
            v = linear(inner, w.v, w.v_bias).view(batch, new, kv_heads, d)
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2))
            k, v = k.transpose(1, 2), v.transpose(1, 2)

        out = ops.cross_attention(q, k, v, lo=lo, hi=hi, causal=causal).flatten(2)
        if w.o_bias is None and w.post is None and hidden.dtype == dtype:
            return linear_into(hidden, out, w.o)
        update = linear(out, w.o, w.o_bias)
        if w.post is not None:
            update = rms_normalise(update, self.eps) * w.post
        # without a bias, the update of a row that sees no key is 0 by itself
        seeing = None if w.o_bias is None else _rows_that_see(lo, hi, causal, out, k.shape[1])
        if seeing is not None:
            update = update.masked_fill(~seeing, 0.0)
        return hidden + update.to(hidden.dtype)

    def _attend_calling(
        self,
        hidden: torch.Tensor,
        augmenter: torch.Tensor,
        dtype: torch.dtype,
        lo: torch.Tensor | None,
        hi: torch.Tensor | None,
        cache: KeyValueCache | None,
        causal: bool,
    ) -> torch.Tensor:
        """Run `forward` through calls of the children, with their adapters and hooks: results come back in `dtype`."""
        batch, m, _ = hidden.shape
        new, d = augmenter.shape[1], self.head_dim
        db, _, q_dim, kv_dim = self._sizes()
        normed = hidden if self.norm is None else self._call("norm", hidden, db, dtype)
        q = self._call("q_proj", normed, q_dim, dtype).view(batch, m, self.num_heads, d)
        inner = augmenter if self.proj is None else self._call("proj", augmenter, db, dtype)
        k = self._call("k_proj", inner, kv_dim, dtype).view(batch, new, self.num_kv_heads, d)
        v = self._call("v_proj", inner, kv_dim, dtype).view(batch, new, self.num_kv_heads, d)
        if cache is not None:
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2))
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        # meta has no autocast
        with nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
            out = ops.cross_attention(q, k, v, lo=lo, hi=hi, causal=causal).flatten(2)
        update = self._call("o_proj", out, db, dtype)
        if self.post_norm is not None:
            update = self._call("post_norm", update, db, dtype)
        seeing = _rows_that_see(lo, hi, causal, out, k.shape[1])  # a child may add a constant
        if seeing is not None:
            update = update.masked_fill(~seeing, 0.0)
        return hidden + update.to(hidden.dtype)

    def _call(self, name: str, x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Return child `name` of x (..., width_in) as (..., width) in `dtype`; x goes in the child's dtype."""
        child = self._modules[name]
        assert child is not None
        own = next((p.dtype for p in child.parameters() if p.dtype in _FLOAT), dtype)
        out = child(in_dtype(x, own))
        if not isinstance(out, torch.Tensor) or out.shape != (*x.shape[:-1], width):
            expected = f"a module that returns a tensor {(*x.shape[:-1], width)} here"
            got = f"shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise bad_value(_NAME, name, expected, f"{got} from {type(child).__name__}")
        return in_dtype(out, dtype)

    def _check(self, anchor: torch.Tensor, augmenter: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Check both states; weight: a parameter on the layer's device, None where the children are called."""
        if type(anchor) is type(augmenter) is torch.Tensor:  # all at once, for every decode step
            of_anchor, of_augmenter = anchor.shape, augmenter.shape
            if (
                len(of_anchor) == len(of_augmenter) == 3
                and of_anchor[2] == self.anchor_dim
                and of_augmenter[2] == self.augmenter_dim
                and of_anchor[0] == of_augmenter[0]
                and anchor.is_floating_point()
                and augmenter.is_floating_point()
                and anchor.device == augmenter.device
                and (weight is None or weight.device == anchor.device)
            ):
                return
        for name, value, letters, width in (
            ("anchor_hidden", anchor, "(B, M, DB)", self.anchor_dim),
            ("augmenter_hidden", augmenter, "(B, N, DA)", self.augmenter_dim),
        ):
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise bad_type(_NAME, name, f"a floating-point tensor {letters}", value)
            if value.dim() != 3 or value.shape[2] != width:
                raise bad_value(_NAME, name, f"{letters} of width {width}", f"shape {tuple(value.shape)}")
        if augmenter.shape[0] != anchor.shape[0]:
            shape = f"shape {tuple(augmenter.shape)}"
            raise bad_value(_NAME, "augmenter_hidden", f"of batch size {anchor.shape[0]}", shape)
        devices = {"augmenter_hidden": augmenter.device}
        if weight is not None:
            devices["the layer's parameters"] = weight.device
        for name, device in devices.items():
            if device != anchor.device:
                raise bad_value(_NAME, name, f"on {anchor.device} like anchor_hidden", f"device {device}")

    @classmethod
    def from_released(cls, state_dict: Mapping[str, torch.Tensor], num_heads: int) -> CrossAttention:
        """Return a layer that is numerically the released google-deepmind/calm hook, with its weights.

        The hook is a biased projection, torch's MultiheadAttention without a mask, Gemma's RMSNorm (whose weight is
        stored minus one) on the attention's output, and the residual. Call the layer without lo, hi and causal.

        Args:
            state_dict: the hook's, with keys proj.*, cross_attention.in_proj_*, cross_attention.out_proj.* and
                post_attention_layernorm.weight.
            num_heads: of its MultiheadAttention, which a state dict does not hold.
        Raises:
            ValueError: keys are missing or unknown.
        """
        linear = ("proj.", "cross_attention.in_proj_", "cross_attention.out_proj.")
        wanted = {f"{name}{s}" for name in linear for s in ("weight", "bias")} | {"post_attention_layernorm.weight"}
        if set(state_dict) != wanted:
            wrong = ", ".join(sorted(wanted ^ set(state_dict)))
            raise bad_value(_NAME, "state_dict", "a released CALM hook's", f"missing or unknown keys: {wrong}")
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


def _rows_that_see(
    lo: torch.Tensor | None, hi: torch.Tensor | None, causal: bool, out: torch.Tensor, n: int
) -> torch.Tensor | None:
    """Return the queries whose interval holds a key, (1 or B, M, 1) bool, or None if all of them are known to."""
    m = out.shape[1]
    if causal:
        return None if n >= m and n > 0 else (torch.arange(m, device=out.device) + n >= m)[None, :, None] & (n > 0)
    if lo is not None:
        seeing = lo < (n if hi is None else hi)
    elif hi is not None:
        seeing = hi > 0
    else:
        return None if n > 0 else torch.zeros((1, m, 1), dtype=torch.bool, device=out.device)
    return seeing[None, :, None] if seeing.dim() == 1 else seeing[:, :, None]
