"""Scores and valid masks for the cases of vote and maj_at_k."""

from __future__ import annotations

from typing import Protocol

import torch


class SampleSpec(Protocol):
    """The fields of a case's Spec that describe its samples."""

    @property
    def rule(self) -> str: ...

    @property
    def step(self) -> float:
        """Scores are multiples of it, so that sums of different classes collide; 0 = any score."""

    @property
    def unscored(self) -> float:
        """Share of NaN scores."""

    @property
    def invalid(self) -> float | None:
        """Share of samples that do not vote; None = no `valid` at all."""

    @property
    def strided(self) -> bool: ...


def draw_samples(
    spec: SampleSpec, answers: torch.Tensor, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> dict[str, torch.Tensor | None]:
    """Return answers (Q, K) int64, scores (Q, K) `dtype` or None, valid (Q, K) bool or None, laid out as `spec` says.

    Samples that do not vote hold values that must not matter: class -7 and an infinite score.
    """

    def lay_out(values: torch.Tensor) -> torch.Tensor:  # strided: every other column of a transposed matrix
        values = values.repeat_interleave(2, 1).T.contiguous().T[:, ::2] if spec.strided else values
        return values.to(device)

    # no weight is negative for a lam of at least -0.5
    scores = torch.randn(answers.shape, generator=generator, dtype=torch.float64).abs().clamp(max=2.0)
    if spec.step:
        scores = (scores / spec.step).round() * spec.step
    scores = scores.to(dtype)
    scores[torch.rand(answers.shape, generator=generator) < spec.unscored] = float("nan")
    valid = None
    if spec.invalid is not None:
        valid = torch.rand(answers.shape, generator=generator) >= spec.invalid
        answers, scores = answers.masked_fill(~valid, -7), scores.masked_fill(~valid, float("inf"))
    return {
        "answers": lay_out(answers),
        "scores": None if spec.rule == "count" else lay_out(scores),
        "valid": None if valid is None else lay_out(valid),
    }
