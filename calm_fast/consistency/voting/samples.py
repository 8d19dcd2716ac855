"""Files of sampled rationales: questions with their samples, whatever tool wrote them."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calm_fast.consistency.answers.gold import answer_text
from calm_fast.consistency.voting.formats import NOT_TEXT, Fields, Sampled, group, is_native, read_record
from calm_fast.consistency.voting.records import read_records
from calm_fast.core.files import atomic_path


def read_rows(
    file: str | os.PathLike[str],
    limit: int | None = None,
    *,
    scores: str | None = None,
    need_answer: bool = True,
    fields: Fields | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of a file: question (str), answer (str), generated_answer (list of str), and other fields.

    An answer that is a JSON number becomes its decimal text. Rows of other tools are recognised by their content, and
    those with one sample each are grouped by question; see docs/consistency.md. A sample that is not text becomes an
    empty text, with one warning for the file.

    Args:
        file: JSON lines, a JSON array, parquet, arrow or a folder of a saved dataset; plain, gzip, bzip2, xz or zstd.
        limit: most questions to return.
        scores: name of a field that every row must have, with a number or null for each sample.
        need_answer: False also accepts rows without `answer`, or with null.
        fields: names of the fields where they are not recognised.
    Raises:
        ValueError: the file is empty, damaged or not UTF-8, or a line is not such a row; the message names the line and
            the field. ImportError: a package for the file's format is not installed.
    """
    name = Path(file).name
    fields = fields or Fields()
    not_text = 0
    rows: list[dict[str, Any]] = []
    if limit == 0:
        return rows
    for row, missing in _rows(file, fields, scores, need_answer):
        rows.append(row)
        not_text += missing
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise ValueError(f"{name}: the file must have at least one row, got none")
    if not_text:
        warnings.warn(f"{name}: {not_text} samples are not text and count as samples without an answer", stacklevel=2)
    return rows


def _rows(
    file: str | os.PathLike[str], fields: Fields, scores: str | None, need_answer: bool
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield checked rows and the number of their samples that are not text."""
    waiting: list[tuple[str, Sampled]] = []
    # a field of scores that the caller names is looked for in other tools' rows too
    wanted = fields if fields.scores or scores in (None, "scores") else replace(fields, scores=scores)
    for place, record in read_records(file):
        found = None if is_native(record) and not fields.any() else _other_row(record, wanted, place)
        if found is None:
            row, missing = _native(record)
            yield _checked(row, place, scores, need_answer), missing
        elif found.single:
            waiting.append((place, found))
        else:
            yield _checked(_as_row(found, scores), place, scores, need_answer), found.not_text
    for place, found in group(waiting):
        yield _checked(_as_row(found, scores), place, scores, need_answer), found.not_text


def _other_row(record: Any, fields: Fields, place: str) -> Sampled | None:
    if not isinstance(record, Mapping):
        return None
    try:
        found = read_record(record, fields)
    except RecursionError:
        raise ValueError(f"{place}: a row must be nested less deeply, got too many levels") from None
    if found is None and (fields.question or fields.samples):
        given = ", ".join(name for name in (fields.question, fields.samples) if name)
        raise ValueError(f"{place}: a row must have the fields {given} and a question, got {', '.join(record)}")
    return found


def _native(record: Any) -> tuple[Any, int]:
    """Return a row of our own form, with empty text for samples that are not text."""
    samples = record.get("generated_answer") if isinstance(record, Mapping) else None
    if not isinstance(samples, list) or all(isinstance(sample, str) for sample in samples):
        return record, 0
    texts = [answer_text(sample) if isinstance(sample, str) or _finite_number(sample) else None for sample in samples]
    missing = texts.count(None)
    return {**record, "generated_answer": [NOT_TEXT if text is None else text for text in texts]}, missing


def _as_row(found: Sampled, scores: str | None) -> dict[str, Any]:
    row = {"question": found.question, "answer": found.answer, "generated_answer": found.samples}
    return row if found.scores is None else {**row, scores or "scores": found.scores}


def _checked(row: Any, place: str, scores: str | None, need_answer: bool) -> dict[str, Any]:
    check_row(row, place, scores, need_answer)
    return {**row, "answer": answer_text(row["answer"])} if "answer" in row else dict(row)


def write_rows(file: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON, one per line, gzipped if the name ends in .gz; the file appears whole or not at all."""
    with atomic_path(file) as partial, open(partial, "wb") as raw:
        with _gzip_stream(raw) if Path(file).suffix == ".gz" else raw as stream:
            for row in rows:
                stream.write((json.dumps(row) + "\n").encode("ascii"))


def _gzip_stream(raw: io.BufferedWriter) -> gzip.GzipFile:
    # mtime=0: the same rows give the same bytes
    return gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)


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
