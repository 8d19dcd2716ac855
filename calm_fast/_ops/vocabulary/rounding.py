"""First-order rounding analysis of logits and of what is read off them; used by linear_nce and linear_logprob.

The error rule (`calm_fast.core.numerics`) wants sums of squares R and A. Here their square roots are carried along,
called deviations, each as a tensor whose first dim is (roundings to the inputs' dtype, roundings in float32): errors
that may be related add up linearly, unrelated ones in squares. All tensors are float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from calm_fast.core.numerics import Rounding

# roundings in one evaluation of exp, log, tanh or a division in float32, its argument's own included
_STEP = 4


@dataclass(frozen=True)
class Off:
    """How far a quantity may be off: `free`, unrelated from element to element, and `tied`, related in any way.

    Both (2, *shape of the quantity).
    """

    free: torch.Tensor
    tied: torch.Tensor

    @staticmethod
    def none(like: torch.Tensor) -> Off:
        zero = like.new_zeros((2, *like.shape))
        return Off(zero, zero)

    def __add__(self, other: Off) -> Off:
        return Off(self.free + other.free, self.tied + other.tied)

    def __mul__(self, factor: torch.Tensor | float) -> Off:
        factor = factor.abs() if isinstance(factor, torch.Tensor) else abs(factor)
        return Off(self.free * factor, self.tied * factor)

    def steps(self, size: torch.Tensor, count: int = _STEP) -> Off:
        """With `count` more roundings of a value of this size in float32."""
        more = torch.stack((torch.zeros_like(size), math.sqrt(count) * size.abs()))
        return Off(self.free + more, self.tied)

    def stored(self, size: torch.Tensor) -> Off:
        """With one more rounding of a value of this size to the inputs' dtype."""
        return Off(self.free + torch.stack((size.abs(), torch.zeros_like(size))), self.tied)

    def shared(self) -> Off:
        """One number a token turned into a column that a whole row reads."""
        return Off(torch.zeros_like(self.free), self.free + self.tied).map(lambda t: t.unsqueeze(-1))

    def map(self, function) -> Off:
        return Off(function(self.free), function(self.tied))

    def sum(self, dim: int, terms: torch.Tensor) -> Off:
        """The sum over `dim` (counted from the end) of quantities of these sizes."""
        total = self.free.square().sum(dim).sqrt() + self.tied.sum(dim)
        return Off(total + _summing(terms.shape[dim], terms.abs().sum(dim)), torch.zeros_like(total))

    def matmul(self, own: torch.Tensor, other: torch.Tensor) -> Off:
        """own @ other, `own` being off by this and `other` exact."""
        total = (self.free.square() @ other.square()).sqrt() + self.tied @ other.abs()
        return Off(total + _summing(own.shape[-1], own.abs() @ other.abs()), torch.zeros_like(total))

    def rounding(self) -> Rounding:
        return Rounding(*(self.free + self.tied).square())


def _summing(length: int, absolute: torch.Tensor) -> torch.Tensor:
    """`sum_variance` of the error rule as a deviation."""
    return torch.stack((torch.zeros_like(absolute), math.sqrt((length + 2) / 3) * absolute))


def pick(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """values (..., T, V) at targets (T,): (..., T)."""
    index = targets.unsqueeze(-1).expand(*values.shape[:-1], 1)
    return values.gather(-1, index).squeeze(-1)


@dataclass(frozen=True)
class Logits:
    """z (T, V), how far it may be off, the slope of the softcap (1 without one)."""

    z: torch.Tensor
    off: Off
    slope: torch.Tensor
    softcap: float | None

    def _exponent(self, scale: float) -> Off:
        """scale * z - max, and its exponential's own relative error."""
        z = self.z * scale
        top = z.abs().amax(-1, keepdim=True)
        return (self.off * scale).steps(z.abs() + top + 1.0)

    def softmax(self, scale: float = 1.0) -> tuple[torch.Tensor, Off]:
        """softmax(scale * z)."""
        p = (self.z * scale).softmax(-1)
        return p, (self._exponent(scale) + self.log_sum(scale)[1].shared()) * p

    def log_sum(self, scale: float = 1.0) -> tuple[torch.Tensor, Off]:
        """log sum exp(scale * z), (T,)."""
        z = self.z * scale
        p, value = z.softmax(-1), z.logsumexp(-1)
        off = (self._exponent(scale) * p).sum(-1, p)
        return value, off.steps(value.abs() + z.abs().amax(-1))

    def mean(self, values: torch.Tensor, off: Off, scale: float = 1.0) -> tuple[torch.Tensor, Off]:
        """sum_v softmax(scale * z)_v values_v, (T,)."""
        p = (self.z * scale).softmax(-1)
        mean = (p * values).sum(-1)
        # an error common to all weights cancels in the quotient: what counts is a value's distance from the mean
        spread = (values - mean.unsqueeze(-1)).abs()
        total = (self._exponent(scale) * (p * spread) + off * p).steps(p * values)
        size = (p * values.abs()).sum(-1)
        # the weighted sum and the sum of the weights it is divided by
        return mean, total.sum(-1, p * values).steps(math.sqrt((values.shape[-1] + 2) / 3) * size)

    def at(self, targets: torch.Tensor) -> tuple[torch.Tensor, Off]:
        """z[t, targets_t], (T,)."""
        return pick(self.z, targets), self.off.map(lambda t: pick(t, targets))

    def backward(self, dz: torch.Tensor, off: Off) -> tuple[torch.Tensor, Off]:
        """The gradient before the softcap, stored in the inputs' dtype."""
        bent = torch.zeros_like(self.z) if self.softcap is None else 2 * self.z.abs() / self.softcap**2
        raw = dz * self.slope
        return raw, (off * self.slope + self.off * (bent * dz)).steps(dz).stored(raw)


def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> Logits:
    """z = softcap(hidden weight^T + bias), the product stored in the inputs' dtype."""
    raw = hidden @ weight.T
    off = Off.none(raw).stored(raw)
    off = Off(off.free + _summing(hidden.shape[1], hidden.abs() @ weight.abs().T), off.tied)
    if bias is not None:
        raw = raw + bias
        off = off.steps(raw, 1)
    if softcap is None:
        return Logits(raw, off, torch.ones_like(raw), None)
    z = softcap * torch.tanh(raw / softcap)
    slope = 1 - (z / softcap).square()
    # tanh computed from exponentials loses up to one unit of 1, not of its own size
    return Logits(z, (off * slope).steps(torch.full_like(z, softcap)), slope, softcap)


def gradients(dz: torch.Tensor, off: Off, hidden: torch.Tensor, weight: torch.Tensor) -> dict[str, Off]:
    """How far dz weight, dz^T hidden and the sum of dz over tokens may be off; `dz` (T, V) before the softcap."""
    swapped = off.map(lambda t: t.mT)
    return {
        # summed over chunks of the vocabulary, whose products are stored in the inputs' dtype
        "dhidden": off.matmul(dz, weight).stored(dz.abs() @ weight.abs()),
        "dweight": swapped.matmul(dz.mT, hidden),
        "dbias": swapped.sum(-1, dz.mT),
    }
