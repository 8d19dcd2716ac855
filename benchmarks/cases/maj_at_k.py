"""V1, the curve: accuracy of a majority vote over k samples for k = 1, 2, 4, ..., K, resampled and exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast.benchmarks.baselines import maj_at_k as baselines
from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant, Inputs, Target, Thunk, Values

OP = "maj_at_k"


@dataclass(frozen=True)
class Shape:
    """Q questions of K samples in `classes` answer classes, frequent ones first as in real samples."""

    q: int
    k: int
    resamples: int = 1000
    classes: int = 16

    def sizes(self) -> dict[str, int]:
        return {"Q": self.q, "K": self.k, "resamples": self.resamples}

    def ks(self) -> list[int]:
        return [2**i for i in range(self.k.bit_length())]

    def bytes(self) -> int:
        return self.q * (self.k + 1) * 8 + 16 * len(self.ks())

    def flops(self) -> int:
        """Count one swap and one vote per draw; k = K needs no draws."""
        return 2 * self.q * self.resamples * (self.k // 2)


def _make(s: Shape, device: torch.device) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        # Zipf's law with a sharpness per question; the most frequent answer is the gold answer half of the time
        sharpness = 0.5 + 2.0 * torch.rand(s.q, 1, generator=g)
        answers = torch.multinomial(torch.arange(1, s.classes + 1).float() ** -sharpness, s.k, True, generator=g)
        elsewhere = torch.randint(1, s.classes, (s.q,), generator=g)
        correct = torch.where(torch.rand(s.q, generator=g) < 0.5, 0, elsewhere)
        return {"answers": answers.to(device), "correct": correct.to(device), "shape": s}

    return make


def _ours(method: str, impl: str) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        from calm_fast._ops.maj_at_k.api import decide, maj_at_k

        s: Shape = inputs["shape"]
        arguments: dict[str, Any] = {"ks": s.ks(), "method": method, "resamples": s.resamples, "impl": impl}
        try:
            decide(inputs["answers"], inputs["correct"], **arguments)
        except RuntimeError as reason:
            raise CannotRunError(str(reason)) from reason
        return lambda: maj_at_k(inputs["answers"], inputs["correct"], **arguments)._asdict()

    return prepare


def _numpy(inputs: Inputs) -> Thunk:
    answers, correct, s = inputs["answers"].cpu().numpy(), inputs["correct"].cpu().numpy(), inputs["shape"]
    return lambda: baselines.numpy_curve(answers, correct, s.ks(), s.resamples, 0)


def _torch(inputs: Inputs) -> Thunk:
    s: Shape = inputs["shape"]
    columns = 4096 if inputs["answers"].device.type == "cpu" else 1 << 20
    return lambda: baselines.torch_curve(inputs["answers"], inputs["correct"], s.ks(), s.resamples, 0, columns)


def _python(inputs: Inputs) -> Thunk:
    rows, correct, s = inputs["answers"].tolist(), inputs["correct"].tolist(), inputs["shape"]
    return lambda: baselines.python_curve(rows, correct, s.ks(), s.resamples, 0)


def _curve(inputs: Inputs, method: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from calm_fast._ops.maj_at_k.api import curve
    from calm_fast._ops.maj_at_k.reference import maj_at_k_reference

    s: Shape = inputs["shape"]
    answers, correct = inputs["answers"].cpu(), inputs["correct"].cpu()
    credit = maj_at_k_reference(answers, correct, None, None, s.ks(), method, s.resamples)
    return curve(credit)._asdict(), credit


def _resampled(inputs: Inputs, dtype: torch.dtype) -> Values:
    """Return the curve over exactly the subsets that the reference draws."""
    return _curve(inputs, "resample")[0]


def _exact(inputs: Inputs, dtype: torch.dtype) -> Values:
    return _curve(inputs, "exact")[0]


def _expected(inputs: Inputs, dtype: torch.dtype) -> Values:
    """Return the exact curve, the expectation for subsets from another random generator.

    The bound is twice the error of "the plain computation"; here that is the exact curve shifted by 2 standard errors.
    The credit of a resample lies in [0, 1], so its variance is at most p (1 - p).
    """
    values, credit = _curve(inputs, "exact")
    if dtype != torch.float64:
        variance = (credit * (1 - credit)).sum(0) / inputs["shape"].resamples / credit.shape[0] ** 2
        values["accuracy"] = values["accuracy"] + 2 * variance.sqrt()
    return {"accuracy": values["accuracy"]}


def curve_case(name: str, s: Shape, device: torch.device, targets: Sequence[Target] = (), slow: bool = False) -> Case:
    """Return a case. slow: few enough questions for torch on a CPU and for plain Python."""
    contestants = [Contestant("calm_fast", _ours("resample", "auto"), ours=True)]
    contestants.append(Contestant("calm_fast_native", _ours("resample", "native"), ours=True))
    if slow or device.type != "cpu":
        contestants.append(Contestant("calm_fast_torch", _ours("resample", "torch"), ours=True))
    contestants.append(Contestant("calm_fast_exact", _ours("exact", "auto"), ours=True, definition=_exact))
    contestants.append(Contestant("calm_fast_exact_torch", _ours("exact", "torch"), ours=True, definition=_exact))
    contestants.append(Contestant("numpy", _numpy, definition=_expected, python=True))
    contestants.append(Contestant("torch", _torch, definition=_expected))
    if slow:
        contestants.append(Contestant("python", _python, definition=_expected, python=True))
    small = _make(replace(s, q=min(s.q, 12), resamples=min(s.resamples, 40)), device)
    return Case(
        OP, name, s.sizes(), torch.float32, s.flops(), s.bytes(), _make(s, device), tuple(contestants), _resampled,
        "calm_fast", small, targets,
    )  # fmt: skip


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device` in `suite`: few questions with every baseline, full size with the fast ones."""
    limits = (Target("calm_fast", "numpy", 20.0 if device.type == "cuda" else 10.0),)
    found = [curve_case("v1_curve_50_questions", Shape(50, 64), device, slow=True)]
    full = curve_case("v1_curve", Shape(5000, 64), device, limits)
    if suite == "quick":  # the same questions but fewer resamples: one turn of numpy takes seconds
        full = curve_case("v1_curve_200_resamples", Shape(5000, 64, resamples=200), device, limits)
    return [*found, full]
