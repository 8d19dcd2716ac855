"""Decide by rules whether two answers are equal; what needs algebra is left to math-verify."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import cast

from calm_fast.consistency.answers.notation import to_latex, without_text_commands
from calm_fast.consistency.answers.plain import MAX_PLAIN_LENGTH, Plain, read_plain

# a decimal stands for a fraction that it cannot write exactly if it is as close as six digits are
CLOSE = Fraction(2, 10**6)
_LONGEST_LIST = 50
_LONGEST_FORMULA = 60
_CHEMICAL = re.compile(r"(?:\(?[A-Z][a-z]?\)?(?:\s*_\s*\{?\d{1,2}\}?|\d{1,2})?\s*){2,20}")
_BRACKETS = {("(", ")"): "tuple", ("[", "]"): "closed", ("\\{", "\\}"): "set", ("", ""): "list"}
_NO_MORE = frozenset({"date", "base", "dots", "words"})  # kinds that equal nothing of another kind


def decide(left: str, right: str) -> bool | None:
    """Return True or False where rules decide, None where algebra must."""
    a, b = read_plain(left), read_plain(right)
    if a is not None and b is not None:
        return _plain_verdict(a, b)
    if (a is not None and a.kind in _NO_MORE) or (b is not None and b.kind in _NO_MORE):
        return False  # math-verify reads words as products of variables, and dates as differences
    if (formula := _chemical(left)) is not None and formula == _chemical(right):
        return True
    return _list_verdict(left, right)


def _chemical(text: str) -> str | None:
    """Return a chemical formula with its numbers in the line: H2O for H_2O; None for other text."""
    text = to_latex(text) if len(text) <= _LONGEST_FORMULA else ""
    text = without_text_commands(text).strip().rstrip(".")
    return re.sub(r"[_{}\s]", "", text) if _CHEMICAL.fullmatch(text) else None


def _plain_verdict(a: Plain, b: Plain) -> bool | None:
    kinds = {a.kind, b.kind}
    if kinds == {"number"}:
        return _same_number(a, b)
    if kinds == {"time"}:
        return _same_time(a.value, b.value)
    if len(kinds) == 1:
        return a.value == b.value
    if kinds == {"base", "number"}:
        base, number = (a, b) if a.kind == "base" else (b, a)
        digits = cast(tuple[str, int], base.value)[0] or "0"
        # a number that does not say its base has the other one's: questions name it, answers often leave it out
        return number.rational is not None and digits.isdigit() and int(digits) == number.rational
    if kinds & _NO_MORE:
        return False
    if kinds == {"choice", "number"}:
        return None if "e" in (a.value, b.value) else False
    return None


def _same_number(a: Plain, b: Plain) -> bool:
    left, right = a.value, b.value
    assert isinstance(left, Fraction) and isinstance(right, Fraction)
    if a.name and b.name and a.name != b.name:
        return False
    if a.unit is not None and b.unit is not None:
        if a.unit[0] != b.unit[0]:
            return False
        left, right = left * a.unit[1], right * b.unit[1]
    if a.percent != b.percent:
        part, whole = (left, right) if a.percent else (right, left)
        return numbers_equal(part, whole, a.decimal, b.decimal) or numbers_equal(
            part / 100, whole, a.decimal, b.decimal
        )
    return numbers_equal(left, right, a.decimal, b.decimal)


def numbers_equal(left: Fraction, right: Fraction, left_decimal: bool = False, right_decimal: bool = False) -> bool:
    """Return True if two numbers are equal: exactly, or a decimal with six digits of a fraction without an end."""
    if left == right:
        return True
    if left_decimal == right_decimal or _ends(right if left_decimal else left):
        return False
    return abs(left - right) <= CLOSE * max(abs(left), abs(right))


@lru_cache(maxsize=4096)
def _ends(value: Fraction) -> bool:
    """Return True if a decimal can write `value` exactly."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1


def _same_time(left: object, right: object) -> bool:
    *a, a_known = cast(tuple[int, ...], left)
    *b, b_known = cast(tuple[int, ...], right)
    if a_known and b_known or a == b:
        return a == b
    return [a[0] % 12, *a[1:]] == [b[0] % 12, *b[1:]]


# ---- lists, tuples and sets -----------------------------------------------------------------------------------------


def _list_verdict(left: str, right: str) -> bool | None:
    """Compare lists, tuples and sets of plain answers; None if an element, or a single expression, needs algebra."""
    if max(len(left), len(right)) > MAX_PLAIN_LENGTH:
        return None
    (kind_a, a), (kind_b, b) = _elements(left), _elements(right)
    if len(a) < 2 and len(b) < 2:
        return None
    kinds = {kind_a, kind_b}
    if kinds == {"tuple", "set"} and max(len(a), len(b)) > 1:
        return False
    if "mixed" in kinds or "closed" in kinds or max(len(a), len(b)) > _LONGEST_LIST or not (a and b):
        return None
    if "tuple" in kinds:
        if len(a) != len(b):
            return None if min(len(a), len(b)) < 2 else False
        verdicts = [decide(x, y) for x, y in zip(a, b, strict=True)]
        return False if False in verdicts else None if None in verdicts and kinds == {"tuple"} else _all(verdicts)
    matches = [[_element_verdict(x, y) for y in b] for x in a]
    if any(None in row for row in matches):
        return None
    return all(any(row) for row in matches) and all(any(column) for column in zip(*matches, strict=True))


def _all(verdicts: list[bool | None]) -> bool | None:
    return None if None in verdicts else all(verdicts)


def _element_verdict(left: str, right: str) -> bool | None:
    if _squeezed(left) == _squeezed(right):
        return True
    return decide(left, right)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@lru_cache(maxsize=65536)
def _elements(answer: str) -> tuple[str, tuple[str, ...]]:
    """Return the kind of brackets around an answer and what its commas, semicolons, "and"s and "or"s separate."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|:|!)(?![a-zA-Z])", "", to_latex(answer)).strip()
    text = text[:-1] if text.endswith(".") and not text.endswith("..") else text
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{\s*(?:,\s*)?(and|or)\s*\}", r" \1 ", text)
    kind, inside = "list", text
    for (start, end), name in _BRACKETS.items():
        if start and text.startswith(start) and text.endswith(end) and _encloses(text, len(start)):
            kind, inside = name, text[len(start) : len(text) - len(end)]
    if kind == "list" and re.match(r"[\[(]", text) and re.search(r"[\])]$", text) and _encloses(text, 1):
        kind = "mixed"  # a half-open interval
    if re.fullmatch(r"[+-]?[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?", inside.strip()):
        return kind, (inside.strip(),)
    return kind, tuple(part for part in _split(inside) if part)


def _encloses(text: str, start: int) -> bool:
    """Return True if the bracket of `start` characters is closed by the one at the end."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and start <= place < len(text) - 1:
            return False
    return True


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    separator = re.compile(r"[,;]\s*(?:(?:and|or)\b)?|\s(?:and|or)\s")
    place = 0
    while place < len(text):
        character = text[place]
        depth += (character in "([{") - (character in ")]}")
        match = separator.match(text, place) if depth == 0 else None
        if match is not None:
            parts.append(text[start:place].strip())
            place = start = match.end()
            continue
        place += 1
    return [*parts, text[start:].strip()]
