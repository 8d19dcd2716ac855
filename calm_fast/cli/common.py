"""Arguments and checks that several commands share."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

Rows = Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="DATA", help="JSONL rows, .gz or plain.")]

System = Annotated[str | None, typer.Option(help="A system turn before the prompt, for the chat template.")]
TemplateVariables = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs", help="Variables for the chat template, as JSON: '{\"enable_thinking\": false}'."
    ),
]


def template_variables(text: str | None) -> dict[str, Any] | None:
    """Return the object that `--chat-template-kwargs` holds."""
    try:
        found = None if text is None else json.loads(text)
    except ValueError:
        found = text
    if found is not None and not isinstance(found, dict):
        raise typer.BadParameter(
            f'must be a JSON object like {{"enable_thinking": false}}, got {text}', param_hint="--chat-template-kwargs"
        )
    return found


@contextlib.contextmanager
def folder(out: Path) -> Iterator[None]:
    """Create `out`, and fail with one readable line before minutes of work are lost if that is not possible.

    If the command fails without writing anything, the folders that were created here are removed.
    """
    new = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    try:
        try:
            what = "create the folder"
            out.mkdir(parents=True, exist_ok=True)
            what = "write into"
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as problem:
            raise typer.BadParameter(f"cannot {what} {out}: {problem.strerror}", param_hint="--out") from problem
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for folder in new:
                with contextlib.suppress(FileNotFoundError):  # not created yet
                    folder.rmdir()
        raise


def check_device(device: str | None) -> None:
    from calm_fast.core.devices import usable_device

    try:
        usable_device("", device)
    except ValueError as problem:
        raise typer.BadParameter(str(problem).removeprefix(": `device` "), param_hint="--device") from problem
