"""`calm-fast vote`: accuracies, their curves and the votes of a file of samples."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from calm_fast import ops
from calm_fast._ops.maj_at_k.api import Curve, vote_credit
from calm_fast._ops.voting.decide import RULES
from calm_fast.consistency.answers.equality import extract_answer
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.answers.grouping import Groups, group_answers
from calm_fast.consistency.voting.consensus import score_matrix
from calm_fast.consistency.voting.curves import any_at_k
from calm_fast.consistency.voting.samples import read_rows, write_rows
from calm_fast.core.files import atomic_path, write_json
from calm_fast.core.progress import progress_bar


@dataclass(frozen=True)
class VoteSettings:
    """How samples are read and counted.

    ks: sizes of the curve; empty = powers of two up to the number of samples, and that number. rule, lam, resamples,
    seed: of the weighted vote beside the plain one, see `ops.maj_at_k`. scores: the field of the rows with the scores.
    answer_regex: last resort of `extract_answer`. equality, workers, timeout, cache_dir: see `group_answers`.
    """

    ks: tuple[int, ...] = ()
    rule: str = "count"
    lam: float = 1.0
    scores: str = "scores"
    resamples: int = 1000
    seed: int = 0
    answer_regex: str | None = None
    equality: str = "math"
    workers: int | None = None
    timeout: float = 5.0
    cache_dir: str | os.PathLike[str] | None = None


@dataclass(frozen=True)
class VoteReport:
    """The outcome of `run`; curves are over `ks`.

    results: the content of results.json. weighted: the curve of another rule than "count", or None. samples: number of
    samples. unanswered: samples without an answer. ungraded: rows without a gold answer, which are left out. timeouts:
    pairs of answers that count as different because their comparison timed out.
    """

    results: dict[str, Any]
    ks: tuple[int, ...]
    majority: Curve
    any: Curve
    weighted: Curve | None
    rule: str
    samples: int
    unanswered: int
    ungraded: int
    timeouts: int
    seconds: float


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
        file: JSONL rows, see `read_rows`. out: a folder. limit: most rows to read. progress: show bars.
    Raises:
        ValueError: a row or a setting is wrong, or there is nothing to count; the message says which.
    """
    start = time.perf_counter()
    settings = settings or VoteSettings()
    weighted = settings.rule != "count"
    _check(settings)
    rows = read_rows(file, limit, scores=settings.scores if weighted else None, need_answer=False)
    gold = [gold_answer(row.get("answer"), settings.answer_regex) for row in rows]
    graded = [number for number, answer in enumerate(gold) if answer is not None]
    if not graded:
        raise ValueError(f"{Path(file).name}: a row must have a gold answer in `answer`, got none in any row")
    bar = progress_bar([rows[n] for n in graded], desc="reading answers", unit="question", shown=progress)
    answers = [[extract_answer(text, settings.answer_regex) for text in row["generated_answer"]] for row in bar]
    groups = group_answers(
        answers, gold=[gold[n] for n in graded], equality=settings.equality, workers=settings.workers,
        timeout=settings.timeout, cache_dir=settings.cache_dir, progress=progress,
    )  # fmt: skip
    if not groups.answers.shape[1]:
        raise ValueError(f"{Path(file).name}: a row must have a sample in `generated_answer`, got none in any row")
    scores = None
    if weighted:
        scores = score_matrix([rows[n][settings.scores] for n in graded], groups.answers.shape[1])

    ks = settings.ks or _powers_of_two(groups.answers.shape[1])
    # `single` is the majority of one
    exact = ops.maj_at_k(groups.answers, groups.correct, ks=(1, *ks), valid=groups.valid)
    single, majority = float(exact.accuracy[0]), Curve(exact.accuracy[1:], exact.stderr[1:])
    anyone = any_at_k(groups.answers, groups.correct, ks=ks, valid=groups.valid)
    curve = None
    if weighted:
        curve = ops.maj_at_k(
            groups.answers, groups.correct, scores, ks=ks, valid=groups.valid, method="resample",
            resamples=settings.resamples, rule=settings.rule, lam=settings.lam, seed=settings.seed,
        )  # fmt: skip
    largest = _first_valid(groups.valid, max(ks))
    ties = int((ops.vote(groups.answers, valid=largest).ties > 1).sum())
    results: dict[str, Any] = {
        "questions": len(graded),
        "single": single,
        "majority": _by_k(ks, majority),
        "any": _by_k(ks, anyone),
        "ties": ties,
    }
    if curve is not None:
        results[settings.rule] = _by_k(ks, curve)
    report = VoteReport(
        results=results, ks=ks, majority=majority, any=anyone, weighted=curve, rule=settings.rule,
        samples=sum(len(row) for row in answers), unanswered=sum(text is None for row in answers for text in row),
        ungraded=len(rows) - len(graded), timeouts=groups.timeouts, seconds=time.perf_counter() - start,
    )  # fmt: skip
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results, indent=2)
    write_rows(folder / "votes.jsonl", _votes(graded, groups, scores, settings))
    draw(report, folder / "curve.png")
    return report


