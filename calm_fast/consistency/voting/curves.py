"""The curve of any@k: the share of questions for which at least one of k samples is right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.maj_at_k.api import Curve, check_sizes, curve
from calm_fast._ops.voting.decide import check_votes
from calm_fast.core.checks import bad_value, check_tensor

_NAME = "any_at_k"


def any_at_k(
    answers: torch.Tensor, correct: torch.Tensor, *, ks: Sequence[int], valid: torch.Tensor | None = None
) -> Curve:
    """Return how often at least one of k samples is right, over ALL subsets of k of each question's valid samples.

        any[k] = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i < k} (n - c - i) / (n - i)

    for n valid samples, c of them right: the unbiased pass@k estimator.

    Args:
        answers: (Q, K) int64 >= 0. correct: (Q,) int64. ks: sizes >= 1. valid: (Q, K) bool or None. They mean the
            same as in `maj_at_k`. A k beyond a question's valid samples uses them all; a question with none scores 0.
    Returns:
        Curve(accuracy, stderr), (len(ks),) float64 each, in the order of ks.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    Deterministic. Source: "Evaluating Large Language Models Trained on Code" (arXiv 2107.03374), section 2.1.
    """
    check_votes(_NAME, answers, None, valid, "count", 1.0)
    check_tensor(_NAME, "correct", correct, "(Q,)", (torch.int64,), answers.device)
    if correct.shape[0] != answers.shape[0]:
        raise bad_value(_NAME, "correct", f"of shape (Q,) = ({answers.shape[0]},)", f"shape {tuple(correct.shape)}")
    check_sizes(_NAME, ks)
    voting = torch.ones_like(answers, dtype=torch.bool) if valid is None else valid
    n = voting.sum(1, keepdim=True)
    c = (voting & (answers == correct.unsqueeze(1))).sum(1, keepdim=True)
    i = torch.arange(answers.shape[1], device=answers.device)
    # the product is 0 once no wrong sample is left; n - i is at least 1 for every i < n
    factors = ((n - c - i).clamp(min=0).double() / (n - i).clamp(min=1)).masked_fill(i >= n, 1.0)
    missed = torch.cat([torch.ones_like(n, dtype=torch.float64), factors.cumprod(1)], 1)
    at = torch.tensor([min(int(k), answers.shape[1]) for k in ks], device=answers.device)
    return curve((1 - missed[:, at]).masked_fill(n == 0, 0.0))
