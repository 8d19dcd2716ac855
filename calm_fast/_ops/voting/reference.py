"""Definitions that vote and maj_at_k share: the weight of a sample, ordered sums, the tie tolerance."""

from __future__ import annotations

import math

# classes this close to the heaviest, relative to it, are tied with it; voting.torch_impl and csrc have the same number
TIED = 1e-9


def tie_limit(top: float) -> float:
    """Return the least weight that is tied with `top`. One product, so that no compiler can fuse it."""
    return top * (1 - TIED if top >= 0 else 1 + TIED)


def voting_samples(answers: list[int], valid: list[bool] | None) -> list[bool]:
    """Return which samples of one question vote: the valid ones, None = all; never a negative answer."""
    return [answer >= 0 and (valid is None or valid[i]) for i, answer in enumerate(answers)]


def sample_weights(
    scores: list[float] | None, valid: list[bool], rule: str = "count", lam: float = 1.0
) -> list[float | None]:
    """Return the weight of each sample of one question, None for a sample that does not vote.

        count: 1;   weighted: s_i;   adaptive: 1 + lam s_i

    A NaN score marks a sample without a score: s_i is then the mean of the question's other valid scores, 1 if none.

    Args:
        scores: K numbers; ignored, and may be None, with rule "count". valid: K. rule: "count", "weighted" or
            "adaptive".
    Raises:
        ValueError: there are no scores, and the rule needs them.
    Source: NAT (arXiv 2312.12832) section 3.4.
    """
    if rule == "count":
        return [1.0 if votes else None for votes in valid]
    if scores is None:
        raise ValueError(f"sample_weights: `scores` must be given with rule {rule!r}, got None")
    known = [s for s, votes in zip(scores, valid, strict=True) if votes and not math.isnan(s)]
    mean = ordered_sum(known) / len(known) if known else 1.0
    weights: list[float | None] = []
    for s, votes in zip(scores, valid, strict=True):
        s = mean if math.isnan(s) else s
        weights.append((s if rule == "weighted" else 1.0 + lam * s) if votes else None)
    return weights


def ordered_sum(values: list[float]) -> float:
    """Sum in float64 in the order of the list; Python's own `sum` compensates from 3.12 on."""
    total = 0.0
    for value in values:
        total += value
    return total
