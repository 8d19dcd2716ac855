"""Files of sampled rationales: JSONL, plain or gzipped, one question per line."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calm_fast.consistency.answers.gold import answer_text
from calm_fast.core.files import atomic_path

_GZIP = b"\x1f\x8b"


def read_rows(
    file: str | os.PathLike[str], limit: int | None = None, *, scores: str | None = None, need_answer: bool = True
) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file: question (str), answer (str), generated_answer (list of str), and other fields.

    An answer that is a JSON number becomes its decimal text.

    Args:
        file: plain or gzipped. limit: most rows to read.
        scores: name of a field that every row must have, with a number or null for each sample.
        need_answer: False also accepts rows without `answer`, or with null.
    Raises:
        ValueError: the file is empty, damaged or not UTF-8, or a line is not such a row; the message names the line and
            the field.
    """
    name = Path(file).name
    with open(file, "rb") as raw:
        packed = raw.read(2) == _GZIP
    rows: list[dict[str, Any]] = []
    number = 0
    try:
        with gzip.open(file) if packed else open(file, "rb") as stream:
            # utf-8-sig: some editors write a byte order mark
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1):
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_parse_row(line, f"{name}, line {number}", scores, need_answer))
    except UnicodeDecodeError as problem:
        raise ValueError(
            f"{name}, after line {number}: the text must be UTF-8, got other bytes ({problem.reason})"
        ) from problem
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise ValueError(
            f"{name}, after line {number}: the file must be complete gzip, got a damaged one ({problem})"
        ) from problem
    if not rows and limit != 0:
        raise ValueError(f"{name}: the file must have at least one row, got none")
    return rows


def write_rows(file: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one per line, gzipped if the name ends in .gz; the file appears whole or not at all."""
    with atomic_path(file) as partial, open(partial, "wb") as raw:
        with _gzip_stream(raw) if Path(file).suffix == ".gz" else raw as stream:
            for row in rows:
                stream.write((json.dumps(row) + "\n").encode("ascii"))


def _gzip_stream(raw: io.BufferedWriter) -> gzip.GzipFile:
    # mtime=0: the same rows give the same bytes
    return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)


def _parse_row(line: str, where: str, scores: str | None, need_answer: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{where}: a row must be JSON, got something else ({problem})") from problem
    check_row(row, where, scores, need_answer)
    return {**row, "answer": answer_text(row["answer"])} if "answer" in row else row


def check_row(row: Any, where: str, scores: str | None = None, need_answer: bool = True) -> None:
    """Raise ValueError, with a message that begins with `where`, unless `row` is one that `read_rows` accepts."""
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where}: a row must be an object with question, answer and generated_answer, got {type(row).__name__}"
        )
    if not isinstance(row.get("question"), str):
        raise ValueError(f"{where}: `question` must be a string, {_got(row, 'question')}")
    answer = row.get("answer")
    absent = answer is None and not need_answer
    if not absent and not isinstance(answer, str) and not _finite_number(answer):
        raise ValueError(f"{where}: `answer` must be a string or a finite number, {_got(row, 'answer')}")
    samples = row.get("generated_answer")
    if not isinstance(samples, list) or not all(isinstance(sample, str) for sample in samples):
        raise ValueError(f"{where}: `generated_answer` must be a list of strings, {_got(row, 'generated_answer')}")
    if scores is not None:
        _check_scores(row, scores, len(samples), where)


def _check_scores(row: Mapping[str, Any], field: str, count: int, where: str) -> None:
    values = row.get(field)
    if not isinstance(values, list) or len(values) != count:
        got = f"got {len(values)} values" if isinstance(values, list) else _got(row, field)
        raise ValueError(f"{where}: `{field}` must be a list of {count} numbers, one for each sample, {got}")
    for place, value in enumerate(values):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        if not missing and not _finite_number(value):
            raise ValueError(f"{where}: `{field}[{place}]` must be a finite number or null, got {value!r}")


def _finite_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) or isinstance(value, float) and math.isfinite(value)


def _got(row: Mapping[str, Any], field: str) -> str:
    """Describe the value of a field for an error message."""
    if field not in row:
        return "the field is missing"
    value = row[field]
    if isinstance(value, list):
        kinds = sorted({type(item).__name__ for item in value})
        return f"got a list of {', '.join(kinds) or 'nothing'}"
    return f"got {type(value).__name__}"
