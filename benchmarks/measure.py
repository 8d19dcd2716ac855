"""Measure one case: prepare every contestant, check it against float64, then time the correct ones."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from calm_fast.benchmarks import memory
from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant, Inputs, Thunk, Values
from calm_fast.benchmarks.timing import Budget, Ceilings, Timer, Times, ceiling_work, interleave, peak_bytes

Say = Callable[[str], None]
T = TypeVar("T")

ROW_FIELDS = (
    "op", "case", "impl", "device", "dtype", "shape", "ms", "p20", "p80", "peak_bytes", "flops", "bytes", "floor_ms",
    "error", "versions", "commit", "date", "ours", "bound", "failure", "rounds", "lane", "ceiling",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Properties that all rows of a run share."""

    device: torch.device
    device_name: str
    versions: dict[str, str]
    commit: str | None
    budget: Budget
    seed: int = 0
    cold: bool | None = None  # overwrite the caches before each call; None: only on a GPU
    lane: str | None = None  # the widest SIMD instructions of the run; None on a GPU

    def budget_of(self, case: Case) -> Budget:
        """Return the case's share of the time budget."""
        return replace(self.budget, seconds=self.budget.seconds * case.share)


def relative_error(actual: Values, truth: Values) -> float:
    """Return the largest |actual - truth| / |truth| (Frobenius) over the named values; inf for NaN or a missing one."""
    worst = 0.0
    for name, expected in truth.items():
        if name not in actual or actual[name].shape != expected.shape:
            return math.inf
        difference = torch.linalg.vector_norm(actual[name].double() - expected.double())
        size = torch.linalg.vector_norm(expected.double())
        error = float(difference / size) if size > 0 else (0.0 if difference == 0 else math.inf)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def error_bound(eager_error: float, dtype: torch.dtype, roundings: int = 1) -> float:
    """Return twice the plain computation's error in the same dtype on the same inputs, plus `roundings`."""
    return 2 * eager_error + roundings * torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Verdict:
    """A contestant's error against float64 and its bound."""

    error: float
    bound: float


def _judge(case: Case, contestant: Contestant, inputs: Inputs, known: dict[Any, tuple[Values, float]]) -> Verdict:
    """Compare a contestant with its definition. `known` caches each definition's truth and bound."""
    definition = contestant.definition or case.definition
    if definition not in known:
        wide = _on_cpu(definition(inputs, torch.float64))
        plain = _on_cpu(definition(inputs, case.dtype))
        known[definition] = wide, error_bound(relative_error(plain, wide), case.dtype, case.roundings)
    truth, bound = known[definition]
    return Verdict(relative_error(_on_cpu(contestant.prepare(inputs)()), truth), bound)


def _on_cpu(values: Values) -> Values:
    return {name: t.cpu() for name, t in values.items()}


@dataclass(frozen=True)
class Ready:
    """A case ready to be timed: the thunks of the correct contestants, and the reasons why the others have none."""

    verdicts: dict[str, Verdict]
    failures: dict[str, str]
    thunks: dict[str, Thunk]
    peaks: dict[str, int]
    slow: dict[str, float]  # contestants that get one more call at most, and the milliseconds of the one they had


def ready(case: Case, setting: Setting, say: Say = lambda _: None) -> Ready:
    """Check every contestant against float64, then prepare the correct ones and measure their peak memory."""
    budget, python = setting.budget_of(case), {c.name for c in case.contestants if c.python}
    timer = Timer(setting.device, setting.cold)
    ms: dict[str, float] = {}
    peaks: dict[str, int] = {}

    def call(name: str, thunk: Thunk) -> bool:
        def traced() -> None:
            peaks[name] = peak_bytes(thunk, setting.device, name in python)

        # tracemalloc slows Python down, so a contestant in Python is timed without it
        compiled = _compilations()
        ms[name] = timer(thunk if name in python else traced)
        # a second call, for the first one also fills caches and compiles; but not of a hopelessly slow contestant
        compiled = _compilations() - compiled
        if name in python or compiled or not budget.is_slow(ms[name], min(ms.values())):
            took = timer(traced)
            ms[name] = ms[name] if name in python else took
        return True

    verdicts, failures, thunks = correct_thunks(case, setting, say, call)
    memory.reserve(2 * max(peaks.values(), default=0))
    fastest = min((ms[name] for name in thunks), default=0.0)
    slow = {name: ms[name] for name in thunks if name != case.headline and budget.is_slow(ms[name], fastest)}
    return Ready(verdicts, failures, thunks, {name: peaks[name] for name in thunks}, slow)


