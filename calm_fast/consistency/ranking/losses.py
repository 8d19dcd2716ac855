"""Losses and accuracy of a ranker, which is to score right rationales above wrong ones of the same question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from calm_fast.core.checks import bad_type, bad_value, check_finite_number, check_tensor

LOSSES = ("power", "margin", "bce")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def ranking_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor,
    *,
    loss: str = "power",
    margin: float = 0.3,
    power: float = 3.0,
) -> torch.Tensor:
    """Return the mean over questions of a loss on scores s = sigmoid(logits).

        power     mean_r (1 - s_r)^p + mean_w s_w^p            (the released code's loss, with p = 3)
        margin    mean_{r,w} max(0, margin - (s_r - s_w))      (margin ranking)
        bce       mean of the binary cross-entropy             (uses questions with rationales of one kind too)

    r is a right and w a wrong rationale of one question. Within a question the mean is over all its pairs, the
    expectation of drawing one pair per question as the released code does. power and margin use only questions with
    both right and wrong rationales.

    Args:
        logits: (Q, K) float. labels: (Q, K) bool, True = right. valid: (Q, K) bool, True = the entry is a rationale.
        loss: "power", "margin" or "bce". margin: of loss "margin". power: p of loss "power".
    Returns:
        a scalar; 0 with zero gradients if no question counts.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
    Source: NAT (arXiv 2312.12832) section 3.4.
    """
    if loss not in LOSSES:
        raise bad_value("ranking_loss", "loss", f"one of {', '.join(map(repr, LOSSES))}", repr(loss))
    check_tensor("ranking_loss", "logits", logits, "(Q, K)", _FLOATS)
    for name, flags in (("labels", labels), ("valid", valid)):
        check_tensor("ranking_loss", name, flags, "(Q, K)", (torch.bool,), logits.device)
        if flags.shape != logits.shape:
            expected = f"of the shape of `logits`, {tuple(logits.shape)}"
            raise bad_value("ranking_loss", name, expected, f"shape {tuple(flags.shape)}")
    for name, number in (("margin", margin), ("power", power)):
        check_finite_number("ranking_loss", name, number)
    right, wrong = labels & valid, ~labels & valid
    n_right, n_wrong = right.sum(1), wrong.sum(1)
    if loss == "bce":
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none")
        per_question, counts = _mean(each, valid), (n_right + n_wrong) > 0
    else:
        s, counts = logits.sigmoid(), (n_right > 0) & (n_wrong > 0)
        if loss == "power":
            per_question = _mean((1 - s) ** power, right) + _mean(s**power, wrong)
        else:
            gaps = F.relu(margin - (s[:, :, None] - s[:, None, :]))
            per_question = _mean(gaps.flatten(1), (right[:, :, None] & wrong[:, None, :]).flatten(1))
    return torch.where(counts, per_question, 0.0).sum() / counts.sum().clamp(min=1)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)


class PairAccuracy(NamedTuple):
    """Pair accuracy over questions.

    accuracy: share of the (right, wrong) pairs of one question in the right order, a tie counting 1/2; NaN without one.
    pairs: number of pairs. questions: number of questions that have one.
    """

    accuracy: float
    pairs: int
    questions: int


def pair_counts(scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each question its pairs in the right order, a tie counts 1/2, and all its pairs: (Q,) float64 each."""
    for name, rows in (("scores", scores), ("labels", labels)):
        if isinstance(rows, str) or not hasattr(rows, "__len__"):
            raise bad_type("pair_accuracy", name, "a sequence with one entry for each question", rows)
    if len(labels) != len(scores):
        expected = f"a sequence with one entry for each of the {len(scores)} questions of `scores`"
        raise bad_value("pair_accuracy", "labels", expected, f"{len(labels)} entries")
    won, pairs = torch.zeros(len(scores), dtype=torch.float64), torch.zeros(len(scores), dtype=torch.float64)
    for i, (s, right) in enumerate(zip(scores, labels, strict=True)):
        right = torch.as_tensor(right, dtype=torch.bool).cpu()
        s = torch.as_tensor(s).cpu()
        if s.dim() != 1:
            raise bad_value("pair_accuracy", f"scores[{i}]", "1-dimensional (K_q,)", f"shape {tuple(s.shape)}")
        if right.shape != s.shape:
            expected = f"one label for each of {len(s)} scores"
            raise bad_value("pair_accuracy", f"labels[{i}]", expected, f"shape {tuple(right.shape)}")
        gaps = s[right][:, None] - s[~right][None, :]
        won[i] = ((gaps > 0).double() + 0.5 * (gaps == 0).double()).sum()
        pairs[i] = gaps.numel()
    return won, pairs


def pair_accuracy(scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> PairAccuracy:
    """Return the share of pairs in which a right rationale scores above a wrong one of the same question.

    Args:
        scores: for each question (K_q,) float. labels: for each question (K_q,) bool, True = right.
    Returns:
        PairAccuracy(accuracy, pairs, questions).
    Raises:
        TypeError, ValueError: scores and labels have other types, or differ in their lengths; the message says where.
    """
    won, pairs = pair_counts(scores, labels)
    total = float(pairs.sum())
    return PairAccuracy(float(won.sum()) / total if total else float("nan"), int(total), int((pairs > 0).sum()))
