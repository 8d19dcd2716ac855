"""`calm-fast ask`: samples for a file of questions, from a server of the OpenAI protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from calm_fast.cli.common import System, TemplateVariables, folder, template_variables
from calm_fast.cli.vote import AnyRows, Limit, Regex

SAMPLES = "samples.jsonl"


def ask(
    data: AnyRows,
    endpoint: Annotated[str, typer.Option(help="Base URL of the server, with /v1.")],
    model: Annotated[str, typer.Option(help="The name that the server knows the model by.")],
    out: Annotated[Path, typer.Option(help=f"Folder for {SAMPLES}, from which a second call goes on.")],
    n: Annotated[int, typer.Option(min=1, help="Samples of a question.")] = 16,
    rule: Annotated[str, typer.Option(help="count, or by log-probabilities weighted or adaptive.")] = "count",
    confidence: Annotated[float | None, typer.Option(help="Stop a question early at this certainty.")] = None,
    prompt: Annotated[str | None, typer.Option(help="chat, plain, or a text with {question}. Default: chat.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    temperature: Annotated[float, typer.Option(min=0)] = 0.7,
    top_p: Annotated[float | None, typer.Option(help="Above 0 and at most 1.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Questions that are asked at the same time.")] = 8,
    retries: Annotated[int, typer.Option(min=0, help="Further tries after an error of the server.")] = 5,
    timeout: Annotated[float, typer.Option(help="Seconds of a request.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of the samples; sent with every request.")] = 0,
    send_seed: Annotated[bool, typer.Option("--send-seed/--no-seed", help="--no-seed for servers that refuse it.")]
    = True,
    system: System = None,
    chat_template_kwargs: TemplateVariables = None,
    equality: Annotated[str, typer.Option(help="math, exact or text.")] = "math",
    answer_regex: Regex = None,
    limit: Limit = None,
    question_field: Annotated[str, typer.Option(help="Field of the question.")] = "question",
    answer_field: Annotated[str, typer.Option(help="Field of the gold answer, if there is one.")] = "answer",
) -> None:  # fmt: skip
    """Draw n samples for every question of a file from a server, and vote.

    The server is vLLM, SGLang, llama.cpp, `calm-fast serve` or another with the OpenAI protocol. The key is read from
    OPENAI_API_KEY. `calm-fast vote DIR/samples.jsonl` makes the report.
    """
    with folder(out):
        from calm_fast import SelfConsistency
        from calm_fast.consistency import Endpoint

        try:
            questions, references = _questions(data, question_field, answer_field, limit)
            server = Endpoint(
                endpoint, model, parallel=parallel, retries=retries, timeout=timeout, seeded=send_seed
            )  # fmt: skip
            run = SelfConsistency(
                server, n=n, rule=rule, prompt=prompt, system=system, confidence=confidence, seed=seed,
                chat_template_kwargs=template_variables(chat_template_kwargs), pattern=answer_regex, equality=equality,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
            )  # fmt: skip
            results = run(questions, references, out=out / SAMPLES)
        except (ValueError, TypeError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        except RuntimeError as problem:
            typer.echo(f"calm-fast: {problem}", err=True)
            raise typer.Exit(1) from problem
    drawn = sum(len(result.rationales) for result in results)
    graded = [result.credit for result in results if result.credit is not None]
    right = f", majority right {sum(graded) / len(graded):.1%} of {len(graded)}" if graded else ""
    typer.echo(f"{len(results)} questions, {drawn} samples{right}: {out / SAMPLES}")


def _questions(
    data: Path, question_field: str, answer_field: str, limit: int | None
) -> tuple[list[str], list[str | None]]:
    """Return the questions of a file and their gold answers. Raises ValueError for a row without a question."""
    from calm_fast.consistency.answers.gold import answer_text
    from calm_fast.consistency.voting.records import read_records

    questions: list[str] = []
    references: list[str | None] = []
    for place, row in read_records(data):
        if limit is not None and len(questions) == limit:
            break
        question: Any = row.get(question_field) if isinstance(row, dict) else None
        if not isinstance(question, str):
            raise ValueError(f"{place}: the row must have a text in `{question_field}`; --question-field names another")
        answer: Any = row.get(answer_field)
        if isinstance(answer, bool) or not (answer is None or isinstance(answer, (str, int, float))):
            raise ValueError(f"{place}: `{answer_field}` must be a text or a number; --answer-field names another")
        questions.append(question)
        references.append(answer_text(answer))
    if not questions:
        raise ValueError(f"{data.name}: the file must have at least one question, got none")
    return questions, references
