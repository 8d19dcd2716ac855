"""Tell whether two answers are equal."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from calm_fast.consistency.answers.notation import to_latex
from calm_fast.consistency.answers.plain import MAX_PLAIN_LENGTH, read_plain
from calm_fast.consistency.answers.verdicts import decide

# longer answers are compared as text: they are rationales or loops, and parsing one takes minutes
MAX_MATH_LENGTH = MAX_PLAIN_LENGTH
_INVISIBLE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\\?\$")
_SPACE = re.compile(r"\\[,;: ]|~|\\(?=\n)")
_FREE_SPACE = re.compile(r"(?<=\w)\s+(?=\w)|(?<=\d,) (?=\d{3}(?!\d))|(\s+)")
_LIST_COMMA = re.compile(r"(?<=\d),\s+(?=\d{3}(?!\d))")
_SHORT_FRACTION = re.compile(r"\\frac(?:([0-9])|(\{[^{}]*\}))(?:([0-9])|(\{[^{}]*\}))")


def equivalent(answer: str | None, gold: str | None, *, timeout: int = 5) -> bool:
    """Return True if two answers are equal: equal strings, by the rules of `verdicts`, else by math-verify.

    For many answers use `group_answers`, which runs in parallel and cannot hang.

    Args:
        timeout: seconds for each parse or comparison of math-verify, which uses SIGALRM.
    Returns:
        False if either is None (a missing answer equals nothing) or cannot be parsed.
    Raises:
        RuntimeError: math-verify is needed outside the main thread, where there is no SIGALRM.
    """
    if answer is None or gold is None:
        return False
    left, right = normalise(answer), normalise(gold)
    if left == right:
        return left != ""
    verdict = quick_verdict(answer, gold)
    return _verify_cached(answer, gold, timeout) if verdict is None else verdict


def quick_verdict(left: str, right: str) -> bool | None:
    """Return True or False where no algebra is needed to compare two answers of different normalised strings."""
    if max(len(left), len(right)) > MAX_MATH_LENGTH:
        return False
    return decide(left, right)


def normalise(answer: str) -> str:
    """Return `answer` without decoration that carries no meaning, to compare it as a string, not to parse it.

    A space between two letters or digits stays, "1 1/2" is not "11/2", and so does one after the comma in "1, 234".
    """
    if len(answer) > MAX_MATH_LENGTH:
        return "".join(answer.split())
    plain = _SPACE.sub(" ", _INVISIBLE.sub("", to_latex(answer))).replace("{,}", ",")
    plain = _LIST_COMMA.sub(", ", plain)
    plain = _FREE_SPACE.sub(lambda space: "" if space.group(1) else " ", plain.strip())
    plain = plain[:-1] if plain.endswith(".") and not plain.endswith("..") else plain
    plain = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", plain)
    return _SHORT_FRACTION.sub(_add_braces, plain)


def _add_braces(match: re.Match[str]) -> str:
    above, below = match.group(1) or match.group(2)[1:-1], match.group(3) or match.group(4)[1:-1]
    return f"\\frac{{{above}}}{{{below}}}"


def rational(answer: str) -> Fraction | None:
    """Return the exact value of an answer that is a number and nothing else; None for other text."""
    plain = read_plain(answer)
    return None if plain is None else plain.rational


def is_decimal(answer: str) -> bool:
    """Return True if an answer is a number with a decimal point, which may be rounded."""
    plain = read_plain(answer)
    return plain is not None and plain.decimal


def first_match_classes(count: int, same: Callable[[int, int], bool]) -> list[int]:
    """Return the class of each of `count` answers: the first class whose first member is equal, else a new one."""
    classes: list[int] = []
    heads: list[int] = []
    for answer in range(count):
        matching = (number for number, head in enumerate(heads) if same(head, answer))
        number = next(matching, len(heads))
        if number == len(heads):
            heads.append(answer)
        classes.append(number)
    return classes


@lru_cache(maxsize=65536)
def _parse_cached(answer: str, timeout: int | None) -> tuple[Any, ...]:
    return tuple(parse_math(answer, timeout))


def parse_math(answer: str, timeout: int | None) -> list[Any]:
    """Return math-verify's reading of `answer`: [] or [expression, string]."""
    from math_verify import parse

    answer = to_latex(answer)
    # a full stop ends the sentence, not the number; with it math-verify reads nothing
    answer = answer[:-1] if answer.endswith(".") and not answer.endswith("..") else answer
    return list(parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout))


def verify_both(left: list[Any], right: list[Any], timeout: int | None) -> bool:
    """Compare by math-verify in both directions: it is not symmetric, its first argument is the gold answer."""
    from math_verify import verify

    if not left or not right:
        return False
    return bool(verify(left, right, timeout_seconds=timeout) or verify(right, left, timeout_seconds=timeout))


@lru_cache(maxsize=65536)
def _verify_cached(answer: str, gold: str, timeout: int) -> bool:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "equivalent: `answer` must be compared in the main thread, where math-verify's time-outs work, got another "
            "thread; use group_answers"
        )
    return verify_both(list(_parse_cached(gold, timeout)), list(_parse_cached(answer, timeout)), timeout)
