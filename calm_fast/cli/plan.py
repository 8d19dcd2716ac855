"""`calm-fast plan`: what training a composition will cost, from configs alone."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def plan(
    anchor: Annotated[str, typer.Option(help="Config of B: a config.json, or a folder or hub name with one.")],
    augmenter: Annotated[list[str], typer.Option(help="Config of a model that it reads, A; repeat.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the training, all epochs, padding included.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, one process each.")] = 1,
    connections: Annotated[
        list[str] | None, typer.Option(help="uniform:N, or pairs like 3:2,5:4; repeat for each augmenter.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Heads of a connection. Default: B's.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Default: B's width / --num-heads.")] = None,
    bidirectional: Annotated[
        str | None, typer.Option(help="prompt, if the augmenters are encoders that read the prompt.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step and GPU.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the frozen models: bfloat16, float16 or float32.")] = "bfloat16",
    gpu: Annotated[str, typer.Option(help="h200, h100 or a100.")] = "h200",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute B's layers in backward.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard all weights over the GPUs.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print memory per GPU, FLOPs and a model's time of training a composition, from the configs of its parts.

    No weight is read: a step is traced on the meta device. Times come from the GPU's datasheet and are no measurement.
    """
    from calm_fast.cli.compose import _connections
    from calm_fast.planning import lines
    from calm_fast.planning import plan as planned

    try:
        found = planned(
            anchor, augmenter, tokens=tokens, gpus=gpus, connections=_connections(connections), num_heads=num_heads,
            head_dim=head_dim, bidirectional=bidirectional, batch_size=batch_size, length=length, dtype=dtype, gpu=gpu,
            checkpointing=checkpointing, fsdp=fsdp,
        )  # fmt: skip
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    typer.echo(json.dumps(found, indent=1) if json_output else "\n".join(lines(found)))
