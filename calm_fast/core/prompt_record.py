"""The form of the prompts that an adapter was trained on: kept on the model, and as JSON beside the adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from calm_fast.core.checks import bad_value
from calm_fast.core.files import write_json

PROMPT_FILE = "prompt.json"
# 2 has a system turn or variables of the chat template, which earlier releases would leave out
FORMAT_VERSIONS = (1, 2)
_SINCE_2 = {"system", "chat_template_kwargs"}
_ATTRIBUTE = "calm_fast_prompt"


def set_prompt_record(model: nn.Module, record: dict[str, Any] | None) -> None:
    """Keep `record` on a model that is trained on such prompts; None forgets it."""
    model.__dict__.pop(_ATTRIBUTE, None)
    if record is not None:
        setattr(model, _ATTRIBUTE, record)


def get_prompt_record(model: nn.Module | None) -> dict[str, Any] | None:
    """Return the record that `set_prompt_record` kept on the model, or None."""
    return None if model is None else model.__dict__.get(_ATTRIBUTE)


def write_prompt_record(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's record into an adapter's folder; without a record remove one of an earlier save."""
    file, record = Path(folder) / PROMPT_FILE, get_prompt_record(model)
    if record is None:
        file.unlink(missing_ok=True)
    else:
        write_json(file, {"format_version": 2 if _SINCE_2 & record.keys() else 1, **record})


def read_prompt_record(folder: str | os.PathLike[str], where: str, name: str) -> dict[str, Any] | None:
    """Return the record in an adapter's folder, or None if there is none.

    Raises:
        ValueError: the file is no such record, or of another format version.
    """
    file = Path(folder) / PROMPT_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("format_version")
    except (ValueError, KeyError, AttributeError, TypeError) as problem:
        raise bad_value(where, name, f"a folder whose {PROMPT_FILE} can be read", f"{file}: {problem}") from problem
    if version not in FORMAT_VERSIONS:
        expected = f"a folder whose {PROMPT_FILE} has format version {' or '.join(map(str, FORMAT_VERSIONS))}"
        raise bad_value(where, name, expected, f"{version!r}; a newer calm_fast may read it")
    return dict(content)
