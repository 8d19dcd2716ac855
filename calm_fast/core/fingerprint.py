"""Checksums that tell models and data apart, so that a resumed run is never mixed with another one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import nn


def model_fingerprint(model: nn.Module, edge: int = 64) -> str:
    """Return a checksum of a loaded model: name, shape and the first `edge` elements of every parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        first = p.detach().flatten()[:edge].double().cpu().tolist()
        digest.update(f"{name} {tuple(p.shape)} {first}".encode())
    return digest.hexdigest()


def model_folder_fingerprint(folder: str | os.PathLike[str], edge: int = 1 << 20) -> str:
    """Return a checksum of a model that need not be loaded for it, so it differs from `model_fingerprint`.

    It covers config.json, and name, size and the first and last `edge` bytes of every weight file.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*")):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(edge))
                content.seek(max(0, file.stat().st_size - edge))
                digest.update(content.read(edge))
    return digest.hexdigest()


def file_checksum(file: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def json_checksum(content: Any) -> str:
    """Return the SHA-256 of `content` as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
