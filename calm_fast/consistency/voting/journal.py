"""An append-only JSONL file of finished questions that survives a killed process."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calm_fast.core.files import write_json

FORMAT_VERSION = 1
_PIECE = 1 << 14  # bytes of a gzip file that are decompressed at once


class Journal:
    """Rows {"index": int, "question": str, ...}, one per line, and beside the file the settings of the run.

    A line counts once its newline is written. An incomplete line that a killed process left is cut off when the file is
    opened again. If the name ends in .gz, every write is a gzip member of its own, which counts once it is complete;
    any gzip reader reads the members as one file, and a killed process loses at most its last write. The settings lie
    in FILE.settings.json, and rows of different settings are never mixed. One process writes at a time.

    where: the function whose argument `out` the file is, which errors name.

    Raises:
        ValueError: the file exists without settings, was made with other settings, or has a damaged line.
        RuntimeError: another process has the file open.
    """

    def __init__(self, file: str | os.PathLike[str], settings: Mapping[str, Any], where: str = "Journal") -> None:
        self.file, self.where = Path(file), where
        self.packed = self.file.suffix == ".gz"
        self.settings_file = self.file.with_name(self.file.name + ".settings.json")
        # as JSON returns it, with lists for tuples
        wanted = json.loads(json.dumps({"format": FORMAT_VERSION, **settings}))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.stream = open(self.file, "a+b")  # noqa: SIM115 - open as long as the journal
        try:
            _lock(self.stream, self.file, where)
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
                raise ValueError(
                    f"{self.where}: `out` must be a file of the same settings, got {self.file.name}, which was "
                    f"made with other settings ({told}); give another file"
                )
            return
        if self.file.stat().st_size:
            raise ValueError(
                f"{self.where}: `out` must be a new file or one of an earlier run, got {self.file.name}, which exists "
                f"while {self.settings_file.name} does not; give another file"
            )
        write_json(self.settings_file, wanted, indent=2)

    def _read(self) -> list[dict[str, Any]]:
        self.stream.seek(0)
        content = self.stream.read()
        lines, whole = self._members(content) if self.packed else _lines(content)
        if whole < len(content):  # the process was killed during a write
            self.stream.truncate(whole)
        rows = []
        for number, line in enumerate(lines.splitlines(), 1):
            try:
                row = json.loads(line)
                rows.append({**row, "index": int(row["index"]), "question": str(row["question"])})
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(
                    f"{self.where}: `out` must hold rows as they were written, got {self.file.name}, whose line "
                    f"{number} is damaged ({problem}); remove that line"
                ) from problem
        return rows

    def _members(self, content: bytes) -> tuple[bytes, int]:
        """Return the content of the complete gzip members of a file, and the end of the last of them."""
        lines: list[bytes] = []
        whole = 0
        while whole < len(content):
            member, end, text = zlib.decompressobj(wbits=31), whole, list[bytes]()  # 31: gzip and nothing else
            try:
                while end < len(content) and not member.eof:
                    piece = content[end : end + _PIECE]
                    text.append(member.decompress(piece))
                    end += len(piece) - len(member.unused_data)
            except zlib.error as problem:
                raise ValueError(
                    f"{self.where}: `out` must be gzip, as its name says, got {self.file.name}, which is not after "
                    f"byte {whole} ({problem}); give another file"
                ) from None
            if not member.eof:
                break
            lines += text
            whole = end
        return b"".join(lines), whole

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows; they are on disk when this returns."""
        lines = b"".join(json.dumps(row, allow_nan=False).encode("ascii") + b"\n" for row in rows)
        if not lines:
            return
        self.stream.write(gzip.compress(lines, mtime=0) if self.packed else lines)
        self.stream.flush()
        os.fsync(self.stream.fileno())


def _lines(content: bytes) -> tuple[bytes, int]:
    """Return the complete lines of a file, and the end of the last of them."""
    whole = content.rfind(b"\n") + 1
    return content[:whole], whole


def _lock(stream: Any, file: Path, where: str) -> None:
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        raise RuntimeError(
            f"{where}: `out` must be a file that no other process writes, got {file.name}: another process is "
            "writing it; wait for that process or give another file"
        ) from problem
