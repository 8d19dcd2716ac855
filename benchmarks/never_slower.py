"""Sweep a few hundred shapes for a place where "auto" is slower than the best baseline: `--suite never-slower`.

Every shape is decided as cheaply as its result allows. A few calls of each contestant rule out the baselines that are
far behind. The others take turns with "auto" until the time of one shape is spent. Only a shape below LEAST is measured
again: on other inputs, for longer, and against its best baseline alone, so that the best of several equal times is not
taken for a faster one.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from calm_fast.benchmarks.measure import Say, Setting, correct_thunks
from calm_fast.benchmarks.registry import Case, Thunk
from calm_fast.benchmarks.timing import Budget, Times, interleave

SUITE = "never-slower"
LEAST = 0.97
AHEAD = 1.4  # a baseline that needs this many times our time after a few calls is out
_LOOK = Budget(seconds=0.05, min_rounds=3, max_rounds=15, warmup=1)
_DECIDE = Budget(seconds=0.25, min_rounds=5, max_rounds=100, warmup=0)
_CONFIRM = Budget(seconds=0.9, min_rounds=9, max_rounds=400, warmup=1)
_SAMPLE_MS = 1.0  # a sample holds as many calls as fit, so that reading the clock costs nothing beside it
SLOWEST_S = 3.0  # a shape whose products alone take a baseline longer than this is left out

Row = dict[str, Any]
Timing = Callable[[Mapping[str, Thunk], Budget], dict[str, Times]]


def cases(op: str) -> list[Case]:
    """Return the shapes of `op`, a key of the registry."""
    from calm_fast.benchmarks.cases import never_slower as shapes

    return shapes.cases(op)


@dataclass(frozen=True)
class Result:
    """One shape: the time of "auto", the best other contestant and its time over ours."""

    ms: float
    best: str | None
    best_ms: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.best_ms is None else self.best_ms / self.ms


def rivals(case: Case, times: Mapping[str, Times]) -> list[str]:
    """Return the contestants that may be faster than the headline: all that do the same work and are not far behind."""
    limit = AHEAD * times[case.headline].ms
    same = [c.name for c in case.contestants if not c.yardstick and c.name != case.headline]
    return [name for name in same if name in times and times[name].ms <= limit]


def result(case: Case, times: Mapping[str, Times]) -> Result:
    """Return the headline's time beside the fastest of the others that do the same work."""
    same = [c.name for c in case.contestants if not c.yardstick and c.name != case.headline and c.name in times]
    best = min(same, key=lambda name: times[name].ms, default=None)
    return Result(times[case.headline].ms, best, None if best is None else times[best].ms)


def repeated(thunk: Thunk, count: int) -> Callable[[], object]:
    """Return a thunk of `count` calls."""
    if count == 1:
        return thunk

    def calls() -> None:
        for _ in range(count):
            thunk()

    return calls


def timed(setting: Setting) -> Timing:
    """Return timing(thunks, budget): milliseconds of one call of each, in turns; short calls are timed several at once.

    All thunks of one timing repeat equally often, so that they find the caches in the same state.
    """

    def timing(thunks: Mapping[str, Thunk], budget: Budget) -> dict[str, Times]:
        look = interleave(thunks, setting.device, _LOOK, setting.cold)
        count = max(1, int(_SAMPLE_MS / max(1e-4, min(t.ms for t in look.values()))))
        if budget is _LOOK and count == 1:
            return look
        some = {name: repeated(thunk, count) for name, thunk in thunks.items()}
        found = interleave(some, setting.device, budget, setting.cold)
        return {n: Times(t.ms / count, t.p20 / count, t.p80 / count, t.rounds * count) for n, t in found.items()}

    return timing


def decide(case: Case, thunks: Mapping[str, Thunk], timing: Timing) -> Result:
    """Time `thunks` until the comparison is clear."""
    first = timing(thunks, _LOOK)
    close = rivals(case, first)
    if not close:
        return result(case, first)
    return result(case, timing({name: thunks[name] for name in (case.headline, *close)}, _DECIDE))


def sweep(case: Case, setting: Setting, say: Say, timing: Timing) -> Row:
    """Measure one shape. Return its row."""
    _, failures, thunks = correct_thunks(case, setting, say)
    if case.headline not in thunks:
        return row(case, setting, None, None, failures)
    say(f"{case.name}: timing {len(thunks)} contestants")
    found = decide(case, thunks, timing)
    again = None
    if found.ratio is not None and found.best is not None and found.ratio < LEAST:
        say(f"{case.name}: {found.ratio:.2f}x, measured again")
        pair = tuple(c for c in case.contestants if c.name in (case.headline, found.best))
        other = replace(setting, seed=setting.seed + 10)
        _, _, fresh = correct_thunks(replace(case, contestants=pair), other)
        again = result(case, timing(fresh, _CONFIRM)) if len(fresh) == 2 else None
    return row(case, setting, found, again, failures)


