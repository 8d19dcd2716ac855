"""A frozen linear layer with a positive and a negative LoRA and the gate that integrates them (NAT)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from calm_fast._ops.dual_lora.api import dual_lora_folded
from calm_fast._ops.dual_lora.linear import dual_lora_linear, joins_linear
from calm_fast._ops.dual_lora.native import pack_folded, project_folded
from calm_fast._ops.dual_lora.torch_impl import Folded, fold_dual_lora, negative_share
from calm_fast.core.checks import bad_type, bad_value, check_finite_number
from calm_fast.core.devices import product_dtype
from calm_fast.modules.fixed_weights import PLAIN, FoldedWeights

_NAME = "DualLoRALinear"
MODES = ("neg", "pos", "mix")
VARIANTS = ("paper", "released")
GATE_BINS = 20


@dataclass(frozen=True)
class GateStatistics:
    """Distribution of p_neg over the tokens a layer saw; at p_neg = 1/2 the gate is undecided.

    tokens: number of tokens. mean, std: of p_neg, NaN without tokens.
    histogram: token counts in GATE_BINS equal bins of [0, 1].
    """

    tokens: int
    mean: float
    std: float
    histogram: tuple[int, ...]


class DualLoRALinear(nn.Module):
    """A frozen linear layer `base` with a positive and a negative LoRA and the gate that integrates them.

        mode "mix": calm_fast.ops.dual_lora of base(x), in the form `variant` ("paper" or "released")
        mode "pos": base(x) + s_pos B_pos A_pos x        mode "neg": base(x) + s_neg B_neg A_neg x

    The mode also decides what trains: "neg" trains the negative LoRA, "pos" the positive one, and "mix" the positive
    LoRA, the gate and the value while the negative LoRA is frozen. A new layer is in mode "mix" and equals its base
    exactly, whatever the negative LoRA holds: C2 (or the full W_v) starts at zero. B_pos starts at zero in "released".
    In "paper" it must not, because B_pos = 0 and C2 = 0 together make every gradient zero, so mode "pos" of a new
    "paper" layer differs from its base. After two optimizer steps every trainable factor has a gradient.

    Parameters, with their names in the state dict: lora_a_pos (R_pos, d_in), lora_b_pos (d_out, R_pos), lora_a_neg,
    lora_b_neg, gate_q (G, d_in), gate_k (G, d_out), and value_down C1 (m, d_out) with value_up C2 (d_out, m), or
    value_full W_v (d_out, d_out). lora_a_* and lora_b_* are PEFT's lora_A.weight and lora_B.weight, and the scaling
    alpha / rank is PEFT's.

    Args:
        base: maps (..., d_in) to (..., d_out): nn.Linear or a quantised linear. Its parameters are frozen here.
        rank, alpha: of the positive LoRA, s = alpha / rank.
        rank_neg, alpha_neg: of the negative LoRA, by default the same.
        gate_dim: G.
        value_dim: m, the width of the value bottleneck; None for a full W_v ("paper" only).
        variant: "paper" (gate and value on h, no activation) or "released" (on base(x) + h, exact gelu).
        dropout: applied while training to the input of the two LoRAs. The gate's query reads x itself.
        in_features, out_features: d_in and d_out, for a `base` without these attributes.
        dtype: of the parameters, by default float32 (float64 over a float64 base).
        device: of the parameters, by default the base's.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    Each call in mode "mix" folds the factors; inside `calm_fast.fixed_weights` calls without gradients fold them once.
    Runs wherever `base` and `calm_fast.ops.dual_lora` run, and is deterministic without dropout.
    Source: NAT (arXiv 2312.12832) section 3.2 and its released code.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        rank_neg: int | None = None,
        alpha_neg: float | None = None,
        gate_dim: int = 128,
        value_dim: int | None = 128,
        variant: str = "paper",
        dropout: float = 0.0,
        in_features: int | None = None,
        out_features: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Module):
            raise bad_type(_NAME, "base", "an nn.Module that maps (..., d_in) to (..., d_out)", base)
        d_in, d_out = _width(base, "in_features", in_features), _width(base, "out_features", out_features)
        rank_neg = rank if rank_neg is None else rank_neg
        alpha_neg = alpha if alpha_neg is None else alpha_neg
        check_settings(_NAME, rank, alpha, rank_neg, alpha_neg, gate_dim, value_dim, variant, dropout)

        self.in_features, self.out_features, self.rank, self.rank_neg = d_in, d_out, rank, rank_neg
        self.alpha, self.alpha_neg, self.variant, self.dropout = alpha, alpha_neg, variant, float(dropout)
        self.gate_dim, self.value_dim = gate_dim, value_dim
        self.base = base.requires_grad_(False)
        like = next((p for p in base.parameters() if p.is_floating_point()), None)
        device = device or getattr(next(base.parameters(), next(base.buffers(), None)), "device", None)
        dtype = dtype or (torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        self.lora_a_pos, self.lora_b_pos = parameter(rank, d_in), parameter(d_out, rank)
        self.lora_a_neg, self.lora_b_neg = parameter(rank_neg, d_in), parameter(d_out, rank_neg)
        self.gate_q, self.gate_k = parameter(gate_dim, d_in), parameter(gate_dim, d_out)
        if value_dim is None:
            self.value_full = parameter(d_out, d_out)
        else:
            self.value_down, self.value_up = parameter(value_dim, d_out), parameter(d_out, value_dim)
        self.record_gates = False
        self._gate_sums: tuple[torch.Tensor, torch.Tensor] | None = None
        self._folded = FoldedWeights()
        self.reset_parameters()
        self.set_mode("mix")

    @property
    def weight(self) -> Any:
        """The weight of the base: some families read its dtype (T5) or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The bias of the base."""
        return self.base.bias

    def __setattr__(self, name: str, value: Any) -> None:
        """Set `weight` and `bias` of the base, which is what tie_weights() of transformers asks for."""
        if name in ("weight", "bias"):
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every factor as a new layer does.

        A, W_q, W_k, C1 and, in "paper", B_pos are kaiming-uniform. B_neg, C2 or W_v and, in "released", B_pos are zero.
        """
        zero = {"lora_b_neg", "value_up", "value_full"} | ({"lora_b_pos"} if self.variant == "released" else set())
        for name, p in self.named_parameters(recurse=False):
            if name in zero:
                nn.init.zeros_(p)
            else:
                nn.init.kaiming_uniform_(p, a=math.sqrt(5))

    def set_mode(self, mode: str) -> DualLoRALinear:
        """Set what forward computes and which parameters train: "neg", "pos" or "mix". Return the layer."""
        check_mode(_NAME, mode)
        self._mode = mode
        for name, p in self.named_parameters(recurse=False):
            if not name.startswith(("lora_", "gate_", "value_")):
                continue  # transformers' tie_weights gives an LM head the embeddings' weight, under the name `weight`
            negative = name.endswith("_neg")
            p.requires_grad_(negative if mode == "neg" else not negative and (mode == "mix" or name.endswith("_pos")))
        return self

    @property
    def mode(self) -> str:
        """The current mode; `set_mode` changes it."""
        return self._mode

    @property
    def scaling(self) -> tuple[float, float]:
        """(s_pos, s_neg), alpha / rank of the two LoRAs."""
        return self.alpha / self.rank, self.alpha_neg / self.rank_neg

    @property
    def value(self) -> tuple[torch.Tensor, ...]:
        """(W_v,) or (C1, C2), as `calm_fast.ops.dual_lora` takes them."""
        return (self.value_full,) if self.value_dim is None else (self.value_down, self.value_up)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"rank_neg={self.rank_neg}, gate_dim={self.gate_dim}, value_dim={self.value_dim}, "
            f"variant={self.variant!r}, mode={self._mode!r}, dropout={self.dropout}"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output in its mode.

        Args:
            x: (..., d_in), any float dtype, on the parameters' device.
        Returns:
            (..., d_out) in the dtype of base(x). The LoRA part is computed in this dtype too, whatever the dtype of
            the parameters; in float32 for 16 bits on a CPU that has no products of them. Under autocast, an nn.Linear
            as `base` returns autocast's dtype.
        Raises:
            TypeError, ValueError: x or base's output has a wrong width, dtype or device; the message names it.
        """
        self._check(x)
        base = self.base
        if isinstance(base, nn.Linear) and self._joins(x, base):
            out, zg = dual_lora_linear(x, base.weight, base.bias, self._fold(x.dtype), self.rank)
            if self.record_gates:
                self._record(zg)
            return out
        y = base(x)
        self._check_output(x, y)
        with torch.autocast(x.device.type, enabled=False):  # every cast below is explicit
            dtype, compute = y.dtype, product_dtype(y.device.type, y.dtype)
            x, y = x.to(dtype).to(compute), y.to(compute)
            lora_x = F.dropout(x, self.dropout) if self.training and self.dropout > 0 else None
            if self._mode != "mix":
                return self._plain(x if lora_x is None else lora_x, y).to(dtype)
            folded = self._fold(compute)
            zg = project_folded(x, folded, lora_x)
            if self.record_gates:
                self._record(zg)
            return dual_lora_folded(zg, y, folded, self.rank).to(dtype)

    def _joins(self, x: torch.Tensor, base: nn.Linear) -> bool:
        """Return True if `dual_lora_linear` may compute base(x) too: a plain product that nothing else observes."""
        if not x.is_cuda or type(base) is not nn.Linear or self._mode != "mix" or self.variant != "paper":
            return False
        tensors = (base.weight,) if base.bias is None else (base.weight, base.bias)
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return (
            all(type(t) in PLAIN and t.dtype == x.dtype and t.device == x.device for t in tensors)
            and base.weight.shape == (self.out_features, self.in_features)
            and not hooked
            and "forward" not in vars(base)  # accelerate wraps it
            and not (self.training and self.dropout > 0)
            and not torch.is_autocast_enabled(x.device.type)
            and joins_linear(x, self.rank + self.rank_neg)
        )

    def clear_folded(self) -> None:
        """Drop the folded factors that `calm_fast.fixed_weights` kept."""
        self._folded.clear()

    def gate_statistics(self) -> GateStatistics:
        """Return statistics of p_neg over the tokens seen since `clear_gates`, in mode "mix" with `record_gates` True.

        Every token counts, also padding and the second forward pass of gradient checkpointing. Synchronises.
        """
        if self._gate_sums is None:
            return GateStatistics(0, math.nan, math.nan, (0,) * GATE_BINS)
        moments, histogram = (t.tolist() for t in self._gate_sums)
        tokens = sum(histogram)
        mean = moments[0] / tokens if tokens else math.nan
        # moments are taken around 1/2, where an untrained gate sits
        std = math.sqrt(max(moments[1] / tokens - mean**2, 0.0)) if tokens else math.nan
        return GateStatistics(tokens, mean + 0.5, std, tuple(histogram))

    def clear_gates(self) -> None:
        """Reset the gate statistics."""
        self._gate_sums = None

    def _plain(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return y + s B A x of the mode's LoRA, with the residual inside the second product."""
        a, b = (self.lora_a_pos, self.lora_b_pos) if self._mode == "pos" else (self.lora_a_neg, self.lora_b_neg)
        z = F.linear(x, a.to(x.dtype)).reshape(-1, a.shape[0]) * self.scaling[self._mode == "neg"]
        return torch.addmm(y.reshape(-1, y.shape[-1]), z, b.to(x.dtype).mT).view(y.shape)

    def _fold(self, dtype: torch.dtype) -> Folded:
        """Return the factors, folded in the parameters' dtype (`product_dtype`) and rounded once.

        Kept inside `fixed_weights`.
        """
        factors = (self.lora_a_pos, self.lora_b_pos, self.lora_a_neg, self.lora_b_neg, self.gate_q, self.gate_k)
        value, scaling = self.value, self.scaling
        activation = "none" if self.variant == "paper" else "gelu"
        compute = product_dtype(self.gate_q.device.type, self.gate_q.dtype)

        def fold() -> Folded:
            return fold_dual_lora(*factors, value, scaling, activation, compute).to(dtype)

        def fold_to_keep() -> Folded:
            return pack_folded(fold())

        params = (*factors, *value)
        if torch.compiler.is_compiling():
            traced = self._folded.get_traced(params, (dtype, scaling), fold)
            # a graph multiplies by `down` itself
            return fold() if traced is None else traced._replace(packed_down=None)
        if self._folded.keeps(params):
            kept = self._folded.get(params, (dtype, scaling), fold_to_keep)
            if kept is not None:
                return kept
        return fold()

    @torch.no_grad()
    def _record(self, zg: torch.Tensor) -> None:
        """Add p_neg of this batch to the sums, on its device and without synchronising."""
        share = negative_share(zg.detach()).flatten()
        away = share.double() - 0.5
        moments = torch.stack((away.sum(), away.square().sum()))
        bins = (share * GATE_BINS).nan_to_num(0.0).long().clamp(0, GATE_BINS - 1)
        histogram = torch.zeros(GATE_BINS, dtype=torch.int64, device=zg.device).index_add_(
            0, bins, torch.ones_like(bins)
        )
        old = self._gate_sums
        if old is not None and old[0].device == zg.device:
            moments, histogram = old[0] + moments, old[1] + histogram
        self._gate_sums = (moments, histogram)

    def _check(self, x: torch.Tensor) -> None:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise bad_type(_NAME, "x", "a floating-point tensor (..., d_in)", x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise bad_value(_NAME, "x", f"(..., d_in) of width {self.in_features}", f"shape {tuple(x.shape)}")
        if x.device != self.lora_a_pos.device:
            raise bad_value(
                _NAME, "x", f"on {self.lora_a_pos.device} like the layer's parameters", f"device {x.device}"
            )

    def _check_output(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if not isinstance(y, torch.Tensor) or not y.is_floating_point():
            raise bad_type(_NAME, "base", "a module that returns a floating-point tensor (..., d_out)", y)
        if y.shape != (*x.shape[:-1], self.out_features):
            wanted = (*x.shape[:-1], self.out_features)
            raise bad_value(_NAME, "base", f"a module that returns {tuple(wanted)} here", f"shape {tuple(y.shape)}")


def _width(base: nn.Module, name: str, given: int | None) -> int:
    own: Any = getattr(base, name, None)
    if given is None:
        if own is None:
            raise bad_value(_NAME, name, "given where base has no attribute of this name", "None")
        given = own
    check_size(_NAME, name, given)
    if own is not None and own != given:
        raise bad_value(_NAME, name, f"base's {own}", str(given))
    return given


def check_settings(
    where: str,
    rank: Any,
    alpha: Any,
    rank_neg: Any,
    alpha_neg: Any,
    gate_dim: Any,
    value_dim: Any,
    variant: Any,
    dropout: Any,
) -> None:
    """Check the settings of a DualLoRALinear; errors name `where`, the function or class that was given them."""
    for name, size in (("rank", rank), ("rank_neg", rank_neg), ("gate_dim", gate_dim)):
        check_size(where, name, size)
    for name, number in (("alpha", alpha), ("alpha_neg", alpha_neg)):
        check_finite_number(where, name, number)
    check_dropout(where, "dropout", dropout)
    if variant not in VARIANTS:
        raise bad_value(where, "variant", "'paper' or 'released'", repr(variant))
    if value_dim is not None:
        check_size(where, "value_dim", value_dim)
    elif variant == "released":
        raise bad_value(where, "value_dim", "a positive int where variant='released'", "None")


def check_mode(where: str, mode: Any) -> None:
    """Check that `mode` is one of MODES."""
    if mode not in MODES:
        raise bad_value(where, "mode", f"one of {', '.join(map(repr, MODES))}", repr(mode))


def check_size(where: str, name: str, value: Any) -> None:
    """Check that `value` is a positive int (bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_type(where, name, "a positive int", value)
    if value < 1:
        raise bad_value(where, name, "a positive int", str(value))


def check_dropout(where: str, name: str, value: Any) -> None:
    """Check that `value` is a number in [0, 1)."""
    check_finite_number(where, name, value)
    if not 0 <= value < 1:
        raise bad_value(where, name, "in [0, 1)", str(value))
