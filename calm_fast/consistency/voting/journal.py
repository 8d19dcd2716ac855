"""An append-only JSONL file of finished questions that survives being killed."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
_PIECE = 1 << 14  # bytes of a gzip file taken at once


class Journal:
    """Rows {"index": int, "question": str, ...}, one a line, and the settings they were made with beside them.

    A line counts once its newline is written; what a kill left behind it is cut off when the file is opened again.
    Where the name ends in .gz every write is a gzip member of its own, which counts once it is whole: any gzip reader
    reads the members as one file, and a kill costs at most the last write.
    The settings lie in FILE.settings.json; rows made with others are never mixed. One process writes at a time.

    Raises ValueError: the file exists without settings, was made with other settings, or holds a damaged line.
    RuntimeError: another process has it open.
    """

    def __init__(self, file: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        self.file = Path(file)
        self.packed = self.file.suffix == ".gz"
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
        lines, whole = self._members(content) if self.packed else _lines(content)
        if whole < len(content):  # a kill in the middle of a write
            self.stream.truncate(whole)
        rows = []
        for number, line in enumerate(lines.splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append({**row, "index": int(row["index"]), "question": str(row["question"])})
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(f"out: {self.file.name}, line {number} is damaged ({problem}); remove it") from problem
        return rows

    def _members(self, content: bytes) -> tuple[bytes, int]:
        """What the whole gzip members of a file say, and where the last of them ends."""
        lines, whole = [], 0
        while whole < len(content):
            member, end, text = zlib.decompressobj(wbits=31), whole, []  # 31: gzip and nothing else
            try:
                while end < len(content) and not member.eof:
                    piece = content[end : end + _PIECE]
                    text.append(member.decompress(piece))
                    end += len(piece) - len(member.unused_data)
            except zlib.error as problem:
                where = f"out: {self.file.name}, after byte {whole}"
                raise ValueError(f"{where}: expected gzip, as the name says ({problem}); give another file") from None
            if not member.eof:
                break
            lines += text
            whole = end
        return b"".join(lines), whole

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows behind the others, on disk when this returns."""
        lines = b"".join(json.dumps(row, allow_nan=False).encode("ascii") + b"\n" for row in rows)
        if not lines:
            return
        self.stream.write(gzip.compress(lines, mtime=0) if self.packed else lines)
        self.stream.flush()
        os.fsync(self.stream.fileno())


def _lines(content: bytes) -> tuple[bytes, int]:
    """The whole lines of a file, and where the last of them ends."""
    whole = content.rfind(b"\n") + 1
    return content[:whole], whole


def _lock(stream: Any, file: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        raise RuntimeError(f"out: another process is writing {file.name}") from problem