def _check(settings: VoteSettings) -> None:
    if any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in settings.ks):
        raise ValueError(f"vote: `ks` must be positive integers, got {list(settings.ks)}")
    if len(set(settings.ks)) != len(settings.ks):
        raise ValueError(f"vote: `ks` must be different numbers, got {list(settings.ks)}")
    if settings.rule not in RULES:
        raise ValueError(f"vote: `rule` must be 'count', 'weighted' or 'adaptive', got {settings.rule!r}")
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
        winner = int(votes.winner[place])
        yield {
            "row": number,
            "winner": None if winner < 0 else groups.texts[place][winner],
            "weight": float(votes.weight[place]),
            "total": float(votes.total[place]),
            "ties": int(votes.ties[place]),
            "gold": groups.texts[place][0],
            "right": winner == 0,
            "credit": float(credit[place]),
        }


def _cell(accuracy: float, stderr: float) -> str:
    """Return an accuracy in percent with its standard error, which a single question does not have."""
    return f"{100 * accuracy:.1f}" if math.isnan(stderr) else f"{100 * accuracy:.1f} ± {100 * stderr:.1f}"


def print_report(report: VoteReport, console: Console) -> None:
    """Print the table and the counts."""
    questions, ks = report.results["questions"], report.ks
    columns = {"majority": report.majority, "any": report.any}
    if report.weighted is not None:
        columns[report.rule] = report.weighted
    table = Table(title=f"{questions} questions, {report.samples} samples; % right (± standard error)")
    table.add_column("samples", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for place, k in enumerate(ks):
        cells = [_cell(float(c.accuracy[place]), float(c.stderr[place])) for c in columns.values()]
        table.add_row(str(k), *cells)
    console.print(table)
    ties = report.results["ties"]
    console.print(f"single {report.results['single']:.4f}", highlight=False)
    for name, curve in columns.items():
        console.print(f"{name}@{ks[-1]} {float(curve.accuracy[-1]):.4f}", highlight=False)
    console.print(f"ties at {max(ks)} samples: {ties} of {questions} questions ({100 * ties / questions:.1f} %)")
    console.print(f"samples without an answer: {report.unanswered} of {report.samples}")
    if report.ungraded:
        console.print(f"rows without a gold answer, left out: {report.ungraded}")
    if report.timeouts:
        console.print(f"pairs of answers that count as different because math-verify timed out: {report.timeouts}")
    console.print(f"{report.seconds:.1f} seconds")


def draw(report: VoteReport, file: Path) -> None:
    """Plot the curves with a band of one standard error around each."""
    from matplotlib.figure import Figure  # not pyplot, which needs a window system and has global state

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    curves = [("any of k is right", report.any), ("majority of k", report.majority)]
    if report.weighted is not None:
        curves.insert(1, (f"{report.rule} vote of k", report.weighted))
    order = sorted(range(len(report.ks)), key=report.ks.__getitem__)
    ks = [report.ks[place] for place in order]
    for name, curve in curves:
        middle, error = (100 * values[order] for values in curve)
        (line,) = axes.plot(ks, middle, marker="o", label=name)
        axes.fill_between(ks, middle - error, middle + error, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlabel("samples k")
    axes.set_ylabel("questions right, %")
    axes.set_title(f"{report.results['questions']} questions")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(file) as partial:
        figure.savefig(partial, dpi=150, format="png")
