"""The arguments of transformers' save_pretrained that a composition takes: honoured or refused, never just ignored."""

from __future__ import annotations

import re
from typing import Any

from calm_fast.core.checks import bad_type, bad_value

_SAVE = "save_pretrained"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# arguments that a composition fulfils whatever their value: it has no adapters, no names of an original format, writes
# its tensors itself (transformers ignores save_function too), and needs a token only to upload
_WITHOUT_EFFECT = {"save_peft_format", "save_original_format", "save_function", "token"}


def _bytes(size: int | str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if isinstance(size, bool) or found is None or found[2].upper() not in _UNITS:
        raise bad_type(_SAVE, "max_shard_size", "a number of bytes, or a text like '5GB'", size)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def check_save_arguments(kwargs: dict[str, Any], size: int) -> None:
    """Raise ValueError for an argument that would not be honoured, TypeError for an unknown one.

    size: bytes of the composition tensors, which are one file.
    """
    refused = {"safe_serialization": True, "variant": None, "distributed_checkpoint": False}
    for name, value in kwargs.items():
        if name in refused and value != refused[name]:
            got = f"{value!r}. A composition is one file, model.safetensors"
            raise bad_value(_SAVE, name, repr(refused[name]), got)
        if name == "max_shard_size" and _bytes(value) < size:
            got = f"{value!r}. A composition is one file, model.safetensors"
            raise bad_value(_SAVE, name, f"at least the size of the composition tensors, {size} bytes", got)
        if name not in {"max_shard_size", *refused, *_WITHOUT_EFFECT}:
            raise TypeError(f"{_SAVE}: got an unexpected argument `{name}`")
