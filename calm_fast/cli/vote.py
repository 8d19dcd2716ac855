"""`calm-fast vote`: count the votes of sampled rationales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calm_fast.cli.common import folder

AnyRows = Annotated[
    Path, typer.Argument(exists=True, metavar="DATA", help="Rows: JSONL, JSON, parquet, arrow, a dataset's folder.")
]
Question = Annotated[str | None, typer.Option(help="Field of the question. Default: by content.")]
Answer = Annotated[str | None, typer.Option(help="Field of the gold answer. Default: by content.")]
Samples = Annotated[str | None, typer.Option(help="Field of the samples. Default: by content.")]
Regex = Annotated[str | None, typer.Option(help="Finds an answer if nothing else does.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Most questions to read.")]


def vote(
    data: AnyRows,
    k: Annotated[str | None, typer.Option(help="Sizes, for example 1,2,4,8. Default: powers of two.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, votes.jsonl and curve.png.")] = Path("vote_out"),
    rule: Annotated[str, typer.Option(help="count, or by scores weighted or adaptive.")] = "count",
    scores: Annotated[
        str, typer.Option("--scores", "--scores-field", help="Field of the rows with one score for each sample.")
    ] = "scores",
    scores_are: Annotated[str, typer.Option(help="weights, or log for log-probabilities.")] = "weights",
    lam: Annotated[float, typer.Option(help="Weight of a score in the adaptive rule.")] = 1.0,
    resamples: Annotated[
        int, typer.Option(min=1, help="Random subsets (rules by scores) and orders (--compare) of the samples.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of subsets, orders and intervals.")] = 0,
    answer_regex: Regex = None,
    equality: Annotated[str, typer.Option(help="math, exact or text.")] = "math",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that compare answers. Default: one for each CPU.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="CPU seconds to compare two answers.")] = 5.0,
    cache: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder that keeps comparisons of answers for later calls.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also compare votes, best-of-n and early stopping by cost; compare.png.")
    ] = False,
    limit: Limit = None,
    question_field: Question = None,
    answer_field: Answer = None,
    samples_field: Samples = None,
) -> None:
    """Count the votes of sampled rationales: single, majority@k, any@k and pass@k accuracy, ties, and a plot.

    Rows have question, answer and generated_answer (a list of rationales), or are of lm-evaluation-harness, OpenAI,
    vLLM, TRL, verl or datasets. The answer of a rationale is the last \\boxed{...}, <answer> or ####, else the text
    after "The answer is" or "Answer:", else what --answer-regex finds; `calm-fast answers` shows it. Without gold
    answers winners, margins and agreement are reported.
    """
    try:
        ks = tuple(int(size) for size in k.split(",")) if k is not None else ()
    except ValueError as problem:
        raise typer.BadParameter(f"must be numbers like 1,2,4,8, got {k!r}", param_hint="--k") from problem
    if any(size < 1 for size in ks) or len(set(ks)) < len(ks):
        raise typer.BadParameter(f"must be different sizes of at least 1, got {k!r}", param_hint="--k")
    with folder(out):
        from rich.console import Console

        from calm_fast.consistency.voting import report as vote_report
        from calm_fast.consistency.voting.formats import Fields

        for name in (*vote_report.FILES, vote_report.COMPARISON) if compare else vote_report.FILES:
            if (out / name).is_dir():
                raise typer.BadParameter(f"cannot write {out / name}: it is a folder", param_hint="--out")

        settings = vote_report.VoteSettings(
            ks=ks, rule=rule, lam=lam, scores=scores, scores_are=scores_are, resamples=resamples, seed=seed,
            answer_regex=answer_regex, equality=equality, workers=workers, timeout=timeout, cache_dir=cache,
            fields=Fields(question_field, answer_field, samples_field), compare=compare,
        )  # fmt: skip
        try:
            report = vote_report.run(data, out, settings, limit=limit)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        except OSError as problem:
            raise typer.BadParameter(f"{problem.filename or out}: {problem.strerror}") from problem
        vote_report.print_report(report, Console())


def answers(
    data: AnyRows,
    show: Annotated[int, typer.Option(min=0, help="Questions whose samples are shown.")] = 5,
    answer_regex: Regex = None,
    limit: Limit = None,
    question_field: Question = None,
    answer_field: Answer = None,
    samples_field: Samples = None,
) -> None:
    """Show which answer is read from each sample, and from where in its text."""
    from rich.console import Console

    from calm_fast.consistency.voting.answer_table import print_answers
    from calm_fast.consistency.voting.formats import Fields
    from calm_fast.consistency.voting.samples import read_rows

    try:
        rows = read_rows(data, limit, need_answer=False, fields=Fields(question_field, answer_field, samples_field))
        print_answers(rows, answer_regex, show, Console())
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
