"""Functions that vote and maj_at_k share in torch: the weight of every sample, and sums in sample order."""

from __future__ import annotations

import torch

TIED = 1e-9  # as voting.reference.TIED; engines import no reference


def tie_limit(top: torch.Tensor) -> torch.Tensor:
    """Return the least weight that is tied with `top`, as voting.reference.tie_limit."""
    return torch.where(top >= 0, top * (1 - TIED), top * (1 + TIED))


def voting_samples(answers: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Return which samples vote (Q, K), None if all do: those that are valid and, where nobody checks, not negative."""
    known = answers >= 0
    if answers.device.type == "cpu" and bool(known.all()):  # elsewhere reading it would wait for the device
        return valid
    return known if valid is None else known & valid


def sample_weights(
    answers: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    rule: str,
    lam: float,
) -> torch.Tensor:
    """Return the weight of each sample, 0 for a sample that does not vote.

    Args:
        answers: (Q, K) int64. scores: (Q, K) float or None. valid: (Q, K) bool or None (all).
        rule: "count", "weighted" or "adaptive". lam: weight of the score in "adaptive".
    Raises:
        ValueError: there are no scores, and the rule needs them.
    Returns:
        (Q, K) float64, the same bits as the reference's weights.
    """
    if rule == "count":
        ones = torch.ones(answers.shape, dtype=torch.float64, device=answers.device)
        return ones if valid is None else ones.masked_fill_(~valid, 0.0)
    if scores is None:
        raise ValueError(f"sample_weights: `scores` must be given with rule {rule!r}, got None")
    s = scores.double()
    unknown = s.isnan()
    silent = unknown if valid is None else unknown | ~valid
    total, known = ordered_sum(s.masked_fill(silent, 0.0)), (~silent).sum(1)
    mean = torch.where(known > 0, total / known.clamp(min=1), 1.0)
    s = torch.where(unknown, mean.unsqueeze(1), s)
    weights = s if rule == "weighted" else 1.0 + lam * s
    return weights if valid is None else weights.masked_fill(~valid, 0.0)


def ordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum each row of (Q, K) float64 from left to right, on every device."""
    total = values.new_zeros(values.shape[0])
    for column in values.t().contiguous().unbind():
        total += column
    return total
