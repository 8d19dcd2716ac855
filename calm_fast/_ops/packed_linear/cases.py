"""Cases of packed_linear and the rounding analysis of its product."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from calm_fast._ops.packed_linear.api import Packed, linear, linear_into, pack
from calm_fast._ops.packed_linear.reference import packed_linear_reference
from calm_fast.core.numerics import Case, Inputs, Rounding, Values, sum_variance


@dataclass(frozen=True)
class Spec:
    """x (*tokens, k) times a weight (rows, k); added: "nothing", "bias" or "residual"."""

    tokens: tuple[int, ...]
    rows: int
    k: int
    added: str = "nothing"
    strided: bool = False


# around the kernel's panels (32 rows, 16 with AVX2), tiles (14 tokens, 6), chunks (126, 144) and depth (256 of k)
_SPECS: dict[str, Spec] = {
    "single": Spec((1,), 1, 1),
    "token": Spec((1,), 96, 64, "bias"),
    "odd": Spec((3,), 33, 300, "residual"),
    "one-tile": Spec((14,), 32, 256),
    "one-more": Spec((15,), 31, 257, "bias"),
    "chunks": Spec((260,), 40, 16, "residual"),
    "prime": Spec((127,), 71, 513),
    "batch": Spec((2, 3, 5), 40, 24, "bias"),
    "batch-residual": Spec((2, 37), 64, 48, "residual"),
    "strided": Spec((4, 9), 48, 40, "residual", strided=True),
    "vector": Spec((), 40, 24, "bias"),
    "no-columns": Spec((2,), 5, 0, "residual"),
    "no-tokens": Spec((2, 0), 4, 4),
    "no-rows": Spec((9,), 0, 3),
}


class PackedLinearCases:
    """See `calm_fast.core.numerics.OpCases`."""

    op = "packed_linear"
    impls = ("torch", "native")

    def cases(self) -> list[Case]:
        """Return every case, in float32: nothing else is packed."""
        return [Case(self.op, name, torch.float32, spec) for name, spec in _SPECS.items()]

    def obstacle(self, impl: str, device: str) -> str | None:
        """Return why nothing is packed on this machine, or None."""
        if impl != "native" or device != "cpu" or isinstance(pack(torch.ones(1, 1)), Packed):
            return None
        return "packed products need AVX2"

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Return x, weight, bias and residual (None where not added), all from a fixed seed."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr((s.tokens, s.rows, s.k)).encode()))

        def normal(*shape: int) -> torch.Tensor:
            if s.strided and len(shape) > 1:
                return torch.randn((*shape, 2), generator=g).to(device, case.dtype)[..., 0]
            return torch.randn(shape, generator=g).to(device, case.dtype)

        return {
            "x": normal(*s.tokens, s.k),
            "weight": normal(s.rows, s.k),
            "bias": normal(s.rows) if s.added == "bias" else None,
            "residual": normal(*s.tokens, s.rows) if s.added == "residual" else None,
        }

    def run(self, inputs: Inputs, impl: str) -> Values:
        """Return out; "native" packs the weight first."""
        x, weight, bias, residual = (inputs[name] for name in ("x", "weight", "bias", "residual"))
        if impl == "reference":
            return {"out": packed_linear_reference(x, weight, bias, residual)}
        factor = pack(weight) if impl == "native" else weight
        if impl == "native" and not isinstance(factor, Packed):
            raise RuntimeError(f"packed_linear: impl='native' cannot run here: {weight.dtype} was not packed")
        return {"out": linear(x, factor, bias) if residual is None else linear_into(residual, x, factor)}

    def eager(self, inputs: Inputs) -> Values:
        """Return the product as a user writes it, and each sum after it."""
        out = inputs["x"] @ inputs["weight"].mT
        for name in ("bias", "residual"):
            out = out if inputs[name] is None else out + inputs[name]
        return {"out": out}

    def exact(self, inputs: Inputs) -> Values:
        """Without columns the product is 0 and what is added is returned bit for bit."""
        x, weight = inputs["x"], inputs["weight"]
        return {"out": torch.full((*x.shape[:-1], weight.shape[0]), x.shape[-1] == 0, device=x.device)}

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """One sum of K products and of what is added, wherever in the order that comes; no operand is rounded."""
        x, weight = inputs["x"], inputs["weight"]
        absolute, length = x.abs() @ weight.abs().mT, x.shape[-1]
        for name in ("bias", "residual"):
            if inputs[name] is not None:
                absolute, length = absolute + inputs[name].abs(), length + 1
        return {"out": Rounding(0.0, sum_variance(length, absolute))}


CASES = PackedLinearCases()
