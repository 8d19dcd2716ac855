"""An append-only JSONL file of finished questions that survives being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


class Journal:
    """Rows {"index": int, "question": str, ...}, one a line, and the settings they were made with beside them.

    A line counts once its newline is written; what a kill left behind it is cut off when the file is opened again.
    The settings lie in FILE.settings.json; rows made with others are never mixed. One process writes at a time.

    Raises ValueError: the file exists without settings, was made with other settings, or holds a damaged line.
    RuntimeError: another process has it open.
    """

    def __init__(self, file: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        self.file = Path(file)
        self.settings_file = self.file.with_name(self.file.name + ".settings.json")
        # as JSON gives it back: tuples are lists there
        wanted = json.loads(json.dumps({"format": FORMAT_VERSION, **settings}))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.stream = open(self.file, "a+b")  # noqa: SIM115 - open as long as the journal
        try:
            _lock(self.stream, self.file)
            self._check_settings(wanted)
            self.rows = {row["index"]: row for row in self._read()}
        except BaseException:
            self.stream.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()

    def _check_settings(self, wanted: dict[str, Any]) -> None:
        if self.settings_file.is_file():
            made = json.loads(self.settings_file.read_text(encoding="utf-8"))
            keys = [key for key in {**made, **wanted} if made.get(key) != wanted.get(key)]
            if keys:
                told = "; ".join(f"{key}: {made.get(key)!r} there, {wanted.get(key)!r} now" for key in keys)
                raise ValueError(f"out: {self.file.name} was made with other settings ({told}); give another file")
            return
        if self.file.stat().st_size:
            raise ValueError(
                f"out: {self.file.name} exists and {self.settings_file.name} does not, expected a file of an earlier "
                "run to resume; give another file"
            )
        partial = self.settings_file.with_name(self.settings_file.name + ".partial")
        partial.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.settings_file)

    def _read(self) -> list[dict[str, Any]]:
        self.stream.seek(0)
        content = self.stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):  # a kill in the middle of a write
            self.stream.truncate(whole)
        rows = []
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append({**row, "index": int(row["index"]), "question": str(row["question"])})
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(f"out: {self.file.name}, line {number} is damaged ({problem}); remove it") from problem
        return rows

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows behind the others, on disk when this returns."""
        lines = b"".join(json.dumps(row, allow_nan=False).encode("ascii") + b"\n" for row in rows)
        self.stream.write(lines)
        self.stream.flush()
        os.fsync(self.stream.fileno())


def _lock(stream: Any, file: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        raise RuntimeError(f"out: another process is writing {file.name}") from problem
