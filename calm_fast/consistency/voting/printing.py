"""The table and the plot of `calm-fast vote`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from calm_fast.consistency.voting.compare import BEST, MAJORITY, Point

if TYPE_CHECKING:
    from calm_fast.consistency.voting.report import VoteReport


def print_report(report: VoteReport, console: Console) -> None:
    """Print the table and the counts; without gold answers the agreement of the samples."""
    if report.majority is None:
        _print_agreement(report, console)
    else:
        _print_accuracies(report, console)
    unread = f"samples without an answer: {report.unanswered} of {report.samples}"
    console.print(unread + (" (`calm-fast answers FILE` shows what was read)" if report.unanswered else ""))
    if report.ungraded and report.majority is not None:
        console.print(f"rows without a gold answer, left out: {report.ungraded}")
    if report.timeouts:
        console.print(f"pairs of answers that count as different because math-verify timed out: {report.timeouts}")
    if report.compared is not None:
        _print_comparison(report.compared, report.ks, console)
    console.print(f"{report.seconds:.1f} seconds")


def _print_accuracies(report: VoteReport, console: Console) -> None:
    results, ks = report.results, report.ks
    questions = results["questions"]
    columns = {"majority": report.majority, "any": report.any, "pass": report.passed}
    if report.weighted is not None:
        columns[report.rule] = report.weighted
    table = Table(title=f"{questions} questions, {report.samples} samples; % right (± standard error)")
    table.add_column("samples", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for place, k in enumerate(ks):
        cells = [
            "" if curve is None else _cell(float(curve.accuracy[place]), float(curve.stderr[place]))
            for curve in columns.values()
        ]
        table.add_row(str(k), *cells)
    console.print(table)
    console.print("majority, any: of k samples that have an answer; pass: of k samples, without an answer is wrong")
    console.print(f"single {results['single']:.4f} (pass@1 {results['pass@1']:.4f})", highlight=False)
    for name, curve in columns.items():
        if curve is not None:
            console.print(f"{name}@{ks[-1]} {float(curve.accuracy[-1]):.4f}", highlight=False)
    ties = results["ties_by_rule"][report.rule]
    vote = "" if report.rule == "count" else f" of the {report.rule} vote"
    console.print(f"ties{vote} at {max(ks)} samples: {ties} of {questions} questions ({100 * ties / questions:.1f} %)")


def _print_agreement(report: VoteReport, console: Console) -> None:
    results = report.results
    questions = results["questions"]
    console.print(f"{questions} questions, {report.samples} samples, no gold answers", highlight=False)
    console.print(f"agreement with the winner {results['agreement']:.4f}", highlight=False)
    console.print(f"margin over the next answer {results['margin']:.4f}", highlight=False)
    console.print(f"ties: {results['ties']} of {questions} questions")


def _cell(accuracy: float, stderr: float) -> str:
    """Return an accuracy in percent with its standard error, which a single question does not have."""
    return f"{100 * accuracy:.1f}" if math.isnan(stderr) else f"{100 * accuracy:.1f} ± {100 * stderr:.1f}"


def _print_comparison(points: Sequence[Point], ks: Sequence[int], console: Console) -> None:
    """Print the methods; those that draw k samples at the sizes of the curves only."""
    table = Table(title="accuracy against cost; % right [95 % interval over questions]")
    table.add_column("method", no_wrap=True)
    for name in ("samples", "right", "gain"):
        table.add_column(name, justify="right")
    for point in points:
        if point.stops_early or point.setting in ks:
            gain = "" if point.name == MAJORITY else _with_interval(point.gain, point.gain_interval, "+")
            right = _with_interval(point.accuracy, point.interval)
            table.add_row(f"{point.name} {point.setting:g}", f"{point.samples:.2f}", right, gain)
    console.print(table)
    console.print("samples: drawn for a question, mean; gain: over the majority of as many samples")
    if not any(point.name == BEST for point in points):
        console.print("no scores: best of n and the votes by scores are left out")


def _with_interval(value: float, ends: tuple[float, float] | None, sign: str = "") -> str:
    shown = f"{100 * value:{sign}.1f}"
    return shown if ends is None else f"{shown} [{100 * ends[0]:{sign}.1f}, {100 * ends[1]:{sign}.1f}]"


def draw_comparison(points: Sequence[Point], questions: int, file: Path) -> None:
    """Plot accuracy against the mean number of samples: a line for each method, a band or bars of 95 %."""
    figure, axes = _axes("samples drawn for a question, mean", f"{questions} questions, 95 % intervals over questions")
    for name in dict.fromkeys(point.name for point in points):
        mine = sorted((p for p in points if p.name == name), key=lambda p: p.samples)
        samples, right = [p.samples for p in mine], [100 * p.accuracy for p in mine]
        (line,) = axes.plot(samples, right, marker="s" if mine[0].stops_early else "o", markersize=4, label=name)
        ends = [(100 * p.interval[0], 100 * p.interval[1]) for p in mine if p.interval is not None]
        if not ends:
            continue
        low, high = zip(*ends, strict=True)
        if name == MAJORITY:
            axes.fill_between(samples, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        else:
            axes.vlines(samples, low, high, color=line.get_color(), alpha=0.35, linewidth=1)
    axes.legend()
    figure.savefig(file, dpi=150, format="png")


def draw(report: VoteReport, file: Path) -> None:
    """Plot the curves with a band of one standard error around each."""
    assert report.any is not None and report.majority is not None
    figure, axes = _axes("samples k", f"{report.results['questions']} questions")
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
    axes.legend()
    figure.savefig(file, dpi=150, format="png")


def _axes(xlabel: str, title: str) -> tuple[Any, Any]:
    """Return a figure and its axes for shares of right questions."""
    from matplotlib.figure import Figure  # not pyplot, which needs a window system and has global state

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel("questions right, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    return figure, axes
