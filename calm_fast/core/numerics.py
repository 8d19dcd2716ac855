"""The error rule: how wrong may an implementation be? Computed for every case, never guessed.

Truth t is the reference in float64 on the very same (rounded) inputs. For each quantity an op returns (outputs and
gradients) the error of an implementation is max |x - t|, and it must not exceed

    bound = 2 max |eager - t|  +  max ( u_out |t| + c sqrt( u_in^2 R + u_acc^2 A ) )

- eager is the plain computation with every step in the quantity's own dtype: what a user would write.
- u is the unit roundoff: 2^-24 float32, 2^-11 float16, 2^-8 bfloat16, 2^-53 float64. A result is rounded once to
  its own dtype, hence u_out |t|.
- R and A are sums of squares, to first order, of how far the result moves per unit of each rounding inside the
  computation: R over what is rounded to the dtype of the inputs (operands of a matrix product, a saved output),
  A over what is rounded in the accumulation dtype, float32. A value x rounded to nearest moves by at most u |x|;
  a bounded error of mean zero is sub-Gaussian with variance proxy (u |x|)^2 / 3, independent ones add up their
  squares, and the result leaves c = 6 / sqrt(3) deviations with probability 2 exp(-18) = 4e-8 per element (the
  model of Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019). How long a sum is
  enters through `sum_variance`. Deriving R and A belongs to the op: `OpCases.rounding`.

The eager term alone would be unfair on tiny outputs, where eager may be exact by luck; the rounding term alone would
have to know every step of every implementation. A non-finite value is an infinite error, unless the truth has the
same one there. Some elements must be exact (a row that sees nothing): `OpCases.exact`; an unequal one is an infinite
error too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_DEVIATIONS = 6 / math.sqrt(3)

Inputs = Mapping[str, Any]
Values = dict[str, torch.Tensor]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding a number to `dtype`: half the distance from 1 to its successor."""
    return torch.finfo(dtype).eps / 2


def sum_variance(length: int, absolute: torch.Tensor) -> torch.Tensor:
    """The share of one sum in A: its partial sums are what is rounded.

    Over the orders in which `length` terms may be added, the k-th partial sum is at most about k / length of the sum
    of absolute values; the squares of k / length add up to length / 3, and one more rounding is the product itself.
    """
    return (length + 2) / 3 * absolute.square()


@dataclass(frozen=True)
class Rounding:
    """R (`inputs`) and A (`accumulate`) of the error rule for one quantity, float64, of its shape (or 0)."""

    inputs: torch.Tensor | float
    accumulate: torch.Tensor | float


@dataclass(frozen=True)
class Case:
    """One named input of an op, built on the CPU from a fixed seed and moved to the device it is wanted on."""

    op: str
    name: str
    dtype: torch.dtype
    spec: Any = None

    def __str__(self) -> str:
        return f"{self.name}-{short(self.dtype)}"


class OpCases(Protocol):
    """What `calm_fast/_ops/<op>/cases.py` offers as `CASES`."""

    op: str
    impls: Sequence[str]  # the implementations to prove, those that cannot run here included

    def cases(self) -> Sequence[Case]: ...
    def fits(self, case: Case, impl: str, device: str) -> bool:
        """Optional: False for a case that `impl` refuses by its contract, which is then no failure."""
        ...

    def obstacle(self, impl: str, device: str) -> str | None:
        """Optional: why `impl` cannot run on this machine although the library has it, or None."""
        ...

    def build(self, case: Case, device: torch.device) -> Inputs: ...
    def run(self, inputs: Inputs, impl: str) -> Values:
        """The public op and its gradients for the upstream gradients in `inputs`; raises where impl cannot run."""
        ...

    def eager(self, inputs: Inputs) -> Values: ...
    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """The first-order analysis, on the inputs in float64."""
        ...

    def exact(self, inputs: Inputs) -> Values:
        """Where a quantity must equal the truth bit for bit: bool tensors of its shape."""
        ...


