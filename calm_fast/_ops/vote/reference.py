"""Definition of vote, in plain Python: which answer the samples of each question choose."""

from __future__ import annotations

import torch

from calm_fast._ops.voting.reference import ordered_sum, sample_weights, tie_limit, voting_samples

# winner, weight, total, margin, ties: each (Q,)
VoteTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def vote_reference(
    answers: torch.Tensor,
    scores: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    rule: str = "count",
    lam: float = 1.0,
) -> VoteTensors:
    """Return the winning class of each question, its weight, the total weight, the margin and the tie count.

        W_c = sum of w_i over the valid samples i of class c, in sample order;   top = max_c W_c
        tied = classes with W_c >= (1 - 1e-9) top;   winner = the tied class that appears first;   weight = W_winner
        margin = 0 if several classes are tied, top if there is no other class, else top - (next largest W_c)

    Args:
        answers: (Q, K) int64, equal ids are equal answers; a negative one does not vote. scores: (Q, K) float or None.
        valid: (Q, K) bool or None (all). rule, lam: how a sample is weighed, see `voting.reference.sample_weights`.
    Returns:
        winner, weight, total, margin, ties, each (Q,): int64, three times float64, int64. A question without a
        valid sample has winner -1 and zeros.
    Source: NAT (arXiv 2312.12832) section 3.4.
    """
    q = answers.shape[0]
    every_score = [None] * q if scores is None else scores.double().tolist()
    every_valid = [None] * q if valid is None else valid.tolist()
    rows = [
        _vote(a, sample_weights(s, voting_samples(a, v), rule, lam))
        for a, s, v in zip(answers.tolist(), every_score, every_valid, strict=True)
    ]
    winner, weight, total, margin, ties = zip(*rows, strict=True) if rows else ((), (), (), (), ())

    def tensor(values: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=answers.device)

    return (
        tensor(winner, torch.int64),
        tensor(weight, torch.float64),
        tensor(total, torch.float64),
        tensor(margin, torch.float64),
        tensor(ties, torch.int64),
    )


def _vote(answers: list[int], weights: list[float | None]) -> tuple[int, float, float, float, int]:
    """Return winner, weight, total, margin and ties of one question."""
    classes: dict[int, list[float]] = {}  # in order of appearance
    for answer, weight in zip(answers, weights, strict=True):
        if weight is not None:
            classes.setdefault(answer, []).append(weight)
    if not classes:
        return -1, 0.0, 0.0, 0.0, 0
    sums = {answer: ordered_sum(group) for answer, group in classes.items()}
    descending = sorted(sums.values(), reverse=True)
    limit = tie_limit(descending[0])
    tied = [answer for answer, weight in sums.items() if weight >= limit]
    total = ordered_sum([weight for weight in weights if weight is not None])
    if len(tied) > 1:
        margin = 0.0
    else:
        margin = descending[0] - descending[1] if len(descending) > 1 else descending[0]
    return tied[0], sums[tied[0]], total, margin, len(tied)
