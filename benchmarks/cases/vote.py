"""V1, the vote: the winner, its weight, total, margin and ties of many questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from calm_fast.benchmarks.baselines import vote as baselines
from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant, Inputs, Target, Thunk, Values

OP = "vote"


@dataclass(frozen=True)
class Shape:
    """Q questions of K samples in `classes` answer classes, frequent ones first as in real samples."""

    q: int
    k: int
    classes: int = 16
    weighted: bool = False

    def sizes(self) -> dict[str, int]:
        return {"Q": self.q, "K": self.k}

    def bytes(self) -> int:
        return self.q * (self.k * (8 + 4 * self.weighted) + 40)

    def flops(self) -> int:
        """Count two additions per sample: one for its class, one for the total."""
        return 2 * self.q * self.k


def _make(s: Shape, device: torch.device) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        g = torch.Generator().manual_seed(seed)
        # Zipf's law with a sharpness per question, so the share of the most frequent answer varies
        sharpness = 0.5 + 2.0 * torch.rand(s.q, 1, generator=g)
        shares = torch.arange(1, s.classes + 1).float() ** -sharpness
        answers = torch.multinomial(shares, s.k, replacement=True, generator=g)
        scores = torch.rand(s.q, s.k, generator=g)
        return {"answers": answers.to(device), "scores": scores.to(device) if s.weighted else None}

    return make


def _ours(impl: str) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        from calm_fast._ops.vote.api import decide, vote

        answers, scores = inputs["answers"], inputs["scores"]
        rule = "count" if scores is None else "weighted"
        try:
            decide(answers, scores, rule=rule, impl=impl)
        except RuntimeError as reason:
            raise CannotRunError(str(reason)) from reason
        return lambda: vote(answers, scores, rule=rule, impl=impl)._asdict()

    return prepare


def _counter(inputs: Inputs) -> Thunk:
    """Prepare a Counter. Its lists are built beforehand: a user of Counter has lists already."""
    rows = inputs["answers"].tolist()
    if inputs["scores"] is None:
        return lambda: baselines.counter_vote(rows)
    scores = inputs["scores"].tolist()
    return lambda: baselines.counter_weighted(rows, scores)


def _counter_winner(inputs: Inputs) -> Thunk:
    rows = inputs["answers"].tolist()
    return lambda: baselines.counter_winner(rows)


def _numpy(s: Shape) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        answers, scores = inputs["answers"].cpu().numpy(), inputs["scores"]
        scores = None if scores is None else scores.double().cpu().numpy()
        return lambda: baselines.numpy_vote(answers, scores, s.classes)

    return prepare


def _torch(compute: Callable[..., Values], s: Shape) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        return lambda: compute(inputs["answers"], inputs["scores"], s.classes)

    return prepare


def _definition(inputs: Inputs, dtype: torch.dtype) -> Values:
    from calm_fast._ops.vote.reference import vote_reference

    scores = inputs["scores"]
    found = vote_reference(inputs["answers"], scores, rule="count" if scores is None else "weighted")
    return dict(zip(baselines.NAMES, found, strict=True))


def _winner_definition(inputs: Inputs, dtype: torch.dtype) -> Values:
    values = _definition(inputs, dtype)
    return {name: values[name] for name in ("winner", "weight")}


def vote_case(name: str, s: Shape, device: torch.device, targets: Sequence[Target] = ()) -> Case:
    """Return a case, checked as float32: baselines may add in any order (our own tests require every bit).

    Every baseline except `counter_winner` has the same output. Only our implementations accept large class ids.
    """
    contestants = [Contestant("calm_fast", _ours("auto"), ours=True)]
    contestants += [Contestant(f"calm_fast_{impl}", _ours(impl), ours=True) for impl in ("native", "torch")]
    contestants.append(Contestant("counter", _counter, python=True))
    if not s.weighted:
        contestants.append(
            Contestant("counter_winner", _counter_winner, definition=_winner_definition, yardstick=True, python=True)
        )
    contestants.append(Contestant("numpy", _numpy(s), python=True))
    contestants.append(Contestant("torch_one_hot", _torch(baselines.one_hot_vote, s)))
    contestants.append(Contestant("torch_scatter", _torch(baselines.scatter_vote, s)))
    small = _make(Shape(min(s.q, 300), s.k, s.classes, s.weighted), device)
    return Case(
        OP, name, s.sizes(), torch.float32, s.flops(), s.bytes(), _make(s, device), tuple(contestants), _definition,
        "calm_fast", small, targets,
    )  # fmt: skip


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device` in `suite`; "full" adds many samples per question."""
    limits = (
        Target("calm_fast", "counter", 20.0),
        Target("calm_fast", "torch_one_hot", 1.5),
        Target("calm_fast", "torch_scatter", 1.5),
    )
    found = [
        vote_case("v1_vote", Shape(5000, 64), device, limits),
        vote_case("v1_vote_weighted", Shape(5000, 64, weighted=True), device, limits),
    ]
    if suite == "full":
        found.append(vote_case("v1_vote_many_samples", Shape(500, 1024, classes=100), device))
        found.append(vote_case("v1_vote_few_questions", Shape(16, 16), device))
    return found
