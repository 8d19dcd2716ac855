"""What can be measured: one case file per op, listed in REGISTRY; a case is inputs, contestants, truth and costs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Inputs = Mapping[str, Any]
Values = Mapping[str, torch.Tensor]  # named outputs and gradients
Thunk = Callable[[], Values]
Definition = Callable[[Inputs, torch.dtype], Values]

# op stem, or "model" for whole composed models -> module with `cases(device, suite) -> Sequence[Case]`
REGISTRY: dict[str, str] = {
    "cross_attention": "calm_fast.benchmarks.cases.cross_attention",
    "dual_lora": "calm_fast.benchmarks.cases.dual_lora",
    "linear_nce": "calm_fast.benchmarks.cases.linear_nce",
    "linear_logprob": "calm_fast.benchmarks.cases.linear_logprob",
    "maj_at_k": "calm_fast.benchmarks.cases.maj_at_k",
    "vote": "calm_fast.benchmarks.cases.vote",
    "model": "calm_fast.benchmarks.cases.model",
}

SUITES = ("quick", "full")


class CannotRunError(RuntimeError):
    """A contestant that this machine cannot run; the message says why. It gets a row without a time."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    prepare(inputs) does everything a user does once (build the layer, compile, capture a graph) and returns the
    thunk that is timed; the thunk returns what it computed, for the correctness check.

    ours: an implementation of this package (must be correct and must run); otherwise a baseline.
    definition: as Case.definition, where this contestant computes something else than the case does.
    yardstick: it does less than the case asks for (the bare product, one LoRA instead of two); worth comparing with,
    but never "the best baseline".
    python: it works on numpy arrays or Python objects, which torch's allocator does not know; they are counted too.
    """

    name: str
    prepare: Callable[[Inputs], Thunk]
    ours: bool = False
    definition: Definition | None = None
    yardstick: bool = False
    python: bool = False


@dataclass(frozen=True)
class Target:
    """`impl` is meant to need 1 / `least` of what `baseline` needs, of `quantity` ("ms" or "peak_bytes").

    baseline "best": whichever baseline, yardsticks aside, needs least. Targets are reported, they never fail a run.
    """

    impl: str
    baseline: str
    least: float
    quantity: str = "ms"


@dataclass(frozen=True)
class Series:
    """Cases with an equal Series differ in one size and become one scaling curve of the report, of time and memory.

    title: of the curve, e.g. "training step, number of augmenters". size: the key of Case.shape on the x axis.
    power: the time should grow no faster than size ** power (1: linearly; 2: as attention does with length).
    """

    title: str
    size: str
    power: float = 1.0


@dataclass(frozen=True)
class Case:
    """One measurement: the same inputs for every contestant.

    shape: named sizes. flops: what must be computed (the least known form). bytes: each input read once, each
    output written once.
    make(seed): fresh random inputs. definition(inputs, dtype): the plain computation with every step in `dtype`; in
    float64 it is the truth, and its error in the case's dtype is the measure of everybody's error.
    check_make(seed): smaller inputs for the correctness check, where float64 at full size costs too much.
    headline: the contestant of ours that the table compares everybody with.
    series: the scaling curve that the case is a point of; series.size is a key of shape.
    share: of the run's timing budget for one case that this one gets; below 1 for a point of a series.
    """

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    flops: int
    bytes: int
    make: Callable[[int], Inputs]
    contestants: Sequence[Contestant]
    definition: Definition
    headline: str
    check_make: Callable[[int], Inputs] | None = None
    targets: Sequence[Target] = ()
    series: Series | None = None
    share: float = 1.0


def cases(op: str, device: torch.device, suite: str) -> Sequence[Case]:
    """The cases of `op` for `device`.

    Args:
        op: a key of REGISTRY. device: where to measure; shapes fit the device. suite: "quick" or "full".
    Raises:
        ValueError: an unknown op or suite.
    """
    if op not in REGISTRY:
        raise ValueError(f"bench: `op` must be one of {', '.join(map(repr, REGISTRY))}, got {op!r}")
    if suite not in SUITES:
        raise ValueError(f"bench: `suite` must be one of {', '.join(map(repr, SUITES))}, got {suite!r}")
    return importlib.import_module(REGISTRY[op]).cases(device, suite)
