"""Cases of maj_at_k and the rounding analysis of its curves, which are float64 whatever dtype the scores have.

The definition is exact up to the last rounding, so the error of a float64 implementation is counted in its own
roundings, u = 2^-53. Exact: a subset's probability is a product of binomial probabilities of all classes over that of
the total. Building them takes one rounding for each sample above and below the bar and one for each addition. Every
term is positive, so each rounding moves the result by at most u times itself. Resampled: one rounding for each credit
and each partial sum.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast._ops.voting.samples import draw_samples
from calm_fast.core.numerics import Case, Inputs, Rounding, Values, sum_variance, unit_roundoff

# bounds count accumulation in float32, but these results are accumulated in float64
_DOUBLE = (unit_roundoff(torch.float64) / unit_roundoff(torch.float32)) ** 2


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case."""

    q: int
    k: int
    classes: int
    ks: tuple[int, ...]
    rule: str = "count"
    method: str = "exact"
    resamples: int = 37
    seed: int = 0
    lam: float = 1.0
    step: float = 0.0  # scores are multiples of it, so that sums of different classes collide; 0 = any
    unscored: float = 0.0  # share of NaN scores
    invalid: float | None = None  # share of samples that do not vote; None = no `valid` at all
    right: float = 0.4  # share of right answers among the samples of a question, on average
    strided: bool = False


_DOUBLING = (1, 2, 4, 8, 16, 32, 64)
_SPECS: dict[str, Spec] = {
    "every-k": Spec(31, 8, 4, tuple(range(1, 9))),
    "two-classes": Spec(21, 20, 2, (1, 2, 4, 6, 10, 19)),
    "few-right": Spec(21, 24, 6, (1, 3, 5, 12), right=0.02),
    "mostly-right": Spec(21, 24, 6, (1, 3, 5, 12), right=0.45),
    "all-different": Spec(9, 17, 100_000, (1, 2, 5, 16, 17), right=0.06),
    "many-ties": Spec(13, 40, 30, (1, 2, 3, 7, 20, 39), right=0.05),
    "ragged": Spec(31, 24, 5, _DOUBLING, invalid=0.4),
    "prime": Spec(11, 37, 7, (1, 3, 11, 31)),
    "doubling": Spec(9, 64, 10, _DOUBLING),
    "past-edges": Spec(5, 65, 12, _DOUBLING, invalid=0.1),
    "long": Spec(3, 1100, 3, (1, 2, 8, 64), right=0.004),
    "strided": Spec(13, 16, 4, (1, 2, 4, 8), invalid=0.2, strided=True),
    "single": Spec(1, 1, 1, (1,)),
    "no-questions": Spec(0, 8, 3, (1, 4)),
    "no-samples": Spec(5, 0, 3, (1, 4)),
    "none-valid": Spec(5, 6, 3, (1, 4), invalid=1.0),
    "unsorted-repeated": Spec(17, 9, 3, (4, 1, 4, 9, 3)),
    "beyond": Spec(17, 7, 3, (5, 7, 8, 2**40), invalid=0.3),
    "all-equal": Spec(9, 13, 1, (1, 5, 13)),
    "resample": Spec(7, 16, 5, (1, 2, 4, 8, 16), method="resample"),
    "resample-beyond": Spec(7, 12, 4, (3, 12, 13, 50), method="resample", invalid=0.4),
    "resample-unsorted": Spec(7, 11, 3, (6, 2, 6, 11), method="resample"),
    "resample-no-questions": Spec(0, 8, 3, (1, 4), method="resample"),
    "resample-no-samples": Spec(3, 0, 3, (1, 4), method="resample"),
    "resample-long": Spec(2, 300, 20, (1, 7, 100, 299), method="resample", resamples=9, invalid=0.1),
    "resample-all-different": Spec(2, 70, 100_000, (1, 5, 69), method="resample", right=0.04),
    "resample-negative-seed": Spec(5, 16, 4, (1, 3, 8), method="resample", seed=-12345),
    "resample-64-bit-seed": Spec(5, 16, 4, (1, 3, 8), method="resample", seed=2**64 - 2**33 + 5),
    "resample-strided": Spec(5, 16, 4, (1, 3, 8), method="resample", invalid=0.2, strided=True),
    "weighted": Spec(5, 16, 4, (1, 2, 4, 8, 16), "weighted", "resample"),
    "weighted-ties": Spec(7, 12, 4, (2, 4, 8, 12), "weighted", "resample", step=0.5),
    "adaptive": Spec(5, 13, 4, (1, 2, 5, 13), "adaptive", "resample", lam=0.7, unscored=0.3),
    "adaptive-ties": Spec(7, 12, 4, (2, 4, 8), "adaptive", "resample", step=0.25, invalid=0.3),
    "everything": Spec(9, 19, 5, (9, 1, 4, 30), "weighted", "resample", 23, -1, 1.0, 0.25, 0.2, 0.3, strided=True),
}
_OTHER_DTYPES = ("weighted-ties", "adaptive", "everything")


