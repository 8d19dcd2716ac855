"""vote from torch's own ops: one table of votes per question; a stable sort finds the classes where ids are large."""

from __future__ import annotations

import torch

from calm_fast._ops.voting.torch_impl import ordered_sum, sample_weights, tie_limit, voting_samples


def vote_torch(
    answers: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    rule: str,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return winner, weight, total, margin, ties (Q,) as `vote_reference` defines them, the same bits on every device.

    Memory grows with Q K, never with Q K^2.
    """
    q, k = answers.shape
    if not answers.numel():
        weight, total, margin = (torch.zeros(q, dtype=torch.float64, device=answers.device) for _ in range(3))
        return answers.new_full((q,), -1), weight, total, margin, answers.new_zeros(q)
    valid = voting_samples(answers, valid)
    columns, width = class_columns(answers, valid)
    weights = sample_weights(answers, scores, valid, rule, lam)
    sums = column_sums(columns, weights, width)
    opened = sums > 0 if rule == "count" else torch.zeros_like(sums, dtype=torch.bool).scatter_(1, columns, True)
    opened[:, width] = False  # the column of the samples that do not vote
    sums.masked_fill_(~opened, -torch.inf)
    top, at = sums.max(1, keepdim=True)
    tied = (sums >= tie_limit(top)) & opened
    ties = tied.sum(1)
    place = tied.gather(1, columns).to(torch.uint8).argmax(1, keepdim=True)  # index of the first sample of a tied class
    winner = answers.gather(1, place).squeeze(1).masked_fill_(ties == 0, -1)
    weight = sums.gather(1, columns.gather(1, place)).squeeze(1).masked_fill_(ties == 0, 0.0)
    top = top.squeeze(1)
    following = sums.scatter_(1, at, -torch.inf).amax(1)
    margin = torch.where(following.isneginf(), top, top - following).masked_fill_(ties != 1, 0.0)
    total = weights.sum(1) if rule == "count" else ordered_sum(weights)  # ones add up to the same in any order
    return winner, weight, total, margin, ties


def class_columns(answers: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Assign each class of a question a column of a table of votes (Q, width + 1).

    Returns:
        columns (Q, K) int64 in 0 .. width - 1, `width` for a sample that does not vote; and width.
    """
    k = answers.shape[1]
    if answers.device.type == "cpu":  # elsewhere reading the largest id would wait for the device
        known = answers if valid is None else answers.masked_fill(~valid, 0)
        width = int(known.max()) + 1
        if width <= 2 * k + 64:  # grouped answers have small ids, which serve as columns
            return (known if valid is None else known.masked_fill_(~valid, width)), width
    return class_slots(answers, valid), k


def class_slots(answers: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return for each sample of answers (Q, K) the index of its class's first valid sample; K if it is not valid."""
    k = answers.shape[1]
    keys = answers if valid is None else answers.masked_fill(~valid, -1)
    keys, order = keys.sort(dim=1, stable=True)
    begins = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[:, 1:], keys[:, :-1], out=begins[:, 1:])
    places = torch.arange(k, device=answers.device).expand_as(keys)
    start = places.masked_fill(~begins, 0).cummax(1).values
    first = order.gather(1, start)
    if valid is not None:
        first = first.masked_fill(keys < 0, k)
    return torch.empty_like(order).scatter_(1, order, first)


def column_sums(columns: torch.Tensor, weights: torch.Tensor, width: int) -> torch.Tensor:
    """Sum weights (Q, K) float64 by column into (Q, width + 1), each sum in sample order."""
    sums = weights.new_zeros(weights.shape[0], width + 1)
    if weights.device.type == "cpu":  # one thread walks a row from left to right
        return sums.scatter_add_(1, columns, weights)
    return add_in_turns(sums, columns, weights)


def add_in_turns(sums: torch.Tensor, columns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Add one sample per row at a time: no two additions of a scatter_add_ collide, so each sum is in sample order."""
    for j in range(weights.shape[1]):
        sums.scatter_add_(1, columns[:, j : j + 1], weights[:, j : j + 1])
    return sums
