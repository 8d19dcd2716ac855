"""`calm-fast vote`: accuracies, their curves and the votes of a file of samples."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calm_fast import ops
from calm_fast._ops.maj_at_k.api import Curve, vote_credit
from calm_fast._ops.voting.decide import RULES
from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.answers.grouping import Groups, group_answers
from calm_fast.consistency.voting.compare import Point, compare
from calm_fast.consistency.voting.curves import any_at_k
from calm_fast.consistency.voting.formats import Fields
from calm_fast.consistency.voting.printing import draw, draw_comparison, print_report
from calm_fast.consistency.voting.samples import check_row, read_rows
from calm_fast.consistency.voting.weights import check_scores_are, score_matrix, vote_weights
from calm_fast.core.files import atomic_path
from calm_fast.core.progress import progress_bar

__all__ = ["VoteReport", "VoteSettings", "draw", "print_report", "run"]
FILES = ("results.json", "votes.jsonl", "curve.png")
COMPARISON = "compare.png"  # beside FILES, with `compare`


@dataclass(frozen=True)
class VoteSettings:
    """How samples are read and counted.

    ks: sizes of the curve; empty = powers of two up to the number of samples, and that number. rule, lam, resamples,
    seed: of the weighted vote beside the plain one, see `ops.maj_at_k`. scores: the field of the rows with the scores.
    scores_are: "weights", or "log" for log-probabilities, which become exp(score - largest score of the question).
    fields: names of the other fields where they are not recognised. answer_regex: last resort of `extract_answer`.
    equality, workers, timeout, cache_dir: see `group_answers`. compare: also measure votes, best-of-n and early
    stopping against their cost, see `voting.compare`; methods by scores if the rows have them.
    """

    ks: tuple[int, ...] = ()
    rule: str = "count"
    lam: float = 1.0
    scores: str = "scores"
    scores_are: str = "weights"
    fields: Fields = field(default_factory=Fields)
    resamples: int = 1000
    seed: int = 0
    answer_regex: str | None = None
    equality: str = "math"
    workers: int | None = None
    timeout: float = 5.0
    cache_dir: str | os.PathLike[str] | None = None
    compare: bool = False


@dataclass(frozen=True)
class VoteReport:
    """The outcome of `run`; curves are over `ks`, and None without gold answers.

    results: the content of results.json. passed: as `any`, where a sample without an answer is a wrong one. weighted:
    the curve of another rule than "count", or None. samples: number of samples. unanswered: samples without an answer.
    ungraded: rows without a gold answer, which are left out if others have one. timeouts: pairs of answers that count
    as different because their comparison timed out. compared: the methods of `compare`, None without it.
    """

    results: dict[str, Any]
    ks: tuple[int, ...]
    majority: Curve | None
    any: Curve | None
    passed: Curve | None
    weighted: Curve | None
    rule: str
    samples: int
    unanswered: int
    ungraded: int
    timeouts: int
    seconds: float
    compared: list[Point] | None = None


def run(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: VoteSettings | None = None,
    *,
    limit: int | None = None,
    progress: bool = True,
) -> VoteReport:
    """Count the votes of `file`, and write results.json, votes.jsonl and curve.png into `out`.

    Args:
        file: rows, see `read_rows`; without any gold answer winners, margins and agreement are reported.
        out: a folder. limit: most questions to read. progress: show bars.
    Raises:
        ValueError: a row or a setting is wrong, or there is nothing to count; the message says which.
    """
    start = time.perf_counter()
    settings = settings or VoteSettings()
    weighted = settings.rule != "count"
    _check(settings)
    wanted = settings.scores if weighted or settings.compare and settings.scores != "scores" else None
    rows = read_rows(file, limit, scores=wanted, need_answer=False, fields=settings.fields)
    if settings.compare and wanted is None and any(row.get("scores") is not None for row in rows):
        wanted = "scores"
        for number, row in enumerate(rows):
            check_row(row, f"{Path(file).name}: row {number} (from 0)", wanted, need_answer=False)
    gold = [gold_answer(row.get("answer"), settings.answer_regex) for row in rows]
    graded = [number for number, answer in enumerate(gold) if answer is not None]
    if settings.compare and not graded:
        raise ValueError(f"{Path(file).name}: `answer` must be given in some rows for --compare, got none in any row")
    counted = graded or list(range(len(rows)))  # without any gold answer the votes are told all the same
    bar = progress_bar([rows[n] for n in counted], desc="reading answers", unit="question", shown=progress)
    answers = [[extract_answer(text, settings.answer_regex) for text in row["generated_answer"]] for row in bar]
    groups = group_answers(
        answers, gold=[gold[n] for n in counted], equality=settings.equality, workers=settings.workers,
        timeout=settings.timeout, cache_dir=settings.cache_dir, progress=progress,
    )  # fmt: skip
    if not groups.answers.shape[1]:
        raise ValueError(f"{Path(file).name}: a row must have a sample in `generated_answer`, got none in any row")
    given = scores = None
    if wanted is not None:
        given = score_matrix([rows[n][wanted] for n in counted], groups.answers.shape[1])
    if weighted and given is not None:
        scores = _as_weights(given, groups.valid, counted, settings, settings.rule)
    ks = settings.ks or _powers_of_two(groups.answers.shape[1])
    curves = _Curves()
    if graded:
        curves = _accuracies(groups, scores, [len(row) for row in answers], ks, settings)
        results = {"questions": len(graded), **curves.results}
    else:
        results = {"questions": len(counted), **_agreement(groups, scores, settings)}
    compared = None
    if settings.compare:
        weights = None if given is None else _as_weights(given, groups.valid, counted, settings, "weighted")
        compared = compare(
            groups, [len(row) for row in answers], given, weights, lam=settings.lam, orders=settings.resamples,
            seed=settings.seed,
        )  # fmt: skip
        results["compare"] = [point.to_json() for point in compared]
    unanswered = sum(text is None for row in answers for text in row)
    results |= {"samples": sum(len(row) for row in answers), "unanswered": unanswered}
    report = VoteReport(
        results=results, ks=ks, majority=curves.majority, any=curves.any, passed=curves.passed,
        weighted=curves.weighted, rule=settings.rule, samples=results["samples"], unanswered=unanswered,
        ungraded=len(rows) - len(graded), timeouts=groups.timeouts, seconds=time.perf_counter() - start,
        compared=compared,
    )  # fmt: skip
    _write(report, _votes(counted, groups, scores, settings), Path(out))
    return report


def _write(report: VoteReport, votes: Iterator[dict[str, Any]], folder: Path) -> None:
    """Write the files of a report: all of them, or none if one cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    names: tuple[str, ...] = FILES if report.majority is not None else FILES[:2]
    names += (COMPARISON,) if report.compared is not None else ()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(atomic_path(folder / name)) for name in names}
        files["results.json"].write_text(json.dumps(report.results, indent=2) + "\n", encoding="utf-8")
        files["votes.jsonl"].write_text("".join(json.dumps(vote) + "\n" for vote in votes), encoding="ascii")
        if "curve.png" in files:
            draw(report, files["curve.png"])
        if report.compared is not None:
            draw_comparison(report.compared, report.results["questions"], files[COMPARISON])


