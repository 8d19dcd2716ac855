"""Verdicts of math-verify on disk: one sqlite file that processes share and other versions do not see."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import warnings
from collections.abc import Iterable, Mapping
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RULES = 3  # raise it when a change of ours gives another verdict with the same versions of the libraries
_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy")
_WAIT_SECONDS = 30
_AT_ONCE = 500
_TABLE = "CREATE TABLE IF NOT EXISTS verdicts (pair BLOB PRIMARY KEY, same INTEGER, timeout REAL) WITHOUT ROWID"


class VerdictCache:
    """Maps pairs of answers to equal, different, or None where `timeout` CPU seconds were not enough.

    Args:
        folder: holds answers.sqlite3, which is created if it is missing. None = no cache.
    A file that cannot be read or written causes a warning, and the answers are compared without it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, timeout: float) -> None:
        self.timeout = timeout
        self.file: Path | None = None
        self._salt = "\0".join([str(RULES), *(f"{name} {_version(name)}" for name in _LIBRARIES)])
        if folder is None:
            return
        self.file = Path(folder) / "answers.sqlite3"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open(self.file)) as base, base:
                base.execute(_TABLE)
        except (OSError, sqlite3.Error) as problem:
            self._give_up(problem)

    def get(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        """Return the known verdicts among `pairs`; one that timed out with a shorter timeout than now is not known."""
        if self.file is None:
            return {}
        keys = {self._key(pair): pair for pair in pairs}
        names, found = list(keys), dict[tuple[str, str], bool | None]()
        try:
            with closing(self._open(self.file)) as base:
                for start in range(0, len(names), _AT_ONCE):
                    some = names[start : start + _AT_ONCE]
                    marks = ",".join("?" * len(some))
                    asked = f"SELECT pair, same, timeout FROM verdicts WHERE pair IN ({marks})"
                    for key, same, timeout in base.execute(asked, some):
                        if same is not None or timeout >= self.timeout:
                            found[keys[key]] = None if same is None else bool(same)
        except sqlite3.Error as problem:
            self._give_up(problem)
        return found

    def put(self, verdicts: Mapping[tuple[str, str], bool | None]) -> None:
        """Save verdicts in one transaction."""
        if self.file is None or not verdicts:
            return
        rows = [(self._key(p), None if v is None else int(v), self.timeout) for p, v in verdicts.items()]
        try:
            with closing(self._open(self.file)) as base, base:
                base.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)
        except sqlite3.Error as problem:
            self._give_up(problem)

    @staticmethod
    def _open(file: Path) -> sqlite3.Connection:
        return sqlite3.connect(file, timeout=_WAIT_SECONDS)

    def _key(self, pair: tuple[str, str]) -> bytes:
        # both orders are one entry; the length stands in the key because an answer may hold any separator
        low, high = sorted(part.encode("utf-8", "surrogatepass") for part in pair)
        return hashlib.sha256(f"{self._salt}\0{len(low)}\0".encode() + low + high).digest()[:16]

    def _give_up(self, problem: Exception) -> None:
        warnings.warn(f"group_answers: answers are compared without the cache {self.file}: {problem}", stacklevel=4)
        self.file = None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"