def correct_thunks(
    case: Case,
    setting: Setting,
    say: Say = lambda _: None,
    call: Callable[[str, Thunk], object] = lambda _, thunk: thunk(),
) -> tuple[dict[str, Verdict], dict[str, str], dict[str, Thunk]]:
    """Check every contestant against float64, prepare the correct ones and run them once by `call`.

    Returns:
        the verdicts on the contestants that ran, the reasons why others have no thunk, and the thunks.
    """
    verdicts, failures = _check_all(case, setting, say)
    thunks: dict[str, Thunk] = {}
    _forget_compiled()
    inputs = case.make(setting.seed)
    for contestant in case.contestants:
        name = contestant.name
        if name in failures:
            continue
        v = verdicts[name]
        if not v.error <= v.bound:
            failures[name] = f"wrong: error {v.error:.3g} against float64 exceeds the bound {v.bound:.3g}"
            continue
        say(f"{case.name}: preparing {name}")
        thunk = _attempt(partial(contestant.prepare, inputs), name, failures)
        if thunk is not None and _attempt(partial(call, name, thunk), name, failures) is not None:
            thunks[name] = thunk
    return verdicts, failures, thunks


def measure(case: Case, setting: Setting, say: Say = lambda _: None) -> tuple[list[dict[str, Any]], Ceilings]:
    """Return one row per contestant, in the order of `case`, and the ceilings measured beside them.

    A contestant whose values are wrong, or that cannot run, has no time: `ms`, `p20` and `p80` are None and `failure`
    gives the reason. A failing implementation of this package makes the run red; see `is_red`.
    """
    prepared = ready(case, setting, say)
    say(f"{case.name}: timing {len(prepared.thunks)} contestants in turns")
    plain = ceiling_work(setting.device, case.dtype)
    thunks = {**prepared.thunks, **plain.thunks}
    times = interleave(thunks, setting.device, setting.budget_of(case), setting.cold, case.headline, prepared.slow)
    ceilings = plain.ceilings(times)
    rows = [row(case, setting, c, prepared, times.get(c.name), ceilings) for c in case.contestants]
    return rows, ceilings


def row(
    case: Case, setting: Setting, contestant: Contestant, prepared: Ready, t: Times | None, ceilings: Ceilings
) -> dict[str, Any]:
    """Return one row of results.jsonl."""
    name = contestant.name
    v = prepared.verdicts.get(name, Verdict(math.inf, math.inf))
    values = {
        "op": case.op, "case": case.name, "impl": name, "device": setting.device_name,
        "dtype": str(case.dtype).removeprefix("torch."), "shape": dict(case.shape),
        "ms": t and t.ms, "p20": t and t.p20, "p80": t and t.p80, "peak_bytes": prepared.peaks.get(name),
        "flops": case.flops, "bytes": case.bytes, "floor_ms": ceilings.floor_ms(case.flops, case.bytes),
        "error": v.error if math.isfinite(v.error) else None, "versions": setting.versions,
        "commit": setting.commit, "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
        "ours": contestant.ours, "bound": v.bound if math.isfinite(v.bound) else None,
        "failure": prepared.failures.get(name), "rounds": t.rounds if t else 0,
        "lane": setting.lane, "ceiling": asdict(ceilings),
    }  # fmt: skip
    assert tuple(values) == ROW_FIELDS
    return values


def _compilations() -> int:
    """Return the number of frames that torch.compile has compiled in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return sum(dynamo.counters["frames"].values()) if dynamo else 0


def _forget_compiled() -> None:
    """Reset torch.compile, as in a program that runs one case.

    Otherwise a second shape gets slower dynamic-shape code, and the ninth closure of one function runs uncompiled.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _check_all(case: Case, setting: Setting, say: Say) -> tuple[dict[str, Verdict], dict[str, str]]:
    """Return the verdicts on the contestants that ran, and the reasons why the others did not."""
    _forget_compiled()
    inputs = (case.check_make or case.make)(setting.seed + 1)
    verdicts: dict[str, Verdict] = {}
    failures: dict[str, str] = {}
    known: dict[Any, tuple[Values, float]] = {}
    for contestant in case.contestants:
        say(f"{case.name}: checking {contestant.name} against float64")
        verdict = _attempt(partial(_judge, case, contestant, inputs, known), contestant.name, failures)
        if verdict is not None:
            verdicts[contestant.name] = verdict
    return verdicts, failures


def _attempt(work: Callable[[], T], name: str, failures: dict[str, str]) -> T | None:
    """Return work(), or None with the reason in `failures`: a contestant that breaks must not stop the others."""
    try:
        return work()
    except CannotRunError as reason:
        failures[name] = f"cannot run: {reason}"
    except Exception as failure:  # noqa: BLE001 - a baseline or a compiler may raise anything
        text = " ".join(str(failure).split())
        failures[name] = f"failed: {type(failure).__name__}: {text[:300]}"
    return None


def is_red(row: Mapping[str, Any]) -> bool:
    """Return True if the row fails the run: wrong values from any contestant, or a crash of one of ours.

    A baseline that cannot run, or runs out of memory, is reported in its row and does not fail the run.
    """
    failure = row["failure"]
    if failure is None or failure.startswith("cannot run"):
        return False
    return bool(row["ours"] or failure.startswith("wrong"))