class MajAtKCases:
    """See `calm_fast.core.numerics.OpCases`."""

    op = "maj_at_k"
    impls = ("torch", "native")
    cuda_kernels = True

    def cases(self) -> list[Case]:
        found = [self.case(name, torch.float32) for name in _SPECS]
        return found + [self.case(name, dtype) for dtype in (torch.bfloat16, torch.float16) for name in _OTHER_DTYPES]

    def case(self, name: str, dtype: torch.dtype, **changes: Any) -> Case:
        """The case `name`, with fields of its Spec changed; `dtype` is that of the scores."""
        return Case(self.op, name, dtype, replace(_SPECS[name], **changes))

    def fits(self, case: Case, impl: str, device: str) -> bool:
        """The exact curve has no CUDA kernel (docs/ops/maj_at_k.md)."""
        return impl != "native" or device == "cpu" or case.spec.method == "resample"

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Build the op's arguments from a fixed seed. Samples that do not vote hold values that must not matter."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr(s).encode()))
        correct = torch.randint(0, s.classes, (s.q,), generator=g)
        answers = torch.randint(0, s.classes, (s.q, s.k), generator=g)
        share = torch.rand(s.q, 1, generator=g) * 2 * s.right
        answers = torch.where(torch.rand(s.q, s.k, generator=g) < share, correct.unsqueeze(1), answers)
        return {
            **draw_samples(s, answers, case.dtype, device, g),
            "correct": correct.to(device),
            "ks": list(s.ks),
            "method": s.method,
            "resamples": s.resamples,
            "rule": s.rule,
            "lam": s.lam,
            "seed": s.seed,
        }

    def run(self, inputs: Inputs, impl: str) -> Values:
        from calm_fast._ops.maj_at_k.api import maj_at_k

        return maj_at_k(**inputs, impl=impl)._asdict()

    def eager(self, inputs: Inputs) -> Values:
        """Run the definition: it is rounded once, so no eager computation would be a better yardstick."""
        return self.run(inputs, "reference")

    def exact(self, inputs: Inputs) -> Values:
        return {}

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """Return squared errors of the mean and of the standard error over questions, from that of a credit.

        The standard error is a norm of the credits' deviations, so it moves by at most the norm of their errors.
        """
        from calm_fast._ops.maj_at_k.api import maj_at_k

        found, (q, k) = maj_at_k(**inputs, impl="reference"), inputs["answers"].shape
        if not q:
            return dict.fromkeys(("accuracy", "stderr"), Rounding(0.0, 0.0))
        if inputs["method"] == "exact":
            roundings = 12.0 * k + 10  # for each sample up to 6 to build a class's row and 6 to build the total's
            credit = roundings * _DOUBLE  # relative to a credit's square, and no credit is above 1
        else:
            credit = float(sum_variance(inputs["resamples"], torch.ones(()))) * _DOUBLE
        mean = credit * found.accuracy.square() + sum_variance(q, found.accuracy) * _DOUBLE
        spread = credit / max(q * (q - 1), 1) + sum_variance(q + 8, found.stderr.nan_to_num()) * _DOUBLE
        return {"accuracy": Rounding(0.0, mean), "stderr": Rounding(0.0, spread)}


CASES = MajAtKCases()
