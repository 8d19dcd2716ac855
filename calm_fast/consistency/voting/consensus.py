"""Questions with their samples, the vote over them, and what it says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_fast import ops
from calm_fast.consistency.answers.equality import extract_answer
from calm_fast.consistency.voting.samples import answer_text, check_row
from calm_fast.core.checks import bad_type

_CALLER = "SelfConsistency"


@dataclass(frozen=True)
class SelfConsistencyResult:
    """What the samples of one question say.

    answer: the winning answer as one of the samples writes it, None where no sample has one. weight, total, margin,
    ties: of the vote, see `ops.vote`. rationales, answers (None: none found), scores (None: not scored): one entry per
    sample. reference: the right answer, where given; credit: 1 / ties if it is among the tied, else 0.
    """

    index: int
    question: str
    answer: str | None
    weight: float
    total: float
    margin: float
    ties: int
    rationales: list[str]
    answers: list[str | None]
    scores: list[float | None] | None
    reference: str | None = None
    credit: float | None = None

    def to_row(self) -> dict[str, Any]:
        """A row of samples (question, answer = the reference, generated_answer, scores) with the vote's fields."""
        return {
            "index": self.index, "question": self.question, "answer": self.reference,
            "generated_answer": self.rationales, "extracted": self.answers, "scores": self.scores,
            "winner": self.answer, "weight": self.weight, "total": self.total, "margin": self.margin,
            "ties": self.ties, "credit": self.credit,
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SelfConsistencyResult:
        names = {"reference": "answer", "rationales": "generated_answer", "answers": "extracted", "answer": "winner"}
        return cls(**{field: row[names.get(field, field)] for field in cls.__dataclass_fields__})


@dataclass
class Question:
    """A question on its way to its result."""

    index: int
    text: str
    reference: str | None
    rationales: list[str]
    answers: list[str | None]
    scores: list[float | None] | None


def voted(
    items: Sequence[Question], groups: Any, gold: Sequence[str | None], rule: str, lam: float
) -> list[SelfConsistencyResult]:
    """The vote over each question's samples; groups: what `group_answers` makes of their answers and of gold."""
    scores = torch.full(groups.answers.shape, float("nan"), dtype=torch.float64)
    for q, item in enumerate(items):
        values = [float("nan") if value is None else value for value in item.scores or ()]
        scores[q, : len(values)] = torch.tensor(values, dtype=torch.float64)
    votes = ops.vote(groups.answers, scores, valid=groups.valid, rule=rule, lam=lam)
    # the same vote with the right answer's samples first: it wins there if it is among the tied
    order = (groups.answers != groups.correct[:, None]).long().argsort(dim=1, stable=True)
    answers, scores, valid = (tensor.gather(1, order) for tensor in (groups.answers, scores, groups.valid))
    first = ops.vote(answers, scores, valid=valid, rule=rule, lam=lam).winner
    results = []
    for q, item in enumerate(items):
        winner, ties = int(votes.winner[q]), int(votes.ties[q])
        right = ties > 0 and int(first[q]) == int(groups.correct[q])
        results.append(
            SelfConsistencyResult(
                index=item.index,
                question=item.text,
                answer=_first_text(item.answers, groups.answers[q].tolist(), groups.valid[q].tolist(), winner),
                weight=float(votes.weight[q]),
                total=float(votes.total[q]),
                margin=float(votes.margin[q]),
                ties=ties,
                rationales=item.rationales,
                answers=item.answers,
                scores=item.scores,
                reference=item.reference,
                credit=None if gold[q] is None else float(right) / max(ties, 1),
            )
        )
    return results


def _first_text(answers: Sequence[str | None], classes: list[int], valid: list[bool], winner: int) -> str | None:
    return next((a for a, c, v in zip(answers, classes, valid, strict=False) if v and c == winner), None)


def as_questions(questions: Sequence[str], references: Sequence[str | None] | None) -> list[Question]:
    """Questions without samples yet, checked."""
    sized = hasattr(questions, "__len__") and hasattr(questions, "__iter__")
    if isinstance(questions, (str, Mapping)) or not sized:
        raise bad_type(_CALLER, "questions", "a sequence of strings", questions)
    wrong = next((pair for pair in enumerate(questions) if not isinstance(pair[1], str)), None)
    if wrong is not None:
        raise bad_type(_CALLER, f"questions[{wrong[0]}]", "a string", wrong[1])
    references = [None] * len(questions) if references is None else list(references)
    if len(references) != len(questions):
        raise ValueError(
            f"{_CALLER}: `references` must have one entry per question ({len(questions)}), got {len(references)}"
        )
    pairs = zip(questions, references, strict=True)
    return [Question(i, text, reference, [], [], None) for i, (text, reference) in enumerate(pairs)]


def ready_questions(rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Questions with the samples and scores of rows, checked."""
    for i, row in enumerate(rows):
        scored = isinstance(row, Mapping) and row.get("scores") is not None
        check_row(row, f"{_CALLER}: row {i}", "scores" if scored else None, need_answer=False)
    items = as_questions([row["question"] for row in rows], [answer_text(row.get("answer")) for row in rows])
    for item, row in zip(items, rows, strict=True):
        item.rationales = row["generated_answer"]
        if row.get("scores") is not None:
            item.scores = [_score(value) for value in row["scores"]]
    return items


def ranked(items: Sequence[Question], ranker: Any) -> None:
    """Give every item the ranker's scores; ValueError where these are not one number for each sample."""
    found = list(ranker.score([item.text for item in items], [item.rationales for item in items]))
    counts = [len(values) for values in found]
    wanted = [len(item.rationales) for item in items]
    if counts != wanted:
        raise ValueError(
            f"{_CALLER}: `ranker`.score must give one number for each sample, {wanted} of them, got {counts}"
        )
    for item, values in zip(items, found, strict=True):
        item.scores = [_score(float(value)) for value in values]


def _score(value: float | None) -> float | None:
    """A sample's score; None where there is none."""
    return None if value is None or math.isnan(value) else float(value)


def solution(reference: str | int | float | None, pattern: str | None) -> str | None:
    """The answer of a reference: what a solution ends in, or the reference itself; None where it is blank."""
    reference = answer_text(reference)
    return extract_answer(reference, pattern) or reference if reference and reference.strip() else None


def same_question(item: Question, row: Mapping[str, Any]) -> bool:
    """Whether a written row is of this question, and of its samples where they are there already."""
    given = not item.rationales or item.rationales == row.get("generated_answer")
    return item.text == row["question"] and item.reference == row.get("answer") and given
