"""Derive facts from the rows: each case's verdict, its targets, and the scaling curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from calm_fast.benchmarks.measure import is_red
from calm_fast.benchmarks.registry import Case, Series, Target
from calm_fast.benchmarks.timing import Ceilings

Row = Mapping[str, Any]

WRONG, MISSED, MET, OPEN, ABSENT = "wrong", "missed", "met", "no target", "not measured"


def number(value: float | None, digits: int = 3) -> str:
    """Format with three significant digits and no exponent; "" for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def times(value: float | None) -> str:
    """Format as "1.34x", or "1/24x" where two decimals would hide the value; "" for None."""
    if value is None:
        return ""
    if 0 < value < 0.095:
        return f"1/{1 / value:.0f}x"
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


@dataclass(frozen=True)
class Goal:
    """A target and the measured factor by which `impl` beats `baseline`; None if one of them has no time."""

    target: Target
    found: float | None

    @property
    def state(self) -> str:
        if self.found is None:
            return ABSENT
        return MET if self.found >= self.target.least else MISSED

    @property
    def wanted(self) -> str:
        """The target in words: ">= 1.5x eager", "<= 1.2x the time of product", ">= 10x less memory than eager"."""
        t = self.target
        memory = t.quantity == "peak_bytes"
        against = "the best baseline" if t.baseline == "best" else t.baseline
        if t.least < 1:
            return f"<= {1 / t.least:.3g}x the {'memory' if memory else 'time'} of {against}"
        return f">= {t.least:.3g}x {'less memory than ' if memory else ''}{against}"

    @property
    def measured(self) -> str:
        """The measured value in the unit of `wanted`."""
        if self.found is None:
            return ABSENT
        return times(1 / self.found if self.target.least < 1 else self.found)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one case.

    rows: all its rows, including those without a time. yardsticks: names of the baselines that do less work.
    ours: the headline implementation's row, None without a time. rivals: the rows of the timed baselines that do the
    same work, the fastest first.
    """

    name: str
    op: str
    shape: str
    rows: Sequence[Row]
    yardsticks: frozenset[str]
    headline: str
    ours: Row | None
    rivals: Sequence[Row]
    goals: Sequence[Goal]
    series: Series | None

    @property
    def red(self) -> list[Row]:
        return [row for row in self.rows if is_red(row)]

    @property
    def state(self) -> str:
        if self.red:
            return WRONG
        states = {goal.state for goal in self.goals}
        if self.ours is None:
            return ABSENT
        return next((state for state in (MISSED, ABSENT, MET) if state in states), OPEN)

    @property
    def rival(self) -> Row | None:
        """The best baseline's row."""
        return self.rivals[0] if self.rivals else None

    @property
    def ratio(self) -> float | None:
        """The speedup over the best baseline."""
        return self.ratios[0][1] if self.ratios else None

    @property
    def ratios(self) -> list[tuple[str, float]]:
        """The speedup over each baseline, the best baseline first."""
        return [(row["impl"], row["ms"] / self.ours["ms"]) for row in self.rivals] if self.ours else []

    @property
    def above_floor(self) -> float | None:
        return self.ours["ms"] / self.ours["floor_ms"] if self.ours and self.ours["floor_ms"] else None

    @property
    def timed(self) -> list[Row]:
        return [row for row in self.rows if row["ms"] is not None]


@dataclass(frozen=True)
class Curve:
    """A scaling series: the measured points (size, row) of every implementation that has at least two."""

    series: Series
    lines: Mapping[str, Sequence[tuple[int, Row]]]
    headline: str
    largest: Verdict

    @property
    def wanted(self) -> str:
        """The target in words, e.g. "time <= augmenters^1"."""
        return f"time <= {self.series.size}^{self.series.power:g}"

    @property
    def found(self) -> str:
        """The measured power, e.g. "0.95"."""
        power = self.growth(self.headline)
        return "?" if power is None else f"{power:.2f}"

    @property
    def sizes(self) -> list[int]:
        return sorted({size for line in self.lines.values() for size, _ in line})

    @property
    def state(self) -> str:
        """MET if the power is at most 0.15 above the expected one: a fit through few points says no more."""
        power = self.growth(self.headline)
        return ABSENT if power is None else MET if power <= self.series.power + 0.15 else MISSED

    def growth(self, impl: str, quantity: str = "ms") -> float | None:
        """Return the power of the size that the quantity grows with, over the upper half of the sizes."""
        points = [(size, row[quantity]) for size, row in self.lines.get(impl, ()) if row[quantity]]
        if len(points) < 2:
            return None
        (x0, y0), (x1, y1) = points[-2 if len(points) < 4 else -3], points[-1]
        return math.log(y1 / y0) / math.log(x1 / x0)


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows grouped by case, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups


def ranked(rows: Iterable[Row], yardsticks: frozenset[str], quantity: str = "ms") -> list[Row]:
    """Return the rows of the timed baselines, the one that needs the least first."""
    rivals = [row for row in rows if row["ms"] is not None and not row["ours"] and row["impl"] not in yardsticks]
    return sorted(rivals, key=lambda row: row[quantity])


def best(rows: Iterable[Row], yardsticks: frozenset[str], quantity: str = "ms") -> Row | None:
    """Return the row of the baseline that needs the least, or None if none was timed."""
    return next(iter(ranked(rows, yardsticks, quantity)), None)


