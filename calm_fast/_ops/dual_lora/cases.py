"""Cases of dual_lora and the rounding analysis of its folded form, forward and backward."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from calm_fast._ops.dual_lora.native import CUDA_MAX_TOKENS, pack_folded, project_folded
from calm_fast._ops.dual_lora.torch_impl import fold_dual_lora
from calm_fast.core.numerics import Case, Inputs, Rounding, Values

_TENSORS = ("x", "y", "a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k", "value0", "value1")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case.

    lead: leading dimensions. m: bottleneck of the value, None for a full W_v. gelu: the released form.
    spread: size of the gate's logits. strided: transposed, sliced and expanded tensors.
    """

    lead: tuple[int, ...] = (13,)
    d_in: int = 24
    d_out: int = 40
    r_pos: int = 5
    r_neg: int = 3
    g: int = 7
    m: int | None = 11
    gelu: bool = False
    scaling: float | tuple[float, float] = 2.0
    spread: float = 1.0
    strided: bool = False


_PAPER: dict[str, Spec] = {
    "plain": Spec(),
    "full-value": Spec(m=None),
    "leading-dims": Spec(lead=(2, 3, 7), scaling=(0.5, 2.0)),
    "one-token": Spec(lead=(1,)),
    "no-leading-dims": Spec(lead=()),
    "no-tokens": Spec(lead=(0, 4)),
    "rank-one": Spec(r_pos=1, r_neg=1, g=1, m=1),
    "one-wide": Spec(d_in=1, d_out=1, r_pos=1, r_neg=1),
    "square": Spec(lead=(33,), d_in=64, d_out=64, r_pos=8, r_neg=8, g=16, m=16),
    "rank-uneven": Spec(lead=(19,), r_pos=2, r_neg=33),
    "rank-large": Spec(lead=(21,), r_pos=67, r_neg=16),
    "narrow-out": Spec(lead=(70,), d_in=48, d_out=17),
    "wide-out": Spec(lead=(5,), d_in=16, d_out=299, m=37),
    "saturated": Spec(spread=30.0),
    "negative-scaling": Spec(scaling=(-1.5, 0.25)),
    "strided": Spec(lead=(3, 11), strided=True),
}
_SPECS = _PAPER | {f"{name} gelu": replace(s, gelu=True) for name, s in _PAPER.items() if s.m is not None}
# half precision proves the casts; the logic is proven in float32, where bounds are tightest
_HALF = ("plain", "square", "rank-large", "wide-out", "full-value", "plain gelu", "square gelu", "rank-large gelu")


