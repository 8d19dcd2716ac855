"""vote from torch's own ops: classes by a stable sort, weights added up in the order of the samples."""

from __future__ import annotations

import torch

from calm_fast.torch_impl.voting import TIED, ordered_sum, sample_weights


def vote_torch(
    answers: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    rule: str,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """winner, weight, total, margin, ties (Q,) as `vote_reference` defines them, the same bits on every device.

    A class is known by its slot, the place of its first valid sample: so the winner, the tied class that appears
    first, is the tied slot of smallest number. Memory grows with Q K, never with Q K^2.
    """
    q, k = answers.shape
    device = answers.device
    if not k:
        none = torch.zeros(q, dtype=torch.float64, device=device)
        return answers.new_full((q,), -1), none, none.clone(), none.clone(), answers.new_zeros(q)
    weights = sample_weights(answers, scores, valid, rule, lam)
    slots = class_slots(answers, valid)
    # a sample without a vote stands in slot k
    sums = slot_sums(slots, weights)[:, :k]
    opened = slots == torch.arange(k, device=device)
    sums = sums.masked_fill(~opened, -torch.inf)
    top, at = sums.max(1, keepdim=True)
    tied = (top - sums <= TIED) & opened
    ties = tied.sum(1)
    place = tied.to(torch.uint8).argmax(1, keepdim=True)
    anyone = ties > 0
    winner = answers.gather(1, place).squeeze(1).masked_fill(~anyone, -1)
    weight = sums.gather(1, place).squeeze(1).masked_fill(~anyone, 0.0)
    top = top.squeeze(1)
    following = sums.scatter_(1, at, -torch.inf).amax(1)
    margin = torch.where(following.isneginf(), top, top - following)
    margin = margin.masked_fill(ties != 1, 0.0)
    return winner, weight, ordered_sum(weights), margin, ties


def class_slots(answers: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """For each sample of answers (Q, K) the place of its class's first valid sample, (Q, K) int64; K if not valid."""
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


def slot_sums(slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums of weights (Q, K) float64 by slot, (Q, K + 1), each added up in the order of the samples."""
    q, k = weights.shape
    sums = weights.new_zeros(q, k + 1)
    if weights.device.type == "cpu":  # one thread walks a row from left to right
        return sums.scatter_add_(1, slots, weights)
    for j in range(k):  # one sample a row at a time: no two additions meet, so their order is that of the samples
        sums.scatter_add_(1, slots[:, j : j + 1], weights[:, j : j + 1])
    return sums
