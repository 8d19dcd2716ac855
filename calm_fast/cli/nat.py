"""`calm-fast nat`: learn from wrong rationales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calm_fast.cli.common import System, TemplateVariables, folder, template_variables


def nat(
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of a causal language model.")],
    out: Annotated[Path, typer.Option(help="Folder for adapters, checkpoints and results.json.")],
    data: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, metavar="DATA", help="JSONL rows, .gz or plain.")
    ] = None,
    old_data: Annotated[Path | None, typer.Option("--data", exists=True, dir_okay=False, hidden=True)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each stage.")] = 300,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps until --lr is reached. Default: a tenth of --steps, at most 20.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of both LoRAs.")] = 8,
    variant: Annotated[str, typer.Option(help="Form of the layers: paper or released.")] = "paper",
    nce_masking: Annotated[
        str, typer.Option(help="Tokens that NCE counts: paper (rationales) or released (prompts too).")
    ] = "paper",
    target: Annotated[
        list[str] | None, typer.Option(help="A layer name; repeat. Default: the projections to queries and values.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="chat, plain, or a text with {question}. Default: chat if the tokenizer has a template."),
    ] = None,
    system: System = None,
    chat_template_kwargs: TemplateVariables = None,
    max_length: Annotated[int, typer.Option(min=8, help="Most tokens of an example.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Learn from wrong rationales: negative LoRA, NAT, then NCE into one LoRA (arXiv 2312.12832).

    Rows have question, answer and generated_answer (a list of rationales). A rationale is right if it reaches the row's
    answer. Writes negative/ and student/ (PEFT adapters), nat/ and results.json; the same call resumes an interrupted
    run.
    """
    data = _data_argument(data, old_data)
    variables = template_variables(chat_template_kwargs)
    with folder(out):
        from calm_fast.nat import Settings, run

        try:
            settings = Settings(
                steps=steps, batch_size=batch_size, learning_rate=lr, warmup=warmup, rank=rank, variant=variant,
                nce_masking=nce_masking, target_modules=tuple(target) if target else None, seed=seed,
            )  # fmt: skip
            results = run(
                data, model, out, settings, limit=limit, max_length=max_length, prompt=prompt, system=system,
                chat_template_kwargs=variables,
            )  # fmt: skip
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        for reason, count in results["left_out"].items():
            typer.echo(f"left out {count} rows with {reason}")
        for stage, losses in results["losses"].items():
            typer.echo(f"{stage:10} loss {losses[0]['loss']:.4f} -> {losses[-1]['loss']:.4f}")
        for path, gate in results["gates"].items():
            typer.echo(f"{path:50} negative share {gate['mean']:.3f} +- {gate['std']:.3f}")


def _data_argument(data: Path | None, old_data: Path | None) -> Path:
    """Return DATA, which may still come as --data."""
    if data is not None and old_data is not None:
        raise typer.BadParameter(f"must be given once, got {data} and --data {old_data}", param_hint="DATA")
    if old_data is not None:
        typer.echo(f"calm-fast nat: --data is deprecated; write `calm-fast nat {old_data} ...`", err=True)
    found = data if data is not None else old_data
    if found is None:
        raise typer.BadParameter("must be a file of JSONL rows, got none", param_hint="DATA")
    return found
