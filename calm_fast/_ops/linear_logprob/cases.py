"""Cases of linear_logprob and the rounding analysis of its forward and backward.

Ranks are counts, not rounded numbers: the op's tests compare them with the counts that rounding allows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast._ops.vocabulary.rounding import gradients, logits, pick
from calm_fast.core.numerics import Case, Inputs, Rounding, Values


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case."""

    t: int
    d: int
    v: int
    temperature: float = 1.0
    softcap: float | None = None
    bias: bool = False
    entropy: bool = False
    rank: bool = False  # computed too; its values are not compared here
    ignored: float = 0.2  # share of the tokens; 1 = all
    magnitude: float = 1.0  # of the hidden states
    frozen: bool = False  # no gradient for weight and bias
    strided: bool = False


_SPECS: dict[str, Spec] = {
    "plain": Spec(13, 16, 53),
    "frozen": Spec(13, 16, 53, frozen=True),
    "single": Spec(1, 1, 1, ignored=0.0, entropy=True, rank=True),
    "one-column": Spec(5, 8, 1, entropy=True),
    "one-token": Spec(1, 24, 97, ignored=0.0),
    "nothing-ignored": Spec(19, 24, 71, ignored=0.0, rank=True),
    "all-ignored": Spec(7, 16, 37, ignored=1.0, entropy=True, rank=True),
    "all-ignored-frozen": Spec(7, 16, 37, ignored=1.0, frozen=True),
    "edges": Spec(16, 32, 64),
    "past-edges": Spec(17, 33, 65, entropy=True),
    "long-rows": Spec(3, 8, 1101, magnitude=2.0, entropy=True, rank=True),
    "long-rows-frozen": Spec(3, 8, 1101, magnitude=2.0, frozen=True),
    "wide": Spec(7, 200, 45),
    "temperature": Spec(13, 16, 53, temperature=2.5),
    "temperature-low": Spec(13, 16, 53, temperature=0.3, frozen=True, entropy=True),
    "softcap": Spec(13, 16, 53, softcap=2.0, magnitude=3.0),
    "bias": Spec(13, 16, 53, bias=True),
    "entropy": Spec(13, 16, 53, entropy=True),
    "entropy-frozen": Spec(13, 16, 53, entropy=True, frozen=True),
    "everything": Spec(21, 24, 83, 1.7, softcap=4.0, bias=True, entropy=True, rank=True, magnitude=2.0),
    "sharp": Spec(11, 16, 67, magnitude=12.0, entropy=True),
    # large logits: nearly every token is certain, its gradient is nothing but the error of its probability
    "logits-100": Spec(11, 16, 67, magnitude=1e2, ignored=0.0),
    "logits-1000": Spec(11, 16, 67, 1.7, magnitude=1e3, entropy=True, ignored=0.0),
    "logits-10000": Spec(11, 16, 67, magnitude=1e4, ignored=0.0),
    "logits-10000-frozen": Spec(11, 16, 67, magnitude=1e4, entropy=True, ignored=0.0, frozen=True),
    "strided": Spec(13, 16, 53, strided=True, bias=True, rank=True),
    "strided-frozen": Spec(13, 16, 53, strided=True, frozen=True, entropy=True),
}
# half precision proves the casts; the logic is proven in float32, where bounds are tightest
_HALF = ("plain", "frozen", "past-edges", "long-rows-frozen", "wide", "everything", "sharp", "all-ignored")


