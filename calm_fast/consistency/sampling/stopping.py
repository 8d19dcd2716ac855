"""When to stop sampling: the probability, given the votes so far, that the leading answer stays the leader."""

from __future__ import annotations

import math

import torch

from calm_fast.core.checks import bad_type, bad_value, check_finite_number, values_checked

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def leader_probability(top: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the probability that the leading answer is the more frequent one of the two most frequent answers.

        P = 1 - I_{1/2}(top + 1, second + 1) = 1 - sum_{i <= second} C(n, i) / 2^n,   n = top + second + 1

    It is the posterior probability, from a uniform prior, that the leader's share is above one half among the samples
    that chose either of the two. I is the regularised incomplete beta function, which is the sum for integers. For a
    vote by rule "count", top = vote.weight and second = vote.weight - vote.margin.

    Args:
        top: votes of the leading answer, any shape, integer dtype. second: votes of the next answer, same shape,
            0 <= second <= top.
    Returns:
        the same shape, float64, from 1/2 to 1; 1/2 where the two are equal.
    Raises:
        TypeError, ValueError: the arguments are not integer tensors of one shape and device, or second is out of range,
            which is checked on a CPU.
    Source: Adaptive-Consistency (arXiv 2305.11860), the Beta criterion.
    """
    for name, votes in (("top", top), ("second", second)):
        if not isinstance(votes, torch.Tensor) or votes.dtype not in _INTEGERS:
            raise bad_type("leader_probability", name, "a tensor of integer dtype", votes)
    if top.shape != second.shape or top.device != second.device:
        expected = f"of top's shape {tuple(top.shape)} and on {top.device}"
        raise bad_value("leader_probability", "second", expected, f"shape {tuple(second.shape)} on {second.device}")
    if not top.numel():
        return torch.zeros(top.shape, dtype=torch.float64, device=top.device)
    top, second = top.long(), second.long()
    if values_checked(top) and not bool(((second >= 0) & (second <= top)).all()):
        raise bad_value("leader_probability", "second", "0 <= second <= top", f"top {top}, second {second}")
    n = (top + second + 1).double().unsqueeze(-1)
    i = torch.arange(int(second.max()) + 1, dtype=torch.float64, device=top.device)
    logs = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma((n - i).clamp(min=0) + 1) - n * math.log(2)
    behind = logs.exp().masked_fill(i > second.unsqueeze(-1), 0.0).sum(-1)
    return torch.where(top == second, 0.5, 1 - behind)


def should_stop(top: torch.Tensor, second: torch.Tensor, threshold: float = 0.95) -> torch.Tensor:
    """Return a bool tensor, True where `leader_probability(top, second)` reaches `threshold`.

    Args:
        top, second: as in `leader_probability`. threshold: above 1/2 and at most 1; 1/2 would stop before any sample.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    """
    check_finite_number("should_stop", "threshold", threshold)
    if not 0.5 < threshold <= 1:
        raise bad_value("should_stop", "threshold", "above 1/2 and at most 1", str(threshold))
    return leader_probability(top, second) >= threshold
