"""`calm-fast compose | generate | eval`: train a composition from a file of rows, ask it, score it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from calm_fast.cli.common import Rows, System, TemplateVariables, check_device, folder, template_variables

Composition = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, metavar="DIR", help="Folder of a composition.")
]
Device = Annotated[str | None, typer.Option(help="For example cuda:1 or cpu. Default: a GPU if there is one.")]


def compose(
    train: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="TRAIN", help="JSONL rows, .gz or plain.")
    ],
    anchor: Annotated[str, typer.Option(help="Folder or hub name of the model that is trusted, B.")],
    augmenter: Annotated[list[str], typer.Option(help="Folder or hub name of a model that it reads, A; repeat.")],
    out: Annotated[Path, typer.Option(help="Folder for the composition, results.json, report.html and checkpoints.")],
    eval_file: Annotated[
        Path | None,
        typer.Option("--eval", exists=True, dir_okay=False, help="Held-out rows. Default: --holdout of TRAIN."),
    ] = None,
    connections: Annotated[
        list[str] | None,
        typer.Option(help="uniform:N, or pairs like 3:2,5:4 (A's layer:B's layer); repeat for each augmenter."),
    ] = None,
    bidirectional: Annotated[
        list[str] | None,
        typer.Option(help="prompt or reencode: A is an encoder, such as BERT; repeat for each augmenter (or none)."),
    ] = None,
    chat_template_kwargs: TemplateVariables = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps until --lr is reached. Default: a tenth of --steps, at most 50.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.1,
    max_length: Annotated[int, typer.Option(min=2, help="Most tokens of an example.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the frozen models: auto, float32, bfloat16 or float16.")] = "auto",
    num_heads: Annotated[int | None, typer.Option(min=1, help="Heads of a connection. Default: B's.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Default: B's width / --num-heads.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    cache_augmenter: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Compute A's states of the training rows once, into this folder."),
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of TRAIN to evaluate on, without --eval.")
    ] = 0.05,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints. Default: a tenth of --steps.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read of a file.")] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Compose frozen models and train the connections between them (CALM, arXiv 2401.02412).

    Rows have text, prompt and completion, or messages (a chat). The anchor reads the augmenters' hidden states. Prints
    the held-out loss of A, B and A+B side by side; the same call resumes an interrupted run.
    """
    check_device(device)
    with folder(out):
        from calm_fast.composing import Settings, run

        try:
            settings = Settings(
                connections=_connections(connections), num_heads=num_heads, head_dim=head_dim, steps=steps,
                batch_size=batch_size, accumulate=accumulate, learning_rate=lr, warmup=warmup,
                weight_decay=weight_decay, max_length=max_length, dtype=dtype, holdout=holdout, save_every=save_every,
                bidirectional=_modes(bidirectional), chat_template_kwargs=template_variables(chat_template_kwargs),
                gradient_checkpointing=gradient_checkpointing, device=device, seed=seed,
                cache_augmenter=cache_augmenter,
            )  # fmt: skip
            run(train, anchor, augmenter, out, settings, held_out=eval_file, limit=limit, say=typer.echo)
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem


def generate(
    composition: Composition,
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with it; - = standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 = the likeliest token, else sampling.")] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give the prompt as a user's turn of the chat template.")
    ] = False,
    system: System = None,
    chat_template_kwargs: TemplateVariables = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
) -> None:
    """Print what a composition writes after a prompt, word by word. What is loaded goes to standard error."""
    check_device(device)
    if (prompt is None) == (prompt_file is None):
        got = "neither" if prompt is None else "both"
        raise typer.BadParameter(f"must be given, or --prompt-file, got {got}", param_hint="--prompt")
    variables = template_variables(chat_template_kwargs)
    if not chat and (system is not None or variables):
        raise typer.BadParameter("must be given for a system turn and variables of the template", param_hint="--chat")
    from calm_fast.composing import generate_text

    try:
        generate_text(
            composition, _read_prompt(prompt_file) if prompt is None else prompt, max_new_tokens=max_new_tokens,
            temperature=temperature, seed=seed, chat=chat, system=system, chat_template_kwargs=variables, device=device,
            say=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem


def evaluate(
    composition: Composition,
    data: Rows,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of an example. Default: that of the training, else 512.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most rows to read.")] = None,
    chat_template_kwargs: TemplateVariables = None,
    device: Device = None,
) -> None:
    """Print the held-out loss of the augmenters alone, the anchor alone and the composition, side by side."""
    import contextlib

    check_device(device)
    variables = template_variables(chat_template_kwargs)
    with contextlib.nullcontext() if out is None else folder(out):
        from calm_fast.composing import evaluate_folder

        try:
            results = evaluate_folder(
                composition, data, out=out, limit=limit, max_length=max_length, chat_template_kwargs=variables,
                device=device, say=typer.echo,
            )  # fmt: skip
        except ValueError as problem:
            raise typer.BadParameter(str(problem)) from problem
        for text in results["warnings"]:
            typer.echo(f"warning: {text}")


def _read_prompt(file: Path | None) -> str:
    if str(file) == "-":
        return sys.stdin.read()
    assert file is not None  # checked by the caller
    try:
        return file.read_text(encoding="utf-8")
    except OSError as problem:
        raise ValueError(f"generate: `prompt_file` must be a file, got {file}: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise ValueError(f"generate: `prompt_file` must be UTF-8 text, got {file}: {problem.reason}") from problem


def _modes(words: list[str] | None) -> Any:
    """Return what `--bidirectional` names: None, one mode for all augmenters, or a list with one or None for each."""
    if not words:
        return None
    modes = [None if word == "none" else word for word in words]
    return modes[0] if len(modes) == 1 else modes


def _connections(words: list[str] | None) -> Any:
    """Return the connections that `--connections` names: of every augmenter, or a list with those of each."""
    if not words:
        return "uniform:4"
    parsed = [_pairs(word) for word in words]
    return parsed[0] if len(parsed) == 1 else parsed


def _pairs(word: str) -> str | list[tuple[int, int]]:
    if word.startswith("uniform"):
        return word
    try:
        pairs = [pair.split(":") for pair in word.split(",")]
        return [(int(a), int(b)) for a, b in pairs]
    except ValueError as problem:
        raise typer.BadParameter(
            f"must be uniform:N, or pairs like 3:2,5:4, got {word!r}", param_hint="--connections"
        ) from problem
