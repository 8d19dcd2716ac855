"""Questions with their samples, and the result of a vote over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calm_fast import ops
from calm_fast._ops.maj_at_k.api import vote_credit
from calm_fast.consistency.answers.gold import answer_text
from calm_fast.consistency.answers.grouping import Groups
from calm_fast.consistency.voting.samples import check_row
from calm_fast.consistency.voting.weights import score_matrix, vote_weights
from calm_fast.core.checks import bad_type, check_whole_text

_CALLER = "SelfConsistency"


@dataclass(frozen=True)
class SelfConsistencyResult:
    """The vote over the samples of one question.

    answer: the winning answer in the words of a sample, None if no sample has an answer. weight, total, margin, ties:
    of the vote, see `ops.vote`. rationales, answers (None = no answer found), scores (None = no score): one entry for
    each sample. reference: the gold answer or a solution, if given. credit: 1 / ties if the gold answer is among the
    tied, else 0; None without a gold answer.
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
        """Return a row of samples (question, answer = the reference, generated_answer, scores) with the vote."""
        return {
            "index": self.index, "question": self.question, "answer": self.reference,
            "generated_answer": self.rationales, "extracted": self.answers, "scores": self.scores,
            "winner": self.answer, "weight": self.weight, "total": self.total, "margin": self.margin,
            "ties": self.ties, "credit": self.credit,
        }  # fmt: skip

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SelfConsistencyResult:
        """Return the result that `to_row` wrote."""
        names = {"reference": "answer", "rationales": "generated_answer", "answers": "extracted", "answer": "winner"}
        return cls(**{field: row[names.get(field, field)] for field in cls.__dataclass_fields__})


@dataclass
class Question:
    """A question, and its samples as they are drawn."""

    index: int
    text: str
    reference: str | None
    rationales: list[str]
    answers: list[str | None]
    scores: list[float | None] | None


def vote_results(
    items: Sequence[Question],
    groups: Groups,
    gold: Sequence[str | None],
    rule: str,
    lam: float,
    scores_are: str = "weights",
) -> list[SelfConsistencyResult]:
    """Return the vote over each question's samples; groups: the result of `group_answers` on their answers and gold.

    scores_are: see `vote_weights`.
    """
    scores = score_matrix([item.scores for item in items], groups.answers.shape[1])
    if rule != "count":
        hint = "log-probabilities in rows are counted with scores_are='log', and a ranker must return their exp"
        scores = vote_weights(
            scores, groups.valid, [item.index for item in items], rule=rule, lam=lam, scores_are=scores_are,
            where=_CALLER, hint=hint,
        )  # fmt: skip
    votes = ops.vote(groups.answers, scores, valid=groups.valid, rule=rule, lam=lam)
    credit = vote_credit(groups.answers, groups.correct, scores, valid=groups.valid, rule=rule, lam=lam)
    results = []
    for q, item in enumerate(items):
        winner = int(votes.winner[q])
        results.append(
            SelfConsistencyResult(
                index=item.index,
                question=item.text,
                answer=_first_text(item.answers, groups.answers[q].tolist(), groups.valid[q].tolist(), winner),
                weight=float(votes.weight[q]),
                total=float(votes.total[q]),
                margin=float(votes.margin[q]),
                ties=int(votes.ties[q]),
                rationales=item.rationales,
                answers=item.answers,
                scores=item.scores,
                reference=item.reference,
                credit=None if gold[q] is None else float(credit[q]),
            )
        )
    return results


def _first_text(answers: Sequence[str | None], classes: list[int], valid: list[bool], winner: int) -> str | None:
    return next((a for a, c, v in zip(answers, classes, valid, strict=False) if v and c == winner), None)


def new_questions(questions: Sequence[str], references: Sequence[str | None] | None) -> list[Question]:
    """Check questions and references, and return them as questions without samples."""
    sized = hasattr(questions, "__len__") and hasattr(questions, "__iter__")
    if isinstance(questions, (str, Mapping)) or not sized:
        raise bad_type(_CALLER, "questions", "a sequence of strings", questions)
    for place, question in enumerate(questions):
        check_whole_text(_CALLER, f"questions[{place}]", question)
    references = [None] * len(questions) if references is None else list(references)
    if len(references) != len(questions):
        raise ValueError(
            f"{_CALLER}: `references` must have one entry for each of {len(questions)} questions, got {len(references)}"
        )
    pairs = zip(questions, references, strict=True)
    return [Question(i, text, reference, [], [], None) for i, (text, reference) in enumerate(pairs)]


def questions_of_rows(rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Check rows, and return their questions with samples and scores."""
    for i, row in enumerate(rows):
        has_scores = isinstance(row, Mapping) and row.get("scores") is not None
        check_row(row, f"{_CALLER}: row {i}", "scores" if has_scores else None, need_answer=False)
    items = new_questions([row["question"] for row in rows], [answer_text(row.get("answer")) for row in rows])
    for item, row in zip(items, rows, strict=True):
        item.rationales = row["generated_answer"]
        if row.get("scores") is not None:
            item.scores = [_score(value) for value in row["scores"]]
    return items


def add_ranker_scores(items: Sequence[Question], ranker: Any) -> None:
    """Set the scores of every question to the ranker's; raise ValueError unless each sample has one number."""
    found = list(ranker.score([item.text for item in items], [item.rationales for item in items]))
    counts = [len(values) for values in found]
    wanted = [len(item.rationales) for item in items]
    if counts != wanted:
        raise ValueError(
            f"{_CALLER}: `ranker` must return from score() one number for each sample, {wanted}, got {counts}"
        )
    for item, values in zip(items, found, strict=True):
        item.scores = [_score(float(value)) for value in values]


def _score(value: float | None) -> float | None:
    """Return a score, None for a missing one."""
    return None if value is None or math.isnan(value) else float(value)


def same_question(item: Question, row: Mapping[str, Any]) -> bool:
    """Return True if a saved row has this question, its reference, and its samples if it has any yet."""
    same_samples = not item.rationales or item.rationales == row.get("generated_answer")
    return item.text == row["question"] and item.reference == row.get("answer") and same_samples