class DualLoRACases:
    """The cases of dual_lora; `calm_fast.core.numerics.OpCases` documents the methods."""

    op = "dual_lora"
    impls = ("torch", "triton", "native")
    cuda_kernels = True

    def cases(self) -> list[Case]:
        found = [self.case(name, torch.float32) for name in _SPECS]
        return found + [self.case(name, dtype) for dtype in (torch.bfloat16, torch.float16) for name in _HALF]

    def case(self, name: str, dtype: torch.dtype, **changes: Any) -> Case:
        """Return the case `name` with `changes` to the fields of its Spec."""
        return Case(self.op, name, dtype, replace(_SPECS[name], **changes))

    def fits(self, case: Case, impl: str, device: str) -> bool:
        """Return False for more tokens than the CUDA kernels, which decode, take."""
        return impl != "native" or device == "cpu" or math.prod(case.spec.lead) <= CUDA_MAX_TOKENS

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Return the op's tensors (no value1 for a full W_v), its options and the upstream gradient dout."""
        s: Spec = case.spec
        generator = torch.Generator().manual_seed(zlib.crc32(repr(s).encode()))

        def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
            if s.strided and len(shape) == 2:  # columns of a wider, transposed tensor
                drawn = torch.randn((shape[1] + 3, shape[0]), generator=generator).mT[:, 3:]
            else:
                drawn = torch.randn(shape, generator=generator)
            return drawn.mul_(size).to(device, case.dtype)

        x, y, dout = (normal(*s.lead, width) for width in (s.d_in, s.d_out, s.d_out))
        if s.strided:
            x, y = (t.mT.contiguous().mT for t in (x, y))
            dout = dout[..., :1].expand(y.shape)  # stride 0 in the last dimension
        else:  # rows of different size, so that swapped rows show
            rows = 0.5 + torch.arange(dout[..., 0].numel(), device=device) % 3
            dout = dout * rows.view(*s.lead, 1).to(case.dtype)
        found = {
            "x": x,
            "y": y,
            "a_pos": normal(s.r_pos, s.d_in, size=s.d_in**-0.5),
            "b_pos": normal(s.d_out, s.r_pos, size=s.r_pos**-0.5),
            "a_neg": normal(s.r_neg, s.d_in, size=s.d_in**-0.5),
            "b_neg": normal(s.d_out, s.r_neg, size=s.r_neg**-0.5),
            "w_q": normal(s.g, s.d_in, size=s.spread * (s.d_in * s.g) ** -0.5),
            "w_k": normal(s.g, s.d_out, size=s.d_out**-0.5),
        }
        shapes = [(s.d_out, s.d_out)] if s.m is None else [(s.m, s.d_out), (s.d_out, s.m)]
        found |= {f"value{i}": normal(*shape, size=shape[1] ** -0.5) for i, shape in enumerate(shapes)}
        options = {"scaling": s.scaling, "activation": "gelu" if s.gelu else "none"}
        return found | options | {"dout": dout}

    def run(self, inputs: Inputs, impl: str) -> Values:
        """Return the op's output and gradients. For "native" the output comes from kept factors (`_run_packed`)."""
        from calm_fast.ops import dual_lora

        def call(t: Tensors) -> torch.Tensor:
            return dual_lora(
                *(t["x"], t["y"], t["a_pos"], t["b_pos"], t["a_neg"], t["b_neg"], t["w_q"], t["w_k"], _value(t)),
                scaling=inputs["scaling"],
                activation=inputs["activation"],
                impl=impl,
            )

        values = _with_gradients(call, inputs)
        if impl == "native":
            values["out"] = _run_packed(inputs)
        return values

    def eager(self, inputs: Inputs) -> Values:
        """Return the values of the equations as a user writes them: every step in the inputs' dtype."""
        pos, neg = _pair(inputs)

        def call(t: Tensors) -> torch.Tensor:
            x, y, w_q, w_k, value = t["x"], t["y"], t["w_q"], t["w_k"], _value(t)
            h_pos, h_neg = pos * (x @ t["a_pos"].mT @ t["b_pos"].mT), neg * (x @ t["a_neg"].mT @ t["b_neg"].mT)
            gelu = inputs["activation"] == "gelu"
            if gelu:
                h_pos, h_neg = y + h_pos, y + h_neg
            query = x @ w_q.mT
            logits = torch.stack([(query * (h @ w_k.mT)).sum(-1) for h in (h_pos, h_neg)], -1)
            p = logits.softmax(-1)
            p_pos, p_neg = p[..., :1] + 0.5, p[..., 1:] - 0.5
            if gelu:
                f_pos, f_neg = (F.gelu(h @ value[0].mT) @ value[1].mT for h in (h_pos, h_neg))
                return y + p_pos * f_pos + p_neg * f_neg
            mixed = p_pos * h_pos + p_neg * h_neg
            for factor in value:
                mixed = mixed @ factor.mT
            return y + mixed

        return _with_gradients(call, inputs)

    def exact(self, inputs: Inputs) -> Values:
        """Mark dy of the paper's form: y is only added, so its gradient is the upstream one."""
        return {} if inputs["activation"] == "gelu" else {"dy": torch.ones_like(inputs["y"], dtype=torch.bool)}

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """Return the sums of squares over all roundings of the folded form, estimated with random signs (`_Probe`)."""
        return _rounding(inputs)


def _pair(inputs: Inputs) -> tuple[float, float]:
    scaling = inputs["scaling"]
    return scaling if isinstance(scaling, tuple) else (scaling, scaling)


def _value(tensors: Inputs) -> tuple[torch.Tensor, ...]:
    return tuple(tensors[name] for name in ("value0", "value1") if name in tensors)


