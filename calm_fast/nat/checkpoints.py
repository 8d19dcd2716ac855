"""Checkpoints of a stage: the newest whole one, and what to do with one that a kill or a full disk cut short."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from calm_fast.hf.dual_lora_files import WEIGHTS

_STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. state: the content of its trainer_state.json."""

    folder: Path
    step: int
    state: dict[str, Any]


def newest_checkpoint(out: Path, where: str, args: TrainingArguments) -> Checkpoint | None:
    """Return the newest checkpoint in `out` whose files can all be read, or None; remove newer ones that cannot.

    A checkpoint is written file by file, so that a killed process or a full disk leaves a folder with missing or cut
    files. The one before is still there, because it is deleted only after the next one is whole. A warning names the
    file and what the stage goes on from.
    """
    if not out.is_dir():
        return None
    found = [(int(match[1]), folder) for folder in out.iterdir() if (match := _FOLDER.fullmatch(folder.name))]
    broken: list[tuple[Path, str]] = []
    newest = None
    for step, folder in sorted(found, reverse=True):
        try:
            newest = Checkpoint(folder, step, _read(folder, step, args.world_size))
            break
        except ValueError as problem:
            broken.append((folder, str(problem)))
    for folder, reason in broken:
        follows = "the stage begins anew" if newest is None else f"it goes on from {newest.folder.name}"
        warnings.warn(f"{where}: {folder.name} in {out} is incomplete ({reason}), so {follows}", stacklevel=3)
        if args.process_index == 0:
            shutil.rmtree(folder)  # or its files would mix with those of the next checkpoint of that name
    return newest


def _read(folder: Path, step: int, world_size: int) -> dict[str, Any]:
    """Return the state of a checkpoint; raise ValueError with the reason if a file is missing or cut."""
    names = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{i}.pth" for i in range(world_size)]
    readers: dict[str, Callable[[Path], Any]] = {WEIGHTS: _read_tensor_names}
    readers |= {name: _read_archive for name in ("optimizer.pt", "scheduler.pt", *names)}
    for name, reader in {**readers, _STATE: _read_state}.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"it has no {name}")
        try:
            content = reader(file)
        except (ValueError, BadZipFile, SafetensorError) as problem:  # no OSError: a disk may read the file later
            raise ValueError(f"{name}, {file.stat().st_size} bytes, cannot be read: {problem}") from problem
    if content.get("global_step") != step:
        raise ValueError(f"{_STATE} is that of step {content.get('global_step')}")
    return content


def _read_tensor_names(file: Path) -> list[str]:
    # opening compares the header's offsets with the size of the file
    with safe_open(file, framework="pt") as content:
        return list(content.keys())


def _read_archive(file: Path) -> list[str]:
    # torch.save writes a zip, whose table of contents is at the end
    with ZipFile(file) as content:
        return content.namelist()


def _read_state(file: Path) -> Any:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content
