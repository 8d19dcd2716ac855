"""Cases of vote. Every quantity must equal the definition bit for bit.

Weights are float64 sums in a fixed order, so no rounding is tolerated: `exact` names every element and `rounding` is 0.
Integers are compared as float64, which holds class ids up to 2^53.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast._ops.voting.samples import draw_samples
from calm_fast.core.numerics import Case, Inputs, Rounding, Values


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case."""

    q: int
    k: int
    classes: int
    rule: str = "count"
    lam: float = 1.0
    step: float = 0.0  # scores are multiples of it, so that sums of different classes collide; 0 = any
    unscored: float = 0.0  # share of NaN scores; 1 = all
    invalid: float | None = None  # share of samples that do not vote; None = no `valid` at all
    largest: int = 0  # class ids are spread up to it; 0 = the ids are 0, 1, ..., classes - 1
    strided: bool = False


_SPECS: dict[str, Spec] = {
    "count": Spec(33, 16, 5),
    "single": Spec(1, 1, 1),
    "one-sample": Spec(17, 1, 3, "weighted"),
    "no-questions": Spec(0, 8, 3),
    "no-samples": Spec(9, 0, 3, "adaptive"),
    "all-equal": Spec(9, 13, 1),
    "all-different": Spec(9, 13, 1_000_000),
    "ties": Spec(101, 6, 3),
    "prime": Spec(37, 31, 7, "adaptive", lam=0.7),
    "edges": Spec(21, 64, 12, "weighted"),
    "past-edges": Spec(21, 65, 12, "weighted", invalid=0.1),
    "long": Spec(5, 1030, 90, "adaptive", lam=-0.4, unscored=0.2, invalid=0.2),
    "long-count": Spec(5, 1030, 900),
    "weighted": Spec(33, 16, 5, "weighted"),
    "weighted-ties": Spec(101, 9, 4, "weighted", step=0.5),
    "adaptive": Spec(33, 16, 5, "adaptive", lam=2.5),
    "adaptive-ties": Spec(101, 8, 4, "adaptive", step=0.25, lam=2.0),
    "adaptive-lam-0": Spec(33, 16, 5, "adaptive", lam=0.0),
    "unscored": Spec(33, 16, 5, "weighted", unscored=0.4),
    "all-unscored": Spec(33, 16, 5, "adaptive", unscored=1.0),
    "invalid": Spec(33, 16, 5, invalid=0.5),
    "none-valid": Spec(7, 5, 3, "weighted", invalid=1.0),
    "large-ids": Spec(33, 16, 6, largest=2**53, invalid=0.2),
    "everything": Spec(57, 40, 9, "weighted", step=0.25, unscored=0.3, invalid=0.6),
    "strided": Spec(19, 24, 5, "adaptive", unscored=0.2, invalid=0.3, strided=True),
}
_OTHER_DTYPES = ("weighted", "everything", "strided", "all-unscored", "prime")


class VoteCases:
    """See `calm_fast.core.numerics.OpCases`."""

    op = "vote"
    impls = ("torch", "native")
    cuda_kernels = True

    def cases(self) -> list[Case]:
        found = [self.case(name, torch.float32) for name in _SPECS]
        others = (torch.float64, torch.bfloat16, torch.float16)
        return found + [self.case(name, dtype) for dtype in others for name in _OTHER_DTYPES]

    def case(self, name: str, dtype: torch.dtype, **changes: Any) -> Case:
        """The case `name`, with fields of its Spec changed; `dtype` is that of the scores."""
        return Case(self.op, name, dtype, replace(_SPECS[name], **changes))

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Build the op's arguments from a fixed seed. Samples that do not vote hold values that must not matter."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr(s).encode()))
        answers = torch.randint(0, s.classes, (s.q, s.k), generator=g)
        if s.largest:
            answers = s.largest - answers * (s.largest // s.classes)
        return {
            **draw_samples(s, answers, case.dtype, device, g),
            "rule": s.rule,
            "lam": s.lam,
        }

    def run(self, inputs: Inputs, impl: str) -> Values:
        from calm_fast._ops.vote.api import vote

        found = vote(**inputs, impl=impl)
        return {name: values.double() for name, values in found._asdict().items()}

    def eager(self, inputs: Inputs) -> Values:
        """Run the definition: it has no rounding errors, so no eager computation would be a better yardstick."""
        return self.run(inputs, "reference")

    def exact(self, inputs: Inputs) -> Values:
        everywhere = torch.ones(inputs["answers"].shape[0], dtype=torch.bool, device=inputs["answers"].device)
        return dict.fromkeys(("winner", "weight", "total", "margin", "ties"), everywhere)

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        return dict.fromkeys(("winner", "weight", "total", "margin", "ties"), Rounding(0.0, 0.0))


CASES = VoteCases()
