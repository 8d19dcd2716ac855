"""`calm-fast rank train | score`: a ranking model for self-consistency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from calm_fast.cli.common import Rows, check_device, folder

rank = typer.Typer(help="Train and use a ranking model for self-consistency.", no_args_is_help=True)


@rank.command("train")
def rank_train(
    data: Rows,
    model: Annotated[str, typer.Option(help="Folder or name of a transformers encoder or decoder.")],
    out: Annotated[Path, typer.Option(help="Folder for ranker/, results.json and the files that resuming needs.")],
    loss: Annotated[str, typer.Option(help="power, margin or bce.")] = "power",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions in a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate of the head.")] = 1e-3,
    backbone_lr: Annotated[float, typer.Option(help="Peak learning rate of a trained backbone.")] = 2e-5,
    train_backbone: Annotated[bool, typer.Option("--train-backbone", help="Train the model too.")] = False,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the head.")] = 256,
    max_length: Annotated[int | None, typer.Option(min=16, help="Most tokens of question and rationale.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of a frozen model: float32, bfloat16 or float16.")] = "float32",
    holdout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of questions to evaluate on.")] = 0.1,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    answer_regex: Annotated[str | None, typer.Option(help="Finds an answer if nothing else does.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that compare answers.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda. Default: cpu.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a ranker to tell right rationales from wrong ones; it is evaluated on held-out questions.

    Rows have question, answer and generated_answer (a list of rationales). The same call resumes an interrupted run.
    """
    import torch

    from calm_fast.consistency.ranking.pipeline import run_training
    from calm_fast.consistency.ranking.training import RankerSettings
    from calm_fast.consistency.voting.samples import read_rows

    if dtype not in ("float32", "bfloat16", "float16") or (train_backbone and dtype != "float32"):
        raise typer.BadParameter(
            f"must be float32, or bfloat16 or float16 for a frozen model, got {dtype}", param_hint="--dtype"
        )
    check_device(device)
    with folder(out):
        try:
            settings = RankerSettings(
                loss=loss, epochs=epochs, questions_per_step=batch_size, learning_rate=lr,
                backbone_learning_rate=backbone_lr, seed=seed,
            )  # fmt: skip
            results = run_training(
                read_rows(data, limit), model, out, settings, train_backbone=train_backbone, max_length=max_length,
                dtype=getattr(torch, dtype), hidden=hidden, holdout=holdout, pattern=answer_regex, workers=workers,
                device=device,
            )  # fmt: skip
        except (ValueError, OSError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        typer.echo(f"loss {results['losses'][0]:.4f} -> {results['losses'][-1]:.4f}")
        for side, row in results["pair_accuracy"].items():
            share = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
            typer.echo(f"pair accuracy, {side.replace('_', ' ')}: {share} ({row['pairs']} pairs)")


@rank.command("score")
def rank_score(
    data: Rows,
    ranker: Annotated[Path, typer.Option(exists=True, file_okay=False, help="--out of `rank train`.")],
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="File for the rows with `scores`; gzipped if it ends in .gz.")
    ],
    backbone: Annotated[str | None, typer.Option(help="Folder of the frozen model, if it was moved.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    device: Annotated[str | None, typer.Option(help="For example cuda. Default: cpu.")] = None,
) -> None:
    """Score every rationale for `calm-fast vote --rule adaptive`. The same call resumes an interrupted run."""
    from calm_fast.consistency.ranking.pipeline import run_scoring
    from calm_fast.consistency.voting.samples import read_rows

    check_device(device)
    with folder(out.parent):
        try:
            run_scoring(read_rows(data, limit, need_answer=False), ranker, out, backbone=backbone, device=device)
        except (ValueError, OSError) as problem:
            raise typer.BadParameter(str(problem)) from problem
        typer.echo(f"wrote {out}")
