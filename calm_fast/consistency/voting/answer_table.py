"""`calm-fast answers`: the answer of every sample, how it was found, and the text that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calm_fast.consistency.answers.extraction import find_answer
from calm_fast.consistency.answers.gold import gold_answer

_CONTEXT = 60  # characters of a text that are shown


def print_answers(rows: Sequence[Mapping[str, Any]], pattern: str | None, show: int, console: Console) -> None:
    """Print a table of the samples of the first rows, and how the answers of all of them were found.

    rows: as `read_rows` returns them. pattern: as in `extract_answer`. show: questions to show.
    """
    table = Table()
    for name in ("row", "sample", "answer", "found by", "text"):
        table.add_column(name, overflow="fold", no_wrap=name in ("row", "sample", "found by"))
    kinds: Counter[str] = Counter()
    for number, row in enumerate(rows):
        if number < show:
            gold = gold_answer(row.get("answer"), pattern)
            table.add_row(str(number), "gold", Text(gold or ""), "", Text(_end(str(row.get("answer") or ""))))
        for place, text in enumerate(row["generated_answer"]):
            found = find_answer(text, pattern)
            kinds["none" if found is None else found.kind] += 1
            if number < show:
                read = _end(text) if found is None else _one_line(text[found.start : found.end][:_CONTEXT])
                answer = "" if found is None else found.answer
                table.add_row(
                    str(number), str(place), Text(answer), "none" if found is None else found.kind, Text(read)
                )
    console.print(table)
    total = sum(kinds.values())
    console.print(f"{total} samples; found by: " + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common()))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _end(text: str) -> str:
    return _one_line(text[-_CONTEXT:])