class LinearLogprobCases:
    """The `OpCases` (calm_fast.core.numerics) of linear_logprob."""

    op = "linear_logprob"
    impls = ("torch", "triton", "native")

    def cases(self) -> list[Case]:
        """Return every case in float32, and some in bfloat16 and float16."""
        found = [self.case(name, torch.float32) for name in _SPECS]
        return found + [self.case(name, dtype) for dtype in (torch.bfloat16, torch.float16) for name in _HALF]

    def case(self, name: str, dtype: torch.dtype, **changes: Any) -> Case:
        """Return the case `name` with fields of its Spec replaced by `changes`."""
        return Case(self.op, name, dtype, replace(_SPECS[name], **changes))

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Return the op's arguments, and upstream gradients that differ per token, from a fixed seed."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr(s).encode()))

        def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
            if s.strided and len(shape) == 2:
                # every other column of a transposed matrix
                return (torch.randn(2 * shape[1], shape[0], generator=g) * size).to(device, case.dtype).T[:, ::2]
            return (torch.randn(shape, generator=g) * size).to(device, case.dtype)

        targets = torch.randint(0, s.v, (s.t,), generator=g)
        targets[torch.rand(s.t, generator=g) < s.ignored] = -100
        upstream = torch.randn(2, s.t, generator=g).to(device) * (0.5 + torch.arange(s.t, device=device) % 3)
        return {
            "hidden": normal(s.t, s.d, size=s.magnitude),
            "weight": normal(s.v, s.d, size=s.d**-0.5),
            "targets": targets.to(device),
            "bias": normal(s.v) if s.bias else None,
            "temperature": s.temperature,
            "softcap": s.softcap,
            "return_entropy": s.entropy,
            "return_rank": s.rank,
            "frozen": s.frozen,
            "dlogprob": upstream[0],
            "dentropy": upstream[1] if s.entropy else None,
        }

    def run(self, inputs: Inputs, impl: str) -> Values:
        """Return the op's outputs and gradients."""
        from calm_fast._ops.linear_logprob.api import linear_logprob

        def call(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            result = linear_logprob(**arguments, impl=impl)
            return result[: 1 + inputs["return_entropy"]] if isinstance(result, tuple) else (result,)

        return _with_gradients(inputs, call)

    def eager(self, inputs: Inputs) -> Values:
        """Return the same values from log-softmax on full logits, as a user writes it, in the inputs' dtype."""

        def call(arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            z = torch.nn.functional.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
            z = z if inputs["softcap"] is None else inputs["softcap"] * torch.tanh(z / inputs["softcap"])
            log_p = (z / inputs["temperature"]).log_softmax(-1)
            valid = inputs["targets"] != -100
            picked = log_p.gather(1, inputs["targets"].clamp(min=0).unsqueeze(1)).squeeze(1)
            results = [picked.masked_fill(~valid, 0.0)]
            if inputs["return_entropy"]:
                results.append((-(log_p.exp() * log_p).sum(-1)).masked_fill(~valid, 0.0))
            return tuple(results)

        return _with_gradients(inputs, call)

    def exact(self, inputs: Inputs) -> Values:
        """Return masks of the exact elements: ignored tokens, and every gradient where no token is valid."""
        ignored = inputs["targets"] == -100
        found = {"logprob": ignored, "dhidden": ignored.unsqueeze(-1).expand(inputs["hidden"].shape)}
        if inputs["return_entropy"]:
            found["entropy"] = ignored
        if bool(ignored.all()) and not inputs["frozen"]:
            found["dweight"] = torch.ones_like(inputs["weight"], dtype=torch.bool)
        return found

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """Return the rounding terms R and A of every output and gradient."""
        return _rounding(inputs)


def _with_gradients(inputs: Inputs, call: Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]) -> Values:
    names = ["hidden"] if inputs["frozen"] else ["hidden", "weight"] + ["bias"] * (inputs["bias"] is not None)
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    rest = {name: value for name, value in inputs.items() if name not in ("frozen", "dlogprob", "dentropy")}
    results = call(rest | leaves)
    upstream = [inputs["dlogprob"], inputs["dentropy"]][: len(results)]
    upstream = [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
    grads = torch.autograd.grad(results, list(leaves.values()), upstream)
    outputs = dict(zip(("logprob", "entropy"), (r.detach() for r in results), strict=False))
    return outputs | {f"d{name}": g for name, g in zip(names, grads, strict=True)}


def _rounding(inputs: Inputs) -> dict[str, Rounding]:
    """Propagate errors from the logit product to the outputs and gradients, to first order.

    dz = (dlogprob (1_target - p) - dentropy p (log p + entropy)) / temperature
    """
    valid, names = inputs["targets"] != -100, ("logprob", "entropy", "dhidden", "dweight", "dbias")
    hidden, targets = inputs["hidden"][valid], inputs["targets"][valid]
    if targets.numel() == 0:
        return {name: Rounding(0.0, 0.0) for name in names}
    tau = 1.0 / inputs["temperature"]
    head = logits(hidden, inputs["weight"], inputs["bias"], inputs["softcap"])
    log_p, log_error = head.log_softmax(tau)
    logprob_error = log_error.map(lambda t: pick(t, targets))
    negative, entropy_error = head.mean(log_p, log_error, tau)
    entropy = -negative

    p, p_error = head.softmax(tau)
    one = torch.zeros_like(p).scatter_(1, targets.unsqueeze(-1), 1.0)
    up = (inputs["dlogprob"][valid] * tau).unsqueeze(-1)
    dz, dz_error = up * (one - p), (p_error * up).add_roundings(up * (one + p))
    if inputs["dentropy"] is not None:
        down = (inputs["dentropy"][valid] * tau).unsqueeze(-1)
        bracket = log_p + entropy.unsqueeze(-1)
        error = (log_error + entropy_error.to_column()).add_roundings(log_p.abs() + entropy.abs().unsqueeze(-1))
        dz = dz - down * p * bracket
        dz_error = dz_error + p_error * (down * bracket) + (error * p * down).add_roundings(down * p * bracket)
    raw, raw_error = head.backward(dz, dz_error)
    bounds = gradients(raw, raw_error, hidden, inputs["weight"])
    bounds |= {"logprob": logprob_error, "entropy": entropy_error}
    found = {name: bound.to_rounding() for name, bound in bounds.items()}

    def scatter(values: torch.Tensor | float) -> torch.Tensor:
        values = torch.as_tensor(values)
        mask = valid if values.dim() == 1 else valid.unsqueeze(-1)
        return values.new_zeros((valid.numel(), *values.shape[1:])).masked_scatter(mask, values)

    for name in ("logprob", "entropy", "dhidden"):
        found[name] = Rounding(scatter(found[name].inputs), scatter(found[name].accumulate))
    return found


CASES = LinearLogprobCases()