def ratio(
    rows: Sequence[Row], impl: str, baseline: str, quantity: str = "ms", yardsticks: frozenset[str] = frozenset()
) -> float | None:
    """Return the factor by which `impl` beats `baseline` within one case, or None if unknown."""
    values: dict[str, float] = {row["impl"]: row[quantity] for row in rows if row["ms"] is not None}
    if baseline == "best" and (rival := best(rows, yardsticks, quantity)) is not None:
        values["best"] = rival[quantity]
    if not values.get(impl) or not values.get(baseline):
        return None
    return values[baseline] / values[impl]


def sizes(shape: Mapping[str, int]) -> str:
    """Format a shape as "T 256, d 4096"."""
    return ", ".join(f"{name} {size}" for name, size in shape.items())


def verdict(case: Case | None, rows: Sequence[Row]) -> Verdict:
    """Return the verdict on one case. `case` is None for rows of a case that the registry no longer has."""
    yardsticks = frozenset(c.name for c in case.contestants if c.yardstick) if case else frozenset()
    first = case.headline if case else next((row["impl"] for row in rows if row["ours"]), "")
    shape, dtype = (case.shape, str(case.dtype)) if case else (rows[0]["shape"], rows[0]["dtype"])
    ours = next((row for row in rows if row["impl"] == first and row["ms"] is not None), None)
    goals = [Goal(t, ratio(rows, t.impl, t.baseline, t.quantity, yardsticks)) for t in (case.targets if case else ())]
    return Verdict(
        case.name if case else rows[0]["case"], case.op if case else rows[0]["op"],
        f"{sizes(shape)}, {dtype.removeprefix('torch.')}", rows, yardsticks, first, ours, ranked(rows, yardsticks),
        goals, case.series if case else None,
    )  # fmt: skip


def verdicts(rows: Iterable[Row], cases: Iterable[Case]) -> list[Verdict]:
    """Return one verdict per case in order, measured or not, then those of rows whose case is not in `cases`."""
    groups = by_case(rows)
    found = [verdict(case, groups.pop(case.name, [])) for case in cases]
    return found + [verdict(None, group) for group in groups.values()]


def curves(found: Iterable[Verdict]) -> list[Curve]:
    """Return the scaling series of which at least two points were measured."""
    groups: dict[Series, list[Verdict]] = {}
    for v in found:
        if v.series is not None:
            groups.setdefault(v.series, []).append(v)
    drawn = []
    for series, members in groups.items():
        lines: dict[str, list[tuple[int, Row]]] = {}
        for v in members:
            for row in v.timed:
                lines.setdefault(row["impl"], []).append((row["shape"][series.size], row))
        kept = {impl: sorted(line, key=lambda p: p[0]) for impl, line in lines.items() if len(line) > 1}
        if kept:
            largest = max(members, key=lambda v: max((row["shape"][series.size] for row in v.timed), default=-1))
            drawn.append(Curve(series, kept, largest.headline, largest))
    return drawn


def single(found: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts that are not points of a drawn curve, and those of points with wrong values."""
    drawn = {curve.series for curve in curves(found)}
    return [v for v in found if v.series not in drawn or v.red]


def summary(found: Sequence[Verdict]) -> dict[str, int]:
    """Return the counts for the head of the report: cases, targets by state (scaling included), wrong rows."""
    drawn = curves(found)
    states = [goal.state for v in found for goal in v.goals] + [curve.state for curve in drawn]
    points = sum(v.series in {curve.series for curve in drawn} for v in found)
    return {
        "cases": len(found),
        **({"of them on scaling curves": points} if points else {}),
        "targets met": states.count(MET),
        "missed": states.count(MISSED),
        "targets not measured": states.count(ABSENT),
        "wrong or broken": sum(len(v.red) for v in found),
    }


def setting_lines(rows: Sequence[Row], ceilings: Mapping[str, Ceilings]) -> list[tuple[str, str]]:
    """Return (name, value) of the hardware, the versions, the commit and the ceilings."""
    if not rows:
        return [("device", "nothing was measured")]
    first, last = rows[0], rows[-1]
    lines = [
        ("device", first["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in first["versions"].items())),
        ("commit", first["commit"] or "unknown (not a git checkout)"),
        ("measured", f"{first['date']} to {last['date']}"),
    ]
    for dtype, group in ceilings_by_dtype(rows, ceilings).items():
        product, copy = ([value / 1e9 for value in rates] for rates in zip(*map(_rates, group), strict=True))
        text = f"product {span(product)} GFLOP/s, copy {span(copy)} GB/s, measured beside each case"
        lines.append((f"ceilings, {dtype}", text))
    return lines


def ceilings_by_dtype(rows: Sequence[Row], ceilings: Mapping[str, Ceilings]) -> dict[str, list[Ceilings]]:
    """Return the ceilings of a run, grouped by the dtype of its cases."""
    dtypes = {row["case"]: row["dtype"] for row in rows}
    groups: dict[str, list[Ceilings]] = {}
    for name, c in ceilings.items():
        if name in dtypes:
            groups.setdefault(dtypes[name], []).append(c)
    return groups


def _rates(c: Ceilings) -> tuple[float, float]:
    return c.flops_per_s, c.bytes_per_s


def middle(group: Sequence[Ceilings]) -> Ceilings:
    """Return the median of each ceiling."""
    return Ceilings(median(c.flops_per_s for c in group), median(c.bytes_per_s for c in group))


def span(values: Sequence[float]) -> str:
    """Format a range as "98" or "98 - 104"."""
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} - {high}"
