"""The child process of `math_pool`: decides by math-verify which answers are equal.

Each line of standard input is a JSON object: the answers of a question, the known verdicts, a time limit. Each line of
standard output is a JSON list: a step that begins, so that the parent knows which step killed a process, or a verdict.

A step that takes longer than the limit kills the process: the kernel's timer counts its CPU seconds, and SIGPROF keeps
its default action. An exception would reach neither C code (powers of large integers) nor code under sympy's
`except Exception`, and would leave the process in an unknown state.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TextIO
from zlib import crc32

from calm_fast.consistency.answers.equality import (
    first_match_classes,
    is_decimal,
    parse_math,
    quick_verdict,
    rational,
    verify_both,
)

MEMORY_LIMIT = 4 << 30
VALUE_SECONDS = 1.0
_REMEMBERED = 50_000

_DIGITS, _EXACT = 40, 1e-30  # of exact expressions, and how far apart equal ones may be


@dataclass(frozen=True)
class Values:
    """An expression's (real, imaginary) parts as sympy numbers at two points.

    exact: it has no decimals. constant: it has no symbols.
    """

    at: list[tuple[Any, Any]]
    exact: bool
    constant: bool


class Judge:
    """Compares answers by math-verify; each answer is read and evaluated once.

    tell: writes an event for the parent.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell
        self._read: dict[str, list[Any]] = {}
        self._values: dict[str, Values | None] = {}

    def judge(self, task: dict[str, Any]) -> None:
        """Tell the verdict of every unknown pair that `first_match_classes` asks for."""
        texts, limit = task["texts"], task["timeout"]
        known = {(i, j): verdict for i, j, verdict in task["known"]}
        unreadable, no_value = set(task["unreadable"]), set(task["no_value"])
        exact = [rational(text) for text in texts]
        if len(self._read) > _REMEMBERED:
            self._read.clear()
            self._values.clear()

        def read(i: int) -> list[Any]:
            if texts[i] not in self._read:
                with self.step("read", i, limit=limit):
                    self._read[texts[i]] = parse_math(texts[i], None)
            return self._read[texts[i]]

        def value(i: int) -> Values | None:
            if i in no_value:
                return None
            if texts[i] not in self._values:
                parsed = [] if exact[i] is not None else read(i)
                with self.step("value", i, limit=min(limit, VALUE_SECONDS)):
                    self._values[texts[i]] = numeric_value(exact[i], parsed, is_decimal(texts[i]))
            return self._values[texts[i]]

        def compare(i: int, j: int) -> bool | None:
            if i in unreadable or j in unreadable:
                return None
            left_values, right_values = value(i), value(j)
            if left_values is not None and right_values is not None:
                verdict = compare_values(left_values, right_values)
                if verdict is not None:
                    return verdict
            left, right = read(i), read(j)
            with self.step("pair", i, j, limit=limit):
                return verify_both(left, right, None)

        def same(i: int, j: int) -> bool:
            if (i, j) not in known:
                verdict = quick_verdict(texts[i], texts[j])
                if verdict is None:
                    verdict = compare(i, j)
                    self.tell("verdict", i, j, verdict)
                known[i, j] = verdict
            return bool(known[i, j])

        first_match_classes(len(texts), same)

    @contextmanager
    def step(self, name: str, *answers: int, limit: float) -> Iterator[None]:
        """Announce a step, which kills this process if it takes more than `limit` CPU seconds."""
        self.tell(name, *answers)
        if hasattr(signal, "setitimer"):  # without it the parent's clock sets the limit
            signal.setitimer(signal.ITIMER_PROF, max(limit, 1e-3))  # 0 would disarm it
        try:
            yield
        finally:
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_PROF, 0)


def numeric_value(exact: Fraction | None, parsed: list[Any], decimal: bool = False) -> Values | None:
    """Return the value of an expression at each of two points of its free symbols.

    i is the imaginary unit, which math-verify reads as a variable.
    exact: the value of an answer that is a number. parsed: math-verify's reading of another. decimal: the number was
    written with a decimal point.
    An expression that is not a finite number there has no value: None. Percentages have none (math-verify takes 50% for
    50 and for 1/2), nor have sums and integrals, whose numeric evaluation is neither quick nor reliable, nor single
    symbols, which math-verify compares by name.
    """
    import sympy

    if exact is not None:
        value = sympy.Rational(exact.numerator, exact.denominator).evalf(_DIGITS)
        return Values([(value, sympy.Integer(0))] * 2, exact=not decimal, constant=True)
    expression = parsed[0] if parsed else None
    unreliable = (sympy.UnevaluatedExpr, sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)
    try:
        if not isinstance(expression, sympy.Expr) or expression.has(*unreliable):
            return None
        if expression.is_Symbol and expression.name != "i":
            return None
        imaginary = {s: sympy.I for s in expression.free_symbols if s.name == "i"}
        expression = expression.subs(imaginary) if imaginary else expression
        symbols = expression.free_symbols
        is_exact = not expression.has(sympy.Float)
        digits = _DIGITS if is_exact else 17
        points = [{s: sympy.Rational(1000 + crc32(s.name.encode()) % p, p) for s in symbols} for p in (7919, 10007)]
        values = [expression.evalf(digits, subs=at, strict=True).as_real_imag() for at in points[: 2 if symbols else 1]]
    except Exception:  # sympy raises all kinds of errors; without a value math-verify decides
        return None
    finite = all(part.is_Number and part.is_finite for parts in values for part in parts)
    return Values(values * (1 if symbols else 2), is_exact, not symbols) if finite else None


def compare_values(left: Values, right: Values) -> bool | None:
    """Return False if two expressions differ at some point, True if they are equal constants, else None.

    Exact expressions are compared to 40 digits. Where one is rounded, values differ if they are further apart than its
    rounding to 6 digits, relative to their size, and than math-verify's to 6 decimals.
    """
    both_exact = left.exact and right.exact
    for (a, b), (c, d) in zip(left.at, right.at, strict=True):
        apart, size = abs(a - c) + abs(b - d), max(abs(a) + abs(b), abs(c) + abs(d))
        if both_exact and apart > _EXACT * size:
            return False
        if not both_exact and (apart > 2e-6 * size or apart > 4e-6 + 2e-9 * size):
            return False
    return True if both_exact and left.constant and right.constant else None


def serve(tasks: TextIO, results: TextIO) -> None:
    """Answer every task of `tasks`; a line ["done"] ends each answer."""

    def tell(*event: Any) -> None:
        results.write(json.dumps(event) + "\n")
        results.flush()

    try:
        import math_verify  # noqa: F401
    except Exception as problem:
        tell("failed", f"{type(problem).__name__}: {problem}")
        return
    tell("ready")
    judge = Judge(tell)
    for line in tasks:
        judge.judge(json.loads(line))
        tell("done")


def main() -> None:
    """Serve on standard input and output until the parent closes them."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # parsers print, and the pipe is for results only
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and ends this process
    if hasattr(signal, "SIGPROF"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)  # math-verify logs that its own timer is off
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or hard > MEMORY_LIMIT:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, hard))
    except (ImportError, OSError, ValueError):
        pass  # not available on this system; the time limit remains
    serve(sys.stdin, results)
