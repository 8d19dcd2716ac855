"""The weights of one CrossAttention call: its parameters, or folded, stacked and packed products of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from calm_fast._ops.packed_linear.api import Packed, can_pack, pack
from calm_fast.modules.fixed_weights import PLAIN, FoldedWeights, Parameters
from calm_fast.modules.folding import KeyValueCost, key_value_cost, slowness


class Factors(NamedTuple):
    """Weights (out, in) and biases (out,) in call order, in the computation's dtype; v is None if k holds [W_k; W_v].
    scale is the pre-norm's weight, in any dtype. Kept weights are packed if the compiled library multiplies them."""

    scale: torch.Tensor | None
    q: torch.Tensor | Packed
    q_bias: torch.Tensor | None
    proj: torch.Tensor | Packed | None
    proj_bias: torch.Tensor | None
    k: torch.Tensor | Packed
    k_bias: torch.Tensor | None
    v: torch.Tensor | Packed | None
    v_bias: torch.Tensor | None
    o: torch.Tensor | Packed
    o_bias: torch.Tensor | None
    post: torch.Tensor | None


class Weights(NamedTuple):
    """The layer's parameters, or products of them: the fields of `Factors`, in the parameters' dtype."""

    scale: torch.Tensor | None
    q: torch.Tensor
    q_bias: torch.Tensor | None
    proj: torch.Tensor | None
    proj_bias: torch.Tensor | None
    k: torch.Tensor
    k_bias: torch.Tensor | None
    v: torch.Tensor | None
    v_bias: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Factors:
        """Return the factors in `dtype`, except scale, which is multiplied with H_B in H_B's dtype."""
        rest = [t if t is None or t.dtype == dtype else t.to(dtype) for t in self[1:]]
        return Factors(self.scale, *rest)  # type: ignore[arg-type]  # None stays None and a tensor a tensor


_MATRICES = ("q", "proj", "k", "v", "o")  # fields of Factors that may be packed
# children in the order of Weights, with the type that CrossAttention gives them
_CHILDREN = (
    ("norm", nn.RMSNorm), ("q_proj", nn.Linear), ("proj", nn.Linear), ("k_proj", nn.Linear), ("v_proj", nn.Linear),
    ("o_proj", nn.Linear), ("post_norm", nn.RMSNorm),
)  # fmt: skip


def read_parameters(layer: Any) -> Parameters | None:
    """Return the parameters of a CrossAttention in the order of `Weights`, None for those that it does not have.

    Returns None if a child is more than the plain linear layer or norm that `__init__` made, so that only a call of it
    gives its result: another class (LoRA, quantized, parametrized), a hook, a forward of its own, parameters of another
    kind. Runs in every decode step.
    """
    child_of, eps = layer._modules.get, layer.eps
    found: list[torch.Tensor | None] = []
    for name, kind in _CHILDREN:
        child = child_of(name)
        if child is None:
            found.append(None)
            if kind is nn.Linear:
                found.append(None)
            continue
        if (
            type(child) is not kind
            or child._forward_pre_hooks
            or child._forward_hooks
            or child._backward_hooks
            or child._backward_pre_hooks
            or "forward" in child.__dict__
        ):
            return None
        own = child._parameters
        weight = own.get("weight")
        if type(weight) not in PLAIN:
            return None
        found.append(weight)
        if kind is nn.Linear:
            bias = own.get("bias")
            if bias is not None and type(bias) not in PLAIN:
                return None
            found.append(bias)
        elif child.eps != eps:
            return None
    return tuple(found)


def fit(params: Parameters, sizes: tuple[int, int, int, int]) -> bool:
    """Return True if `params` have the shapes that `__init__` gave them; sizes: DB, DA, H * D, Hkv * D."""
    _, _, _, proj, proj_bias, _, k_bias, _, v_bias, *_ = params
    db, da, q_dim, kv_dim = sizes
    inner = da if proj is None else db
    expected: tuple[tuple[int, ...], ...] = (
        (db,), (q_dim, db), (q_dim,), (db, da), (db,), (kv_dim, inner), (kv_dim,), (kv_dim, inner), (kv_dim,),
        (db, q_dim), (db,), (db,),
    )  # fmt: skip
    if (k_bias is None) != (v_bias is None) or (proj_bias is not None and k_bias is None):
        return False  # biases are folded all together
    for p, shape in zip(params, expected, strict=True):  # runs in every decode step
        if p is not None and p.shape != shape:
            return False
    return True


