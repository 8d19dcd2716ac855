"""Scores of samples as the weights of a vote."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

SCORES_ARE = ("weights", "log")


def score_matrix(rows: Sequence[Sequence[float | None] | None], width: int) -> torch.Tensor:
    """Return (Q, width) float64 scores of Q questions; NaN where a sample has none."""
    scores = torch.full((len(rows), width), math.nan, dtype=torch.float64)
    for q, row in enumerate(rows):
        values = [math.nan if value is None else value for value in row or ()]
        scores[q, : len(values)] = torch.tensor(values, dtype=torch.float64)
    return scores


def check_scores_are(where: str, scores_are: str) -> None:
    """Raise ValueError unless `scores_are` is "weights" or "log"."""
    if scores_are not in SCORES_ARE:
        raise ValueError(f"{where}: `scores_are` must be 'weights' or 'log', got {scores_are!r}")


def vote_weights(
    scores: torch.Tensor,
    valid: torch.Tensor,
    numbers: Sequence[int],
    *,
    rule: str,
    lam: float,
    scores_are: str,
    where: str,
    hint: str,
    name: str = "scores",
) -> torch.Tensor:
    """Return the scores (Q, K) as weights for `ops.vote` with a rule by scores.

    Args:
        scores: float64, NaN = no score. valid: (Q, K) bool, the samples that vote. numbers: each question's row, for
            errors. rule, lam: of the vote.
        scores_are: "weights" leaves them as they are. "log" makes exp(score - largest voting score of the question) of
            log-probabilities: 1 for the most probable sample, and none underflows together with all others.
        where, name: the function and the field that an error names. hint: what it says to do.
    Raises:
        ValueError: a score would be a negative weight, which lets the minority win.
    """
    voting = valid & ~scores.isnan()
    if scores_are == "log":
        largest = scores.masked_fill(~voting, -math.inf).amax(1, keepdim=True) if scores.shape[1] else scores
        return (scores - largest.masked_fill(largest.isinf(), 0.0)).masked_fill(~voting, math.nan).exp()
    weights = scores if rule == "weighted" else 1 + lam * scores
    negative = (weights < 0) & voting
    if negative.any():
        question, sample = negative.nonzero()[0].tolist()
        raise ValueError(
            f"{where}: `{name}` must be weights of at least 0 with rule {rule!r}, got "
            f"{float(scores[question, sample]):g} in row {numbers[question]} (from 0); {hint}"
        )
    return scores
