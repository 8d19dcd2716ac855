"""The gold answer of a row."""

from __future__ import annotations

from decimal import Decimal

from calm_fast.consistency.answers.extraction import extract_answer


def answer_text(answer: str | int | float | None) -> str | None:
    """Return the text of a row's `answer`; a number in decimal notation, without an exponent."""
    if answer is None or isinstance(answer, str):
        return answer
    return format(Decimal(str(answer)), "f")


def gold_answer(answer: str | int | float | None, pattern: str | None = None) -> str | None:
    """Return the gold answer of a row's `answer`: the final answer of a solution, or the text itself.

    Args:
        answer: a solution, or the gold answer alone. pattern: last resort of `extract_answer`.
    Returns:
        None where `answer` is None or blank.
    """
    text = answer_text(answer)
    if text is None or not text.strip():
        return None
    return extract_answer(text, pattern) or text