@dataclass
class _Curves:
    """The curves of a file with gold answers, and their part of results.json."""

    majority: Curve | None = None
    any: Curve | None = None
    passed: Curve | None = None
    weighted: Curve | None = None
    results: dict[str, Any] = field(default_factory=dict)


def _accuracies(
    groups: Groups, scores: torch.Tensor | None, counts: Sequence[int], ks: tuple[int, ...], settings: VoteSettings
) -> _Curves:
    """Return the accuracies of questions that have a gold answer. counts: samples of each question."""
    # `single` is the majority of one
    exact = ops.maj_at_k(groups.answers, groups.correct, ks=(1, *ks), valid=groups.valid)
    majority = Curve(exact.accuracy[1:], exact.stderr[1:])
    anyone = any_at_k(groups.answers, groups.correct, ks=ks, valid=groups.valid)
    # a sample without an answer is wrong: it gets a class of its own, which is nobody's gold answer
    drawn = torch.arange(groups.answers.shape[1]) < torch.tensor(counts)[:, None]
    own = groups.answers.masked_fill(~groups.valid, int(groups.answers.max()) + 1)
    passed = any_at_k(own, groups.correct, ks=(1, *ks), valid=drawn)
    largest = _first_valid(groups.valid, max(ks))
    ties = {"count": int((ops.vote(groups.answers, valid=largest).ties > 1).sum())}
    results: dict[str, Any] = {
        "single": float(exact.accuracy[0]),
        "majority": _by_k(ks, majority),
        "any": _by_k(ks, anyone),
        "ties": ties["count"],
    }
    curve = None
    if settings.rule != "count":
        rule, lam = settings.rule, settings.lam
        curve = ops.maj_at_k(
            groups.answers, groups.correct, scores, ks=ks, valid=groups.valid, method="resample",
            resamples=settings.resamples, rule=rule, lam=lam, seed=settings.seed,
        )  # fmt: skip
        results[rule] = _by_k(ks, curve)
        ties[rule] = int((ops.vote(groups.answers, scores, valid=largest, rule=rule, lam=lam).ties > 1).sum())
    passed_at = Curve(passed.accuracy[1:], passed.stderr[1:])
    results |= {"pass@1": float(passed.accuracy[0]), "pass": _by_k(ks, passed_at), "ties_by_rule": ties}
    return _Curves(majority, anyone, passed_at, curve, results)


