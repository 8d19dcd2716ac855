"""Extract the final answer of a rationale, and tell whether two answers are equal."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

# longer answers are compared as text: they are rationales or loops, and parsing one takes minutes
MAX_MATH_LENGTH = 1000
_STATED = re.compile(r"\bthe (?:(?:final|correct) )?answer is\b:?", re.IGNORECASE)
_STATED_END = re.compile(r"\.\s|\.?$", re.MULTILINE)
_STATED_LENGTH = 10_000
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TOKEN = re.compile(rf"(?P<box>{_BOX.pattern})|\\.|[{{}}]", re.DOTALL)
_WRAPPED = tuple(
    re.compile(rf"{start}((?:(?!{end}).)*){end}", re.DOTALL)
    for start, end in ((r"\*\*", r"\*\*"), (r"\$\$", r"\$\$"), (r"\$", r"\$"), (r"\\\(", r"\\\)"), (r"\\\[", r"\\\]"))
)

_INVISIBLE = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\\?\$")
_SPACE = re.compile(r"\\[,;: ]|~|\\(?=\n)")
_FREE_SPACE = re.compile(r"(?<=\w)\s+(?=\w)|(\s+)")
_SHORT_FRACTION = re.compile(r"\\frac(?:([0-9])|(\{[^{}]*\}))(?:([0-9])|(\{[^{}]*\}))")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_NUMBER = re.compile(r"([+-]?)([0-9]*)\\frac\{(-?[0-9]+)\}\{(-?[0-9]+)\}")
_PLAIN_RATIO = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?")


def extract_answer(text: str, pattern: str | re.Pattern[str] | None = None) -> str | None:
    """Return the final answer of `text`: the last balanced \\boxed{...}, else the text after the last "The answer is".

    Args:
        text: a rationale. pattern: a regular expression that is tried last; the answer is the first group of its last
            match, or the whole match without a group.
    Returns:
        the answer without surrounding space, or None.
    Raises:
        TypeError: `text` is not a string. ValueError: `pattern` is not a regular expression.
    The box comes first because the other order picks up units in about 2 % of real rationales.
    """
    if not isinstance(text, str):
        raise TypeError(f"extract_answer: `text` must be a string, got {type(text).__name__}")
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if (stated := _last_stated(text)) is not None:
        return stated
    return None if pattern is None else _last_match(text, pattern)


def _last_boxed(text: str) -> str | None:
    """Return the contents of the last \\boxed{...} or \\fbox{...} whose braces balance, in one pass over any text."""
    if (first := _BOX.search(text)) is None:
        return None
    opened: list[tuple[bool, int]] = []
    best = (-1, -1)
    for token in _TOKEN.finditer(text, first.start()):
        word = token.group()
        if token["box"] or word == "{":
            opened.append((token["box"] is not None, token.end()))
        elif word == "}" and opened:
            boxed, start = opened.pop()
            if boxed and start > best[0]:
                best = (start, token.start())
    return text[best[0] : best[1]].strip() or None if best[0] >= 0 else None


def _last_stated(text: str) -> str | None:
    """Return the text after the last "The answer is", up to the end of its sentence or line."""
    for stated in reversed(list(_STATED.finditer(text))):
        rest = text[stated.end() : stated.end() + _STATED_LENGTH].lstrip()
        end = _STATED_END.search(rest)
        if (answer := _unwrap(rest[: end.start()] if end else rest)) is not None:
            return answer
    return None


def _unwrap(answer: str) -> str | None:
    """Return `answer` without the **bold** or mathematics marks around all of it; None if nothing is left."""
    answer = answer.strip()
    for wrapped in _WRAPPED:
        if (match := wrapped.fullmatch(answer)) is not None:
            answer = match.group(1).strip().rstrip(".")
    return answer or None


def _last_match(text: str, pattern: str | re.Pattern[str]) -> str | None:
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as problem:
        raise ValueError(
            f"extract_answer: `pattern` must be a regular expression, got {pattern!r}: {problem}"
        ) from problem
    *_, last = [None, *compiled.finditer(text)]
    found = None if last is None else last.group(1) if compiled.groups else last.group()
    return (found or "").strip() or None


def equivalent(answer: str | None, gold: str | None, *, timeout: int = 5) -> bool:
    """Return True if two answers are equal: equal strings, equal exact rationals, else by math-verify either way round.

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
    exact_left, exact_right = rational(left), rational(right)
    if exact_left is not None and exact_right is not None:
        if exact_left == exact_right or far_apart(exact_left, exact_right):
            return exact_left == exact_right
    if max(len(left), len(right)) > MAX_MATH_LENGTH:
        return False
    return _verify_cached(answer, gold, timeout)


def normalise(answer: str) -> str:
    """Return `answer` without decoration that carries no meaning, to compare it as a string, not to parse it.

    A space between two letters or digits stays: "1 1/2" is not "11/2".
    """
    plain = _SPACE.sub(" ", _INVISIBLE.sub("", answer)).replace("{,}", ",")
    plain = _FREE_SPACE.sub(lambda space: "" if space.group(1) else " ", plain.strip())
    plain = plain[:-1] if plain.endswith(".") and not plain.endswith("..") else plain
    plain = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", plain)
    return _SHORT_FRACTION.sub(_add_braces, plain)


def _add_braces(match: re.Match[str]) -> str:
    above, below = match.group(1) or match.group(2)[1:-1], match.group(3) or match.group(4)[1:-1]
    return f"\\frac{{{above}}}{{{below}}}"


def rational(plain: str) -> Fraction | None:
    """Return the exact value of a normalised integer, decimal, a/b, \\frac{a}{b} or mixed number; None for other text.

    Percentages are left to math-verify, where 50% equals both 50 and 1/2. So is all text that is not plain ASCII.
    """
    if len(plain) > MAX_MATH_LENGTH:
        return None
    text = plain.replace(",", "") if _THOUSANDS.fullmatch(plain) else plain
    if (match := _NUMBER.fullmatch(text)) is not None:
        sign, whole, above, below = match.groups()
        if int(below) == 0 or (whole and (above + below).count("-")):
            return None
        value = int(whole or 0) + Fraction(int(above), int(below))
        return -value if sign == "-" else value
    if _PLAIN_RATIO.fullmatch(text) is None:
        return None
    whole, _, below = text.partition("/")
    return Fraction(whole) / Fraction(below or 1) if Fraction(below or 1) else None


def far_apart(left: Fraction, right: Fraction) -> bool:
    """Return True if two numbers differ by more than math-verify's rounding to 6 decimals can tolerate."""
    try:
        if _tolerance(float(left), float(right)) * 1.01 < abs(float(left) - float(right)):
            return True  # exact arithmetic costs twenty times as much
    except OverflowError:
        pass
    return abs(left - right) > _tolerance(left, right)


def _tolerance(left: Any, right: Any) -> Any:
    scale = Fraction if isinstance(left, Fraction) else float
    return scale(2e-6) + max(abs(left), abs(right)) * scale(1e-9)


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

    answer = answer.strip()
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