@torch.no_grad()
def _run_packed(inputs: Inputs) -> torch.Tensor:
    """Return the output from factors that were folded and packed once, as DualLoRALinear keeps them."""
    from calm_fast._ops.dual_lora.api import dual_lora_folded

    t = inputs
    folded = fold_dual_lora(
        *(t["a_pos"], t["b_pos"], t["a_neg"], t["b_neg"], t["w_q"], t["w_k"], _value(t), _pair(t), t["activation"])
    )
    folded = pack_folded(folded)
    zg = project_folded(t["x"], folded)
    return dual_lora_folded(zg, t["y"], folded, t["a_pos"].shape[0], impl="native")


def _with_gradients(call: Callable[[Tensors], torch.Tensor], inputs: Inputs) -> Values:
    leaves = {name: inputs[name].detach().requires_grad_() for name in _TENSORS if name in inputs}
    out = call(leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs["dout"].to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


# ---- the rounding analysis -------------------------------------------------------------------------------------------
# R and A of the error rule are sums over every rounding of (its size x the result's derivative with respect to it)^2.
# Multiply each rounding by an independent random sign and differentiate along that direction: the mean square of the
# result is exactly this sum. The mean over _SAMPLES directions estimates it to about 1 / sqrt(_SAMPLES / 2).
# The direction goes through the backward pass too, so no gradient formula is repeated here.

_SAMPLES = 12
_STEP = 1e-6  # a difference quotient in float64: truncation and cancellation both leave about 1e-6
_ULPS = 4.0  # float32 exp, erf and division on any device


def _order_variance(length: int, total: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Return what rounding every product and every partial sum of `length` products once contributes.

    That is the sum of the squared products and of the squared partial sums, the latter averaged over all orders of
    addition. The k-th partial sum has mean k / n total and variance k (n - k) / (n (n - 1)) (squares - total^2 / n).

    Args:
        total: the sum of the products. squares: the sum of their squares.
    """
    n = length
    spread = (squares - total.square() / n).clamp(min=0.0)
    return squares + (n + 1) * (2 * n + 1) / (6 * n) * total.square() + (n + 1) / 6 * spread


class _Probe:
    """Move every value that an implementation rounds by _STEP x its rounding's size x a random sign.

    kind: "inputs" moves what is rounded to the inputs' dtype, "accumulate" what is rounded to float32.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)

    def move(self, t: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        sign = torch.randint(0, 2, t.shape, generator=self.generator).to(t) * 2 - 1
        return t + _STEP * sign * size

    def product(self, a: torch.Tensor, b: torch.Tensor, stored: bool = True) -> torch.Tensor:
        out = a @ b
        if self.kind == "inputs":
            return self.move(out, out) if stored else out
        return self.move(out, _order_variance(max(a.shape[-1], 1), out, a.square() @ b.square()).sqrt())


class _Still(_Probe):
    """A probe that moves nothing: the values that a `_Probe` moves away from."""

    def move(self, t: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return t


class _Product(torch.autograd.Function):
    """a b^T, rounded where it is stored by itself. Both of its gradients are always rounded."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, probe: _Probe, stored: bool) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        ctx.probe = probe
        return probe.product(a, b.mT, stored)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b = ctx.saved_tensors
        return ctx.probe.product(grad, b), ctx.probe.product(grad.mT, a), None, None


class _Round(torch.autograd.Function):
    """A value with `ulps` roundings of the given kind. Its gradient has one."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, probe: _Probe, kind: str, ulps: float) -> torch.Tensor:
        ctx.probe, ctx.moves = probe, kind == probe.kind
        return probe.move(t, ulps * t) if ctx.moves else t.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.probe.move(grad, grad) if ctx.moves else grad, None, None, None


class _NegativeWeight(torch.autograd.Function):
    """a_neg = p - 1/2 = tanh(logit / 2) / 2, p = sigmoid(logit).

    Its gradient p (1 - p) comes from the rounded p, so near p = 1 its error is absolute.
    """

    @staticmethod
    def forward(ctx: Any, logit: torch.Tensor, probe: _Probe) -> torch.Tensor:
        ctx.probe, ctx.p = probe, logit.sigmoid()
        weight = (logit / 2).tanh() / 2
        return weight if probe.kind == "inputs" else probe.move(weight, _ULPS * weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out = grad * ctx.p * (1 - ctx.p)
        return out if ctx.probe.kind == "inputs" else ctx.probe.move(out, _ULPS * grad * ctx.p), None


class _Gelu(torch.autograd.Function):
    """x Phi(x) with Phi = (1 + erf) / 2, whose error is absolute, not relative, where Phi is small."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, probe: _Probe) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.probe = probe
        out = F.gelu(x)
        return probe.move(out, out if probe.kind == "inputs" else _ULPS * x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        density = x * torch.exp(-x.square() / 2) * (2 * torch.pi) ** -0.5
        share = (1 + torch.erf(x * 2**-0.5)) / 2
        out = grad * (share + density)
        return ctx.probe.move(out, out if ctx.probe.kind == "inputs" else _ULPS * grad * (1 + density.abs())), None


def _run_probe(inputs: Inputs, probe: _Probe) -> Values:
    """Return the values of the folded form of dual_lora with every rounding moved by `probe`."""
    (pos, neg), gelu = _pair(inputs), inputs["activation"] == "gelu"

    def product(a: torch.Tensor, b: torch.Tensor, stored: bool = True) -> torch.Tensor:
        return _Product.apply(a, b, probe, stored)

    def stored(t: torch.Tensor) -> torch.Tensor:
        return _Round.apply(t, probe, "inputs", 1.0)

    def fork(t: torch.Tensor) -> torch.Tensor:  # two readers, so the sum of their gradients is rounded
        return _Round.apply(t, probe, "inputs", 0.0)

    def wide(t: torch.Tensor) -> torch.Tensor:
        return _Round.apply(t, probe, "accumulate", 1.0)

    def call(tensors: Tensors) -> torch.Tensor:
        a_pos, a_neg, value = tensors["a_pos"], tensors["a_neg"], _value(tensors)
        shape, r_pos, r_neg = tensors["y"].shape, a_pos.shape[0], a_neg.shape[0]
        x, y = (fork(t.reshape(-1, t.shape[-1])) for t in (tensors["x"], tensors["y"]))
        b = stored(torch.cat((pos * tensors["b_pos"], neg * tensors["b_neg"]), 1))
        keys_pos, keys_neg = product(tensors["w_k"], b.mT).split((r_pos, r_neg), 1)
        gate = product(torch.cat((-keys_pos, keys_neg), 1).mT, tensors["w_q"].mT)
        z, g = (fork(t) for t in product(x, torch.cat((a_pos, a_neg, gate))).chunk(2, -1))
        terms = z * g
        logit = terms.sum(-1, keepdim=True)
        if probe.kind == "accumulate":
            squares = terms.square().sum(-1, keepdim=True)
            logit = probe.move(logit, _order_variance(r_pos + r_neg, logit, squares).sqrt().detach())
        weight_neg = _NegativeWeight.apply(logit, probe)
        weight_pos, weight_neg = wide(1 - weight_neg), wide(weight_neg)
        z_pos, z_neg = z.split((r_pos, r_neg), 1)
        if not gelu:
            for factor in value:
                b = product(factor, b.mT)
            mixed = stored(torch.cat((weight_pos * z_pos, weight_neg * z_neg), 1))
            return (y + product(mixed, b, stored=False)).view(shape)
        c1 = fork(value[0])
        up_pos, up_neg = product(c1, b.mT).split((r_pos, r_neg), 1)
        u = fork(product(y, c1))
        h_pos, h_neg = (stored(u + product(t, up, stored=False)) for t, up in ((z_pos, up_pos), (z_neg, up_neg)))
        mixed = stored(weight_pos * _Gelu.apply(h_pos, probe) + weight_neg * _Gelu.apply(h_neg, probe))
        return (y + product(mixed, value[1], stored=False)).view(shape)

    return _with_gradients(call, inputs)


def _rounding(inputs: Inputs) -> dict[str, Rounding]:
    """Return R and A of every quantity: the mean square of its difference quotients over _SAMPLES directions."""
    sums = {}
    for kind in ("inputs", "accumulate"):
        still = _run_probe(inputs, _Still(kind, 0))
        total = {name: torch.zeros_like(t) for name, t in still.items()}
        for seed in range(_SAMPLES):
            for name, t in _run_probe(inputs, _Probe(kind, seed)).items():
                total[name] += ((t - still[name]) / _STEP).square() / _SAMPLES
        sums[kind] = total
    return {name: Rounding(sums["inputs"][name], sums["accumulate"][name]) for name in sums["inputs"]}


CASES = DualLoRACases()