def choose_factors(
    folded: FoldedWeights, params: Parameters, dtype: torch.dtype, hidden: torch.Tensor, augmenter: torch.Tensor,
    cached: bool,
) -> Factors:  # fmt: skip
    """Return the factors of a call with H_B `hidden` and H_A `augmenter` in `dtype`: kept ones if `folded` keeps any.

    cached: the keys go to a cache.
    """
    if torch.compiler.is_compiling():
        kept = folded.get_traced(params, (dtype, False), lambda: _kept_factors(params, dtype, False))
        return _factors(params, dtype, hidden, augmenter) if kept is None else kept
    if folded.keeps(params):
        # keys of a cache may carry a graph of their own
        packed = dtype == torch.float32 and not (cached and torch.is_grad_enabled()) and can_pack(hidden, augmenter)
        kept = folded.get(params, (dtype, packed), lambda: _kept_factors(params, dtype, packed))
        if kept is not None:
            return kept
    return _factors(params, dtype, hidden, augmenter)


def _kept_factors(params: Parameters, dtype: torch.dtype, packed: bool) -> Factors:
    """Return the factors of calls without gradients: everything folded that makes one call cheaper."""
    w = Weights(*params)  # type: ignore[arg-type]  # in its order; required parameters are never None
    if w.scale is not None:
        w = w._replace(scale=None, q=w.q * w.scale)
    fold = w.proj is not None and _cost(w, 1, cached=True).fold
    factors = stack_keys_values(w, fold).to(dtype)
    if not packed:
        return factors
    packs = {name: pack(t) for name in _MATRICES if (t := getattr(factors, name)) is not None}
    return factors._replace(**packs)  # type: ignore[arg-type]  # these fields may be packed


def _factors(params: Parameters, dtype: torch.dtype, hidden: torch.Tensor, augmenter: torch.Tensor) -> Factors:
    """Return the factors of one call with H_B and H_A; gradients flow through them to the parameters."""
    w = Weights(*params)  # type: ignore[arg-type]  # as above
    if torch.compiler.is_exporting():  # what pays depends on the length, and the program must take any
        return w.to(dtype)
    if w.scale is not None and hidden.shape[0] * hidden.shape[1] > w.q.shape[0]:  # fewer rows to scale: fold
        w = w._replace(scale=None, q=w.q * w.scale)
    # without P there is nothing to fold: stacking W_k and W_v is a copy, and two products are not slower
    if w.proj is not None and folding_pays(w, augmenter):
        w = stack_keys_values(w, True)
    return w.to(dtype)


def folding_pays(w: Weights, augmenter: torch.Tensor) -> bool:
    """Return True if folding P into W_k and W_v costs less than applying it to this call's H_A."""
    grad, device_type = torch.is_grad_enabled(), augmenter.device.type
    training = False
    for t in w if grad else ():
        training = training or (t is not None and t.requires_grad)
    assert w.proj is not None  # otherwise there is nothing to fold
    rates = slowness(w.proj.dtype, device_type), slowness(augmenter.dtype, device_type)
    tokens, augmenter_grad = augmenter.shape[0] * augmenter.shape[1], grad and augmenter.requires_grad
    return _cost(w, tokens, training, augmenter_grad, rates=rates).fold


def _cost(
    w: Weights,
    tokens: int,
    training: bool = False,
    augmenter_grad: bool = False,
    cached: bool = False,
    rates: tuple[float, float] = (1.0, 1.0),
) -> KeyValueCost:
    assert w.proj is not None
    sizes = w.proj.shape[1], w.proj.shape[0], w.k.shape[0]
    flags = {"training": training, "augmenter_grad": augmenter_grad, "cached": cached}
    return key_value_cost(tokens, *sizes, **flags, param_slowness=rates[0], compute_slowness=rates[1])


def stack_keys_values(w: Weights, fold: bool) -> Weights:
    """Return `w` with k = [W_k; W_v], times P if `fold`; in the parameters' dtype, rounded once."""
    assert w.v is not None  # nothing is stacked twice
    weight = torch.cat((w.k, w.v))
    bias = None if w.k_bias is None or w.v_bias is None else torch.cat((w.k_bias, w.v_bias))
    if not fold or w.proj is None:
        return w._replace(k=weight, k_bias=bias, v=None, v_bias=None)
    if bias is not None and w.proj_bias is not None:
        bias = torch.addmv(bias, weight, w.proj_bias)
    return w._replace(k=weight @ w.proj, k_bias=bias, v=None, v_bias=None, proj=None, proj_bias=None)
