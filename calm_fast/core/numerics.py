"""The error rule: the largest error that an implementation may have, computed for every case and never guessed.

The truth t is the reference in float64 on the same, already rounded inputs. For each quantity of an op (outputs and
gradients) the error of an implementation is max |x - t|. It must not exceed

    bound = 2 max |eager - t|  +  max ( u_out |t| + c sqrt( u_in^2 R + u_acc^2 A ) )

- eager is the plain computation that a user would write, with every step in the quantity's own dtype.
- u is the unit roundoff: 2^-24 float32, 2^-11 float16, 2^-8 bfloat16, 2^-53 float64. A result is rounded once to
  its own dtype, hence u_out |t|.
- R and A are first-order sums of squares. Each term is the change of the result per unit of one rounding inside the
  computation. R covers values rounded to the dtype of the inputs (operands of a matrix product, a saved output). A
  covers values rounded in the accumulation dtype, float32. Rounding x to nearest changes it by at most u |x|. A bounded
  error of mean zero is sub-Gaussian with variance proxy (u |x|)^2 / 3, and the squares of independent errors add up.
  The result then exceeds c = 6 / sqrt(3) deviations with probability 2 exp(-18) = 4e-8 per element (the model of Higham
  and Mary, "A new approach to probabilistic rounding error analysis", 2019). The length of a sum enters through
  `sum_variance`. Each op derives its own R and A in `OpCases.rounding`.

The eager term alone would be unfair on tiny outputs, where eager may be exact by luck. The rounding term alone would
have to know every step of every implementation. A non-finite value is an infinite error, unless the truth has the same
one there. Elements that `OpCases.exact` marks must be equal (a row that sees nothing); an unequal one is an infinite
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
    """Return the largest relative error of rounding to `dtype`: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def sum_variance(length: int, absolute: torch.Tensor) -> torch.Tensor:
    """Return the share of one sum in A, where every partial sum is rounded.

    length: number of terms. absolute: the sum of their absolute values. On average over the orders of summation, the
    k-th partial sum is at most about k / length of `absolute`. The squares of k / length add up to length / 3, and the
    product adds one more rounding.
    """
    return (length + 2) / 3 * absolute.square()


@dataclass(frozen=True)
class Rounding:
    """R (`inputs`) and A (`accumulate`) of the error rule for one quantity: float64, its shape, or 0."""

    inputs: torch.Tensor | float
    accumulate: torch.Tensor | float


@dataclass(frozen=True)
class Case:
    """One named input of an op, built on the CPU from a fixed seed and then moved to the device under test."""

    op: str
    name: str
    dtype: torch.dtype
    spec: Any = None

    def __str__(self) -> str:
        return f"{self.name}-{short(self.dtype)}"


class OpCases(Protocol):
    """The interface of the object `CASES` in `calm_fast/_ops/<op>/cases.py`."""

    op: str
    impls: Sequence[str]  # the implementations to verify, including those that cannot run here

    # Optional, `cuda_kernels = True`: csrc/<op>/ has CUDA kernels, which a source checkout emulates on a CPU.

    def cases(self) -> Sequence[Case]: ...
    def fits(self, case: Case, impl: str, device: str) -> bool:
        """Optional: return False for a case that `impl` refuses by its contract; it then counts as no failure."""
        ...

    def obstacle(self, impl: str, device: str) -> str | None:
        """Optional: why `impl` cannot run on this machine although the library has it, or None."""
        ...

    def build(self, case: Case, device: torch.device) -> Inputs: ...
    def run(self, inputs: Inputs, impl: str) -> Values:
        """Run the public op and its backward with the upstream gradients in `inputs`; raise if `impl` cannot run."""
        ...

    def eager(self, inputs: Inputs) -> Values: ...
    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """Return R and A of every quantity, from the inputs in float64."""
        ...

    def exact(self, inputs: Inputs) -> Values:
        """Return, as bool tensors of a quantity's shape, the elements that must equal the truth bit for bit."""
        ...


@dataclass(frozen=True)
class Row:
    """The verdict on one quantity of one case from one implementation."""

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
        """Return error / bound, or 0 if the error is 0."""
        return 0.0 if self.error == 0 else self.error / self.bound if self.bound > 0 else math.inf


@dataclass(frozen=True)
class Truth:
    """The float64 values of one case, the bound of every quantity, and the elements that must be exact."""

    values: Values
    bounds: dict[str, float]
    exact: Values


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its "torch." prefix."""
    return str(dtype).removeprefix("torch.")


def cast(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """Return the inputs with every floating-point tensor cast to `dtype`."""
    return {
        name: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for name, t in inputs.items()
    }


def error(actual: torch.Tensor, truth: torch.Tensor, exact: torch.Tensor | None = None) -> float:
    """Return max |actual - truth|, or infinity if shapes, non-finite elements or exact elements differ.

    Args:
        actual: the values to judge, any float dtype.
        truth: the same shape, float64.
        exact: bool, the same shape, True for elements that must be equal; None = none.
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
    """Compute the float64 reference for `inputs`, and the bound of every quantity.

    Args:
        ops: the op's cases.
        inputs: built by `ops.build`.
        dtype: the inputs' dtype, in which implementations compute: float32 or lower.
    """
    double = cast(inputs, torch.float64)
    values = {name: t.detach() for name, t in ops.run(double, "reference").items()}
    rounding, exact = ops.rounding(double), ops.exact(inputs)
    kept = {name: t.dtype for name, t in ops.run(inputs, "reference").items()}  # the dtype of each quantity
    eager = {d: ops.eager(cast(inputs, d)) for d in set(kept.values())}
    bounds = {}
    for name, t in values.items():
        own = eager[kept[name]][name]
        # eager may be non-finite (float16 overflows); the bound is then the rounding term alone
        first = error(own, t)
        square = rounding[name].inputs * unit_roundoff(dtype) ** 2
        square = square + rounding[name].accumulate * unit_roundoff(torch.float32) ** 2
        size = torch.where(t.isfinite(), t, 0.0).abs() * unit_roundoff(kept[name]) + _DEVIATIONS * square**0.5
        size = size.masked_fill(exact[name], 0.0) if name in exact else size
        bounds[name] = (2 * first if math.isfinite(first) else 0.0) + (float(size.max()) if size.numel() else 0.0)
    return Truth(values, bounds, exact)


def judge(case: Case, impl: str, device: torch.device, actual: Values, truth: Truth) -> list[Row]:
    """Return one row for each quantity of `truth`. A quantity that `actual` lacks or has in addition fails."""
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
    """Run one case with one implementation and judge it: the whole error rule in one call, for tests."""
    device = torch.device(device)
    inputs = ops.build(case, device)
    return judge(case, impl, device, ops.run(inputs, impl), truth_of(ops, inputs, case.dtype))
