"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calm_fast.core.checks import bad_type, bad_value


def check_folder(where: str, name: str, folder: Any) -> Path:
    """Return the folder that argument `name` of `where` names: one that exists, or a path where no file is in the way.

    Raises TypeError if it is no path, ValueError if a file is in the way.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise bad_type(where, name, "the path of a folder", folder)
    path = Path(folder)
    there = next((part for part in (path, *path.parents) if part.exists()), path)
    if there.exists() and not there.is_dir():
        raise bad_value(where, name, "a folder", f"{str(path)!r}, where {there} is a file")
    return path


@contextmanager
def atomic_path(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `file`, which replaces `file` when the block ends.

    If the block raises, `file` stays as it was and the temporary file is removed. A killed process leaves the old file
    or the new one, never a part of one; of two writers the last one wins. Links are followed and the file's mode is
    kept. A target that cannot be replaced, such as a pipe or a terminal, is given itself.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        yield target
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(file: Path) -> bool:
    """Return True for a temporary file of `atomic_path`: of a process that still writes, or that was killed."""
    return file.name.startswith(".") and file.name.endswith(".partial")


def remove_leftovers(file: Path) -> None:
    """Remove the temporary files that killed processes of this machine left beside `file`."""
    for partial in file.parent.glob(f".{file.name}.*.partial"):
        number = partial.name.split(".")[-2].partition("-")[0]
        if number.isdigit() and not _runs(int(number)):
            partial.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, but is somebody else's
        return True
    return True


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: str | os.PathLike[str], content: Any, indent: int = 1) -> None:
    """Write `content` as JSON with a final newline, atomically."""
    write_text(file, json.dumps(content, indent=indent) + "\n")


def claim(file: Path, identity: dict[str, Any], what: str, where: str) -> None:
    """Mark the folder of `file` as that of the run with this identity.

    what: the words for such a run in the error. where: the function and the argument that the error names.
    Raises ValueError if the folder belongs to another run.
    """
    identity = json.loads(json.dumps(identity))
    if not file.is_file():
        write_json(file, identity)
    kept = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key in identity if kept.get(key) != identity[key]]
    if changed:
        raise ValueError(
            f"{where} must be a new folder or that of the same run, got {file.parent}, which holds {what} with "
            f"other {', '.join(changed)}; choose another folder"
        )
