"""Cases and rounding analysis of op_name, shared by `calm-fast verify` and the tests."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

from calm_fast.core.numerics import Case, Inputs, Rounding, Values


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case."""

    t: int
    d: int
    scale: float = 1.0
    strided: bool = False


_SPECS: dict[str, Spec] = {
    "one": Spec(1, 1, 0.5),
    "empty": Spec(0, 8),
    "prime": Spec(37, 31, -1.7),
    "wide": Spec(5, 1030, 3.0),
    "strided": Spec(19, 24, 0.3, strided=True),
}


class OpNameCases:
    """See `calm_fast.core.numerics.OpCases`."""

    op = "op_name"
    impls = ("torch", "triton")

    def cases(self) -> list[Case]:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return [Case(self.op, name, dtype, spec) for dtype in dtypes for name, spec in _SPECS.items()]

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Return the op's arguments and the upstream gradient `dout`, from a fixed seed."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr(s).encode()))
        shape = (s.t, 2 * s.d) if s.strided else (s.t, s.d)
        x = torch.randn(shape, generator=g).to(device, case.dtype)
        dout = torch.randn((s.t, s.d), generator=g).to(device, case.dtype)
        return {"x": x[:, ::2] if s.strided else x, "scale": s.scale, "dout": dout}

    def run(self, inputs: Inputs, impl: str) -> Values:
        from calm_fast.ops import op_name

        x = inputs["x"].detach().requires_grad_()
        out = op_name(x, scale=inputs["scale"], impl=impl)
        (dx,) = torch.autograd.grad(out, x, inputs["dout"])
        return {"out": out.detach(), "dx": dx}

    def eager(self, inputs: Inputs) -> Values:
        return {"out": inputs["scale"] * inputs["x"], "dx": inputs["scale"] * inputs["dout"]}

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """One product in the accumulation dtype, on top of the result's own rounding."""
        return {
            "out": Rounding(0.0, (inputs["scale"] * inputs["x"]).square()),
            "dx": Rounding(0.0, (inputs["scale"] * inputs["dout"]).square()),
        }

    def exact(self, inputs: Inputs) -> Values:
        return {}


CASES = OpNameCases()
