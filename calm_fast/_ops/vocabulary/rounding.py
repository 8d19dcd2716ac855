"""First-order rounding analysis of logits and of quantities computed from them, for linear_nce and linear_logprob.

The error rule (`calm_fast.core.numerics`) wants sums of squares R and A. This module carries their square roots, called
deviations. Each is a float64 tensor whose first dim is (roundings to the inputs' dtype, roundings in float32). Errors
that may be correlated add up linearly, independent ones add up in squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from calm_fast.core.numerics import Rounding

# float32 roundings in one evaluation of exp, log, tanh or a division, those of its argument included
_FUNCTION_ROUNDINGS = 4


@dataclass(frozen=True)
class ErrorBound:
    """Deviations of a quantity's error, each (2, *shape of the quantity).

    independent: errors that are unrelated from element to element; they shrink relative to a sum.
    correlated: errors that may be related in any way, such as one rounding that a whole row inherits.
    """

    independent: torch.Tensor
    correlated: torch.Tensor

    @staticmethod
    def zero(like: torch.Tensor) -> ErrorBound:
        """Return the bound of an exact quantity of the shape of `like`."""
        zero = like.new_zeros((2, *like.shape))
        return ErrorBound(zero, zero)

    def __add__(self, other: ErrorBound) -> ErrorBound:
        return ErrorBound(self.independent + other.independent, self.correlated + other.correlated)

    def __mul__(self, factor: torch.Tensor | float) -> ErrorBound:
        factor = factor.abs() if isinstance(factor, torch.Tensor) else abs(factor)
        return ErrorBound(self.independent * factor, self.correlated * factor)

    def add_roundings(self, size: torch.Tensor, count: int = _FUNCTION_ROUNDINGS) -> ErrorBound:
        """Add `count` float32 roundings of a value of this size."""
        more = torch.stack((torch.zeros_like(size), math.sqrt(count) * size.abs()))
        return ErrorBound(self.independent + more, self.correlated)

    def add_store(self, size: torch.Tensor) -> ErrorBound:
        """Add one rounding of a value of this size to the inputs' dtype."""
        return ErrorBound(self.independent + torch.stack((size.abs(), torch.zeros_like(size))), self.correlated)

    def to_column(self) -> ErrorBound:
        """Turn one number per token into a column (..., 1) that a whole row reads: its errors become correlated."""
        return ErrorBound(torch.zeros_like(self.independent), self.independent + self.correlated).map(
            lambda t: t.unsqueeze(-1)
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ErrorBound:
        """Apply a rearrangement of elements to both deviations."""
        return ErrorBound(function(self.independent), function(self.correlated))

    def sum(self, dim: int, terms: torch.Tensor) -> ErrorBound:
        """Return the bound of `terms` summed over `dim` (negative: counted from the end)."""
        total = self.independent.square().sum(dim).sqrt() + self.correlated.sum(dim)
        return ErrorBound(total + _sum_deviation(terms.shape[dim], terms.abs().sum(dim)), torch.zeros_like(total))

    def matmul(self, own: torch.Tensor, other: torch.Tensor) -> ErrorBound:
        """Return the bound of own @ other, where this is the bound of `own` and `other` is exact."""
        total = (self.independent.square() @ other.square()).sqrt() + self.correlated @ other.abs()
        return ErrorBound(total + _sum_deviation(own.shape[-1], own.abs() @ other.abs()), torch.zeros_like(total))

    def to_rounding(self) -> Rounding:
        """Return the sums of squares R and A of the error rule."""
        return Rounding(*(self.independent + self.correlated).square())


def _sum_deviation(length: int, absolute: torch.Tensor) -> torch.Tensor:
    """Return `sum_variance` of the error rule as a deviation."""
    return torch.stack((torch.zeros_like(absolute), math.sqrt((length + 2) / 3) * absolute))


def pick(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return values (..., T, V) at targets (T,): (..., T)."""
    index = targets.unsqueeze(-1).expand(*values.shape[:-1], 1)
    return values.gather(-1, index).squeeze(-1)


@dataclass(frozen=True)
class Logits:
    """Logits z (T, V) with their error, and the slope of the softcap at z (1 without one)."""

    z: torch.Tensor
    error: ErrorBound
    slope: torch.Tensor
    softcap: float | None

    def _exponent(self, scale: float) -> ErrorBound:
        """Return the roundings of exp(scale * (z - max)) relative to its value; the errors of z come on top."""
        distance = (self.z.amax(-1, keepdim=True) - self.z) * scale
        return ErrorBound.zero(self.z).add_roundings(distance + 1.0)

    def _shift(self, scale: float) -> ErrorBound:
        """Return how errors d of the scaled logits move log softmax(scale * z): d_v - sum_w p_w d_w, (T, V).

        A token of probability 1 does not move at all, however large its logit and the logit's error are.
        """
        p, error = (self.z * scale).softmax(-1), self.error * scale
        squares, shares = (error.independent * p).square(), error.correlated * p
        others = (squares.sum(-1, keepdim=True) - squares).clamp(min=0).sqrt()
        others = others + (shares.sum(-1, keepdim=True) - shares).clamp(min=0)
        return ErrorBound(error.independent * (1 - p), error.correlated * (1 - p) + others)

    def _total(self, scale: float) -> ErrorBound:
        """Return the roundings of log sum exp(scale * (z - max)), (T,); the errors of z come on top."""
        z = self.z * scale
        p = z.softmax(-1)
        return (self._exponent(scale) * p).sum(-1, p).add_roundings(z.logsumexp(-1) - z.amax(-1) + 1.0)

    def softmax(self, scale: float = 1.0) -> tuple[torch.Tensor, ErrorBound]:
        """Return softmax(scale * z) and its bound, (T, V)."""
        p = (self.z * scale).softmax(-1)
        return p, (self._shift(scale) + self._exponent(scale) + self._total(scale).to_column()) * p

    def log_softmax(self, scale: float = 1.0) -> tuple[torch.Tensor, ErrorBound]:
        """Return log softmax(scale * z), as scale * (z - max) minus the log of the sum, and its bound, (T, V)."""
        value = (self.z * scale).log_softmax(-1)
        return value, (self._shift(scale) + self._total(scale).to_column()).add_roundings(value)

    def mean(self, values: torch.Tensor, error: ErrorBound, scale: float = 1.0) -> tuple[torch.Tensor, ErrorBound]:
        """Return sum_v softmax(scale * z)_v values_v and its bound, (T,); `error` is the bound of `values`."""
        p = (self.z * scale).softmax(-1)
        mean = (p * values).sum(-1)
        # an error common to all weights cancels in the quotient, so only a value's distance from the mean counts
        spread = (values - mean.unsqueeze(-1)).abs()
        weights = self.error * scale + self._exponent(scale)
        total = (weights * (p * spread) + error * p).add_roundings(p * values)
        size = (p * values.abs()).sum(-1)
        # the weighted sum, and the sum of the weights that divides it
        return mean, total.sum(-1, p * values).add_roundings(math.sqrt((values.shape[-1] + 2) / 3) * size)

    def backward(self, dz: torch.Tensor, error: ErrorBound) -> tuple[torch.Tensor, ErrorBound]:
        """Return the gradient before the softcap, stored in the inputs' dtype, and its bound."""
        slope_change = torch.zeros_like(self.z) if self.softcap is None else 2 * self.z.abs() / self.softcap**2
        raw = dz * self.slope
        bound = error * self.slope + self.error * (slope_change * dz)
        return raw, bound.add_roundings(dz).add_store(raw)


def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> Logits:
    """Return z = softcap(hidden weight^T + bias), where the product is stored in the inputs' dtype."""
    raw = hidden @ weight.T
    stored = ErrorBound.zero(raw).add_store(raw)
    product = _sum_deviation(hidden.shape[1], hidden.abs() @ weight.abs().T)
    error = ErrorBound(stored.independent + product, stored.correlated)
    if bias is not None:
        raw = raw + bias
        error = error.add_roundings(raw, 1)
    if softcap is None:
        return Logits(raw, error, torch.ones_like(raw), None)
    z = softcap * torch.tanh(raw / softcap)
    slope = 1 - (z / softcap).square()
    # a tanh computed from exponentials loses up to one unit of 1, not of its own size
    return Logits(z, (error * slope).add_roundings(torch.full_like(z, softcap)), slope, softcap)


def gradients(dz: torch.Tensor, error: ErrorBound, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, ErrorBound]:
    """Return the bounds of dz weight, dz^T hidden and the sum of dz over tokens; `dz` (T, V) is before the softcap."""
    swapped = error.map(lambda t: t.mT)
    return {
        # summed over chunks of the vocabulary, whose products are stored in the inputs' dtype
        "dhidden": error.matmul(dz, weight).add_store(dz.abs() @ weight.abs()),
        "dweight": swapped.matmul(dz.mT, hidden),
        "dbias": swapped.sum(-1, dz.mT),
    }
