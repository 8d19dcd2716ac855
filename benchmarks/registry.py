"""The benchmark registry: one case file per op. A case holds inputs, contestants, the definition and the costs."""

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
    """This machine cannot run the contestant; the message gives the reason. Its row has no time."""


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    prepare(inputs) does everything a user does once (build the layer, compile, capture a graph) and returns the
    thunk that is timed. The thunk returns its results for the correctness check.

    ours: an implementation of this package, which must be correct and must run; otherwise a baseline.
    definition: as Case.definition, if this contestant computes something other than the case.
    yardstick: it does less work than the case (the bare product, one LoRA instead of two): a useful comparison, but
    never "the best baseline".
    python: it works on numpy arrays or Python objects, whose memory torch's allocator does not see; count it too.
    """

    name: str
    prepare: Callable[[Inputs], Thunk]
    ours: bool = False
    definition: Definition | None = None
    yardstick: bool = False
    python: bool = False


@dataclass(frozen=True)
class Target:
    """A goal: `impl` needs at most 1 / `least` of the `quantity` ("ms" or "peak_bytes") that `baseline` needs.

    baseline "best": the baseline that needs the least, yardsticks excluded. Targets are reported and never fail a run.
    """

    impl: str
    baseline: str
    least: float
    quantity: str = "ms"


@dataclass(frozen=True)
class Series:
    """A scaling curve of the report, over time and memory; cases with equal Series are its points.

    title: of the curve, e.g. "training step, number of augmenters". size: the key of Case.shape on the x axis.
    power: time should grow no faster than size ** power (1: linear; 2: attention in the sequence length).
    """

    title: str
    size: str
    power: float = 1.0


@dataclass(frozen=True)
class Case:
    """One measurement: the same inputs for every contestant.

    shape: named sizes. flops: those of the cheapest known form. bytes: each input read once, each output written once.
    make(seed): fresh random inputs. definition(inputs, dtype): the plain computation with every step in `dtype`. In
    float64 it is the truth; its error in the case's dtype sets the bound for every contestant.
    check_make(seed): smaller inputs for the correctness check, if float64 at full size costs too much.
    headline: the implementation of ours that the table compares with every other contestant.
    series: the scaling curve that this case belongs to; series.size is a key of shape.
    share: fraction of the timing budget of one case; below 1 for a point of a series.
    roundings: of the error bound, beside twice the plain error. Folding rounds each of its products once more, which
        only shows if so few numbers are compared that the plain computation may be lucky.
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
    roundings: int = 1


def cases(op: str, device: torch.device, suite: str) -> Sequence[Case]:
    """Return the cases of `op` for `device`.

    Args:
        op: a key of REGISTRY. device: where to measure; shapes suit the device. suite: "quick" or "full".
    Raises:
        ValueError: `op` or `suite` is unknown.
    """
    if op not in REGISTRY:
        raise ValueError(f"bench: `op` must be one of {', '.join(map(repr, REGISTRY))}, got {op!r}")
    if suite not in SUITES:
        raise ValueError(f"bench: `suite` must be one of {', '.join(map(repr, SUITES))}, got {suite!r}")
    found: Sequence[Case] = importlib.import_module(REGISTRY[op]).cases(device, suite)
    return found