@dataclass(frozen=True)
class Row:
    """One verdict: a quantity of a case from an implementation."""

    op: str
    case: str
    impl: str
    device: str
    dtype: str
    quantity: str
    error: float
    bound: float
    ok: bool
    note: str = ""

    @property
    def ratio(self) -> float:
        """error / bound; 0 where the error is 0."""
        return 0.0 if self.error == 0 else self.error / self.bound if self.bound > 0 else math.inf


@dataclass(frozen=True)
class Truth:
    """What every implementation is held against for one case: values, bounds, exact elements."""

    values: Values
    bounds: dict[str, float]
    exact: Values


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without its "torch." prefix."""
    return str(dtype).removeprefix("torch.")


def cast(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """The inputs with every floating-point tensor in `dtype`."""
    return {
        name: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in inputs.items()
    }


def error(actual: torch.Tensor, truth: torch.Tensor, exact: torch.Tensor | None = None) -> float:
    """max |actual - truth|; infinite where shapes, non-finite elements or exact elements disagree.

    Args:
        actual: the values to judge, any float dtype. truth: the same shape, float64.
        exact: bool, the same shape; elements that must be equal. None = none.
    """
    actual = actual.detach().to(torch.float64)
    if actual.shape != truth.shape:
        return math.inf
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    if bool((~same & ~(actual.isfinite() & truth.isfinite())).any()):
        return math.inf
    if exact is not None and not bool(same[exact].all()):
        return math.inf
    difference = torch.where(same, 0.0, actual - truth).abs()
    return float(difference.max()) if difference.numel() else 0.0


def truth_of(ops: OpCases, inputs: Inputs, dtype: torch.dtype) -> Truth:
    """The float64 reference for `inputs`, and the bound of every quantity for implementations that compute in `dtype`.

    Args:
        ops: the op's cases. inputs: what `ops.build` gave. dtype: the inputs' dtype, float32 or lower.
    """
    double = cast(inputs, torch.float64)
    values = {name: t.detach() for name, t in ops.run(double, "reference").items()}
    rounding, exact = ops.rounding(double), ops.exact(inputs)
    kept = {name: t.dtype for name, t in ops.run(inputs, "reference").items()}  # which dtype each quantity has
    eager = {d: ops.eager(cast(inputs, d)) for d in set(kept.values())}
    bounds = {}
    for name, t in values.items():
        own = eager[kept[name]][name]
        # eager may be non-finite (half precision overflows); then it says nothing, and the rounding term stands alone
        first = error(own, t)
        square = rounding[name].inputs * unit_roundoff(dtype) ** 2
        square = square + rounding[name].accumulate * unit_roundoff(torch.float32) ** 2
        size = torch.where(t.isfinite(), t, 0.0).abs() * unit_roundoff(kept[name]) + _DEVIATIONS * square**0.5
        size = size.masked_fill(exact[name], 0.0) if name in exact else size
        bounds[name] = (2 * first if math.isfinite(first) else 0.0) + (float(size.max()) if size.numel() else 0.0)
    return Truth(values, bounds, exact)


def judge(case: Case, impl: str, device: torch.device, actual: Values, truth: Truth) -> list[Row]:
    """One row for each quantity of `truth`; a quantity that `actual` lacks, or has too much, fails."""
    rows = []
    for name in [*truth.values, *(set(actual) - set(truth.values))]:
        note, wrong, bound = "", math.inf, truth.bounds.get(name, 0.0)
        if name not in actual or name not in truth.values:
            note = "missing" if name not in actual else "unexpected"
        else:
            wrong = error(actual[name], truth.values[name], truth.exact.get(name))
            note = "" if math.isfinite(wrong) else "shape, non-finite or must-be-exact elements differ"
        rows.append(
            Row(case.op, case.name, impl, device.type, short(case.dtype), name, wrong, bound, wrong <= bound, note)
        )
    return rows


def check(ops: OpCases, case: Case, impl: str, device: torch.device | str = "cpu") -> list[Row]:
    """Run one case with one implementation and judge it: the whole rule in one call, for tests."""
    device = torch.device(device)
    inputs = ops.build(case, device)
    return judge(case, impl, device, ops.run(inputs, impl), truth_of(ops, inputs, case.dtype))
