"""What must hold for any text, pair of answers and file; the fuzz tests share it."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

from calm_fast.consistency import extract_answer, read_rows
from calm_fast.consistency.answers.equality import normalise, quick_verdict
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.voting.formats import Fields

SLOW = 2.0  # CPU seconds for one text or file, a thousand times what one takes


def timed(call: Any, *arguments: Any) -> Any:
    start = time.process_time()
    result = call(*arguments)
    assert time.process_time() - start < SLOW, arguments
    return result


def check_text(text: str) -> None:
    answer = timed(extract_answer, text)
    assert answer is None or (answer == answer.strip() and answer.strip("\"'`*_ .,;:!?-()[]{}$\\#<>/|~")), answer
    assert extract_answer(text) == answer
    gold = timed(gold_answer, text)
    assert (gold is None) is (not text.strip())
    assert answer is None or gold == answer


def check_pair(left: str, right: str) -> None:
    assert isinstance(timed(normalise, left), str)
    assert timed(quick_verdict, left, right) is quick_verdict(right, left)


def check_file(content: bytes, folder: Path, fields: Fields | None = None) -> bool:
    """Return whether the file has rows; else it must be one line of error."""
    (folder / "rows.json").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rows = timed(lambda: read_rows(folder / "rows.json", need_answer=False, fields=fields))
        except ValueError as problem:
            assert str(problem).startswith("rows.json") and "\n" not in str(problem).strip(), problem
            return False
    assert rows and all(isinstance(row["question"], str) for row in rows)
    assert all(isinstance(text, str) for row in rows for text in row["generated_answer"])
    json.dumps(rows)
    return True
