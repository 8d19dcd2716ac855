"""Baselines of vote: a Counter per question, numpy, and torch with a one-hot or a scattered table of votes.

Shapes: answers (Q, K) int64, class ids below `classes`. Every function returns the fields of `vote` in float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    import numpy as np

NAMES = ("winner", "weight", "total", "margin", "ties")


def counter_vote(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Vote with one Counter per question; a stable sort keeps the order of appearance among ties."""
    found = []
    for row in rows:
        ranked = Counter(row).most_common()
        top = ranked[0][1]
        ties = sum(votes == top for _, votes in ranked)
        found.append((ranked[0][0], top, len(row), top - ranked[1][1] if len(ranked) > 1 else top, ties))
    return dict(zip(NAMES, torch.tensor(found, dtype=torch.float64).unbind(1), strict=True))


def counter_weighted(rows: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> dict[str, torch.Tensor]:
    """Vote with one Counter of weights per question."""
    found = []
    for row, weights in zip(rows, scores, strict=True):
        votes: Counter[int] = Counter()
        for answer, weight in zip(row, weights, strict=True):
            votes[answer] += weight  # type: ignore[assignment]  # typeshed: a Counter holds int; float works too
        ranked = votes.most_common()
        top = ranked[0][1]
        ties = sum(top - weight <= 1e-9 for _, weight in ranked)
        ahead = 0.0 if ties > 1 else top - ranked[1][1] if len(ranked) > 1 else top
        found.append((ranked[0][0], top, sum(weights), ahead, ties))
    return dict(zip(NAMES, torch.tensor(found, dtype=torch.float64).unbind(1), strict=True))


def counter_winner(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Return only the winner and its votes, the least a Counter can do."""
    found = [Counter(row).most_common(1)[0] for row in rows]
    return dict(zip(NAMES, torch.tensor(found, dtype=torch.float64).unbind(1), strict=False))


def numpy_vote(
    answers: np.ndarray[Any, Any], scores: np.ndarray[Any, Any] | None, classes: int
) -> dict[str, torch.Tensor]:
    """Vote with a table from one bincount."""
    import numpy as np

    q, k = answers.shape
    flat = (answers + np.arange(q)[:, None] * classes).ravel()
    table = np.bincount(flat, None if scores is None else scores.ravel(), minlength=q * classes).reshape(q, classes)
    if scores is not None:  # a class without votes must not beat negative weights
        table[np.bincount(flat, minlength=q * classes).reshape(q, classes) == 0] = -np.inf
    first, second = np.partition(table, classes - 2, axis=1)[:, : classes - 3 : -1].T
    tied = first[:, None] - table <= 1e-9
    ties = tied.sum(1)
    winner = answers[np.arange(q), np.take_along_axis(tied, answers, 1).argmax(1)]
    total = np.full(q, k) if scores is None else scores.sum(1)
    second = np.where(np.isneginf(second), 0, second) if scores is not None else second
    values = (winner, table[np.arange(q), winner], total, np.where(ties > 1, 0, first - second), ties)
    return {name: torch.from_numpy(np.asarray(v, dtype=np.float64)) for name, v in zip(NAMES, values, strict=True)}


def _from_table(answers: torch.Tensor, table: torch.Tensor, total: torch.Tensor) -> dict[str, torch.Tensor]:
    top, following = table.topk(2, dim=1).values.unbind(1)
    tied = top.unsqueeze(1) - table <= 1e-9
    ties = tied.sum(1)
    winner = answers.gather(1, tied.gather(1, answers).to(torch.uint8).argmax(1, keepdim=True))
    margin = torch.where(ties > 1, 0.0, top - following.clamp(min=0))
    values = (winner.squeeze(1), table.gather(1, winner).squeeze(1), total, margin, ties)
    return {name: v.double() for name, v in zip(NAMES, values, strict=True)}


def one_hot_vote(answers: torch.Tensor, scores: torch.Tensor | None, classes: int) -> dict[str, torch.Tensor]:
    """Vote with a table that is a sum of one-hot rows."""
    hot = F.one_hot(answers, classes)
    if scores is None:
        return _from_table(answers, hot.sum(1), torch.full_like(answers[:, 0], answers.shape[1]))
    return _from_table(answers, (hot * scores.double().unsqueeze(2)).sum(1), scores.double().sum(1))


def scatter_vote(answers: torch.Tensor, scores: torch.Tensor | None, classes: int) -> dict[str, torch.Tensor]:
    """Vote with a table from scatter_add."""
    weights = torch.ones_like(answers, dtype=torch.float64) if scores is None else scores.double()
    table = weights.new_zeros(answers.shape[0], classes).scatter_add_(1, answers, weights)
    return _from_table(answers, table, weights.sum(1))
