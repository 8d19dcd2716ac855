"""`calm-fast serve`: a composition behind the OpenAI protocol."""

from __future__ import annotations

from typing import Annotated

import typer

from calm_fast.cli.common import check_device
from calm_fast.cli.compose import Composition, Device


def serve(
    composition: Composition,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: the folder's name.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen. Default: connections of this machine only.")]
    = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    dtype: Annotated[str | None, typer.Option(help="Of the frozen models. Default: as they were saved.")] = None,
    device: Device = None,
) -> None:  # fmt: skip
    """Answer requests of the OpenAI protocol: /v1/chat/completions, /v1/completions, /v1/models.

    It is transformers' own server with one model. Requests are answered one after the other; the n samples of a
    request are one batch. There is no authentication.
    """
    check_device(device)
    from calm_fast.serving import serve as run

    try:
        run(composition, name=name, host=host, port=port, device=device, dtype=dtype, say=typer.echo)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