def row(case: Case, setting: Setting, found: Result | None, again: Result | None, failures: Mapping[str, str]) -> Row:
    """Return one line of never_slower.jsonl.

    ratio: the time of the best baseline over ours, below 1 where "auto" is slower. confirmed: the ratio of the second,
    longer measurement of a shape below LEAST, else None. failures: the contestants without a time, and why.
    """
    return {
        "op": case.op, "case": case.name, "device": setting.device_name, "lane": setting.lane,
        "dtype": str(case.dtype).removeprefix("torch."), "shape": dict(case.shape), "impl": case.headline,
        "ms": found and found.ms, "best": found and found.best, "best_ms": found and found.best_ms,
        "ratio": found and found.ratio, "confirmed": again and again.ratio, "failures": dict(failures),
        "versions": setting.versions, "commit": setting.commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }  # fmt: skip


def below(row: Row) -> bool:
    """Return True if "auto" is slower than LEAST allows, in the second measurement too."""
    return row["confirmed"] is not None and row["confirmed"] < LEAST


def is_red(row: Row) -> bool:
    """Return True if "auto" has no time: it broke or gave wrong values."""
    return row["ms"] is None


def affordable(cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """Split `cases` into those that the slowest plain product of their dtype can compute in time, and the others."""
    rates = {dtype: _product_rate(dtype) for dtype in {case.dtype for case in cases}}
    fits = [case for case in cases if case.flops <= SLOWEST_S * rates[case.dtype]]
    return fits, [case for case in cases if case not in fits]


def _product_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a small product in torch: bfloat16 is a hundred times slower without its instructions."""
    a, b = (torch.randn(256, 256).to(dtype) for _ in range(2))
    (t,) = interleave({"product": lambda: torch.mm(a, b)}, a.device, _LOOK).values()
    return 2 * 256**3 / (t.ms / 1e3)


def run(chosen: Sequence[Case], setting: Setting, out: Path) -> int:
    """Sweep `chosen` and write never_slower.jsonl into `out`. Return 1 if "auto" gave wrong values somewhere, else 0.

    Prints every shape below LEAST, which is a report and no failure.
    """
    out.mkdir(parents=True, exist_ok=True)
    fits, costly = affordable(chosen)
    rows, timing = [], timed(setting)
    with (out / "never_slower.jsonl").open("w") as sink:
        for number, case in enumerate(fits, 1):
            place = f"[{number}/{len(fits)}]"
            row = sweep(case, setting, partial(_progress, place), timing)
            rows.append(row)
            sink.write(json.dumps(row, allow_nan=False) + "\n")
            sink.flush()
            if below(row) or is_red(row):
                _progress("")
                print(line(row), flush=True)
    _progress("")
    print(summary(rows, costly))
    return 1 if any(map(is_red, rows)) else 0


def line(row: Row) -> str:
    """Return one shape in words."""
    if is_red(row):
        return f"RED   {row['case']}: {row['failures'].get(row['impl'], 'no time')}"
    ratios = f"{row['ratio']:.2f}x" + ("" if row["confirmed"] is None else f", then {row['confirmed']:.2f}x")
    return f"{ratios}  {row['op']} {row['case']}: {row['ms']:.3f} ms, {row['best']} {row['best_ms']:.3f} ms"


def summary(rows: Sequence[Row], costly: Sequence[Case]) -> str:
    """Return the closing lines: how many shapes are how far from their best baseline."""
    ratios = sorted(row["ratio"] if row["confirmed"] is None else row["confirmed"] for row in rows if row["ratio"])
    slower = sum(map(below, rows))
    lines = [f"{len(rows)} shapes, {slower} below {LEAST}"]
    if ratios:
        lines[0] += f"; ratios from {ratios[0]:.2f}x to {ratios[-1]:.2f}x, median {ratios[len(ratios) // 2]:.2f}x"
    if costly:
        names = ", ".join(case.name for case in costly)
        lines.append(f"{len(costly)} left out, which torch needs more than {SLOWEST_S:g} s a call for: {names}")
    return "\n".join(lines)


def _progress(place: str, text: str = "") -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{place} {text}", end="", file=sys.stderr, flush=True)
