"""The final answer of a rationale, and when two answers are the same."""

from __future__ import annotations

import re
import threading
from fractions import Fraction
from functools import lru_cache

_STATED = re.compile(r"[Tt]he answer is:?\s*(.+?)\s*(?:\.\s|\.?$)", re.DOTALL | re.MULTILINE)
_FRACTION = re.compile(r"(-?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
_PLAIN_RATIO = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
_DECORATION = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|\s)|\$|\s")


def extract_answer(text: str, pattern: str | None = None) -> str | None:
    """The final answer stated in `text`: the last balanced \\boxed{...}, else what follows the last "The answer is".

    Args:
        pattern: a regular expression tried last; its first group, or the whole match, is the answer.
    Returns:
        the answer without surrounding space, or None where there is none.
    Boxed first: the other order picks up units in about 2 % of real rationales.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    stated = _STATED.findall(text)
    if stated and stated[-1]:
        return stated[-1].strip()
    if pattern is not None and (match := re.search(pattern, text)) is not None:
        return (match.group(1) if match.re.groups else match.group(0)).strip()
    return None


def _last_boxed(text: str) -> str | None:
    """Contents of the last \\boxed{...} (or \\fbox) whose braces balance."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            if text[end] in "{}" and text[end - 1] != "\\":
                depth += 1 if text[end] == "{" else -1
            if depth == 0:
                return text[start:end].strip() or None
    return None


def equivalent(answer: str | None, gold: str | None, *, timeout: int = 5) -> bool:
    """Whether two answers mean the same: equal strings, equal exact rationals, else math-verify in both directions.

    Args:
        timeout: seconds for each parse or comparison of math-verify. It uses SIGALRM, which only the main thread of a
            process can: in another thread an answer that math-verify has to look at raises RuntimeError.
    Returns:
        False where either is None (no answer equals nothing, not even no answer) or cannot be understood.
    """
    if answer is None or gold is None:
        return False
    left, right = normalise(answer), normalise(gold)
    if left == right:
        return left != ""
    exact = _rational(left), _rational(right)
    if None not in exact:
        return exact[0] == exact[1]
    return _verified(answer, gold, timeout)


def normalise(answer: str) -> str:
    """`answer` without decoration that carries no meaning; for comparing strings, not for parsing."""
    plain = _DECORATION.sub("", answer).rstrip(".")
    return re.sub(r"\\[dt]frac", r"\\frac", plain)


def _rational(plain: str) -> Fraction | None:
    """The exact value of an integer, decimal, a/b or \\frac{a}{b}; thousands separators count as nothing."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", plain)
    if (match := _FRACTION.fullmatch(text)) is not None:
        sign, numerator, denominator = match.groups()
        return None if int(denominator) == 0 else Fraction(int(sign + "1") * int(numerator), int(denominator))
    if _PLAIN_RATIO.fullmatch(text) is None:
        return None
    whole, _, below = text.partition("/")
    return Fraction(whole) / Fraction(below or 1) if Fraction(below or 1) else None


@lru_cache(maxsize=65536)
def _parsed(answer: str, timeout: int) -> tuple:
    from math_verify import parse

    return tuple(parse(f"\\boxed{{{answer}}}", parsing_timeout=timeout))


@lru_cache(maxsize=65536)
def _verified(answer: str, gold: str, timeout: int) -> bool:
    from math_verify import verify

    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("equivalent: math-verify's time-outs work in a process's main thread only; use processes")
    left, right = list(_parsed(answer, timeout)), list(_parsed(gold, timeout))
    if not left or not right:
        return False
    # verify is not symmetric: its first argument is the gold answer
    return bool(verify(right, left, timeout_seconds=timeout) or verify(left, right, timeout_seconds=timeout))