def _agreement(groups: Groups, scores: torch.Tensor | None, settings: VoteSettings) -> dict[str, Any]:
    """Return what a vote says without gold answers: means over questions of shares of the total weight."""
    votes = ops.vote(groups.answers, scores, valid=groups.valid, rule=settings.rule, lam=settings.lam)
    total = votes.total.clamp(min=torch.finfo(torch.float64).tiny)
    return {
        "agreement": float((votes.weight / total).mean()),
        "margin": float((votes.margin / total).mean()),
        "ties": int((votes.ties > 1).sum()),
    }


def _as_weights(
    scores: torch.Tensor, valid: torch.Tensor, numbers: Sequence[int], settings: VoteSettings, rule: str
) -> torch.Tensor:
    """Return the scores as weights of a vote by `rule`; errors are those of `vote_weights`."""
    return vote_weights(
        scores, valid, numbers, rule=rule, lam=settings.lam, scores_are=settings.scores_are, where="vote",
        name=settings.scores, hint="log-probabilities are counted with --scores-are log",
    )  # fmt: skip


def _check(settings: VoteSettings) -> None:
    if any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in settings.ks):
        raise ValueError(f"vote: `ks` must be positive integers, got {list(settings.ks)}")
    if len(set(settings.ks)) != len(settings.ks):
        raise ValueError(f"vote: `ks` must be different numbers, got {list(settings.ks)}")
    if settings.rule not in RULES:
        raise ValueError(f"vote: `rule` must be 'count', 'weighted' or 'adaptive', got {settings.rule!r}")
    check_scores_are("vote", settings.scores_are)
    if not math.isfinite(settings.lam):
        raise ValueError(f"vote: `lam` must be finite, got {settings.lam!r}")
    extract_answer("", settings.answer_regex)  # a bad pattern is an error before any work


def _powers_of_two(most: int) -> tuple[int, ...]:
    powers = [2**n for n in range(most.bit_length())]
    return tuple(sorted({*powers, most}))


def _by_k(ks: Sequence[int], curve: Curve) -> dict[str, float]:
    return {str(k): float(value) for k, value in zip(ks, curve.accuracy, strict=True)}


def _first_valid(valid: torch.Tensor, k: int) -> torch.Tensor:
    """Return the mask of the first k valid samples of each question."""
    return valid & (valid.cumsum(1) <= k)


def _votes(
    numbers: Sequence[int], groups: Groups, scores: torch.Tensor | None, settings: VoteSettings
) -> Iterator[dict[str, Any]]:
    """Yield a row for each question, of a vote of all its samples.

    The mean of `credit` is the accuracy at the largest k, if no question has more samples than that.
    """
    rule, lam = settings.rule, settings.lam
    votes = ops.vote(groups.answers, scores, valid=groups.valid, rule=rule, lam=lam)
    credit = vote_credit(groups.answers, groups.correct, scores, valid=groups.valid, rule=rule, lam=lam)
    for place, number in enumerate(numbers):
        winner, graded = int(votes.winner[place]), int(groups.correct[place]) >= 0
        yield {
            "row": number,
            "winner": None if winner < 0 else groups.texts[place][winner],
            "weight": float(votes.weight[place]),
            "total": float(votes.total[place]),
            "margin": float(votes.margin[place]),
            "ties": int(votes.ties[place]),
            "gold": groups.texts[place][0] if graded else None,
            "right": winner == 0 if graded else None,
            "credit": float(credit[place]) if graded else None,
        }
