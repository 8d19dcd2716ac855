"""Measuring: interleaved times, peak memory, and the machine's two ceilings.

Contestants of a case take turns, one call each, in a new random order every round: drift of a shared machine (clock,
memory traffic of others) hits all of them alike, and so do the caches that a predecessor leaves behind, so ratios of
their medians hold although absolute times may not.
"""

from __future__ import annotations

import os
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # larger than a GPU's L2 and than the part of a CPU's L3 that one core fills
_CEILING_SIZES = {"cuda": (8192, 1 << 30), "cpu": (1536, 1 << 24)}  # width of the product, elements of the copy
_UNDISTURBED_S = 2e-4  # a reading of the queue takes 10 to 30 us; one that lost its core, a time slice of 1 ms or more
_READINGS = 20
_PRODUCT, _COPY = "ceiling: product", "ceiling: copy"


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds until `seconds` are spent, at least `min_rounds`, at most `max_rounds`.

    Where that gave fewer than `enough` rounds, whoever is within `close` times the headline's median goes on until it
    has `enough`, for `seconds` more at most; see `interleave`.
    """

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 200
    warmup: int = 1
    enough: int = 15
    close: float = 1.5


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contestant: median, 20th and 80th percentile, and over how many calls."""

    ms: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches on plain work, measured in the same run: FLOP/s of a product, bytes/s of a copy."""

    flops_per_s: float
    bytes_per_s: float

    def floor_ms(self, flops: int, moved: int) -> float:
        """The time no version of the work can beat by much: the larger of arithmetic and data movement."""
        return 1e3 * max(flops / self.flops_per_s, moved / self.bytes_per_s)


def summarise(samples: list[float]) -> Times:
    """Median and quantiles (nearest rank) of one contestant's milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def _queued_ns() -> int | None:
    """Nanoseconds this thread has been ready to run while others had the core; None where the system does not say."""
    try:
        with open("/proc/thread-self/schedstat") as stat:
            return int(stat.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _queue_reading() -> tuple[float, int | None, float]:
    """Read the queue's counter undisturbed: (time before, nanoseconds queued, time after).

    A thread that loses its core inside the reading leaves it open which side of the reading that wait belongs to, so
    such a reading is repeated.
    """
    for _ in range(_READINGS):
        before = time.perf_counter()
        queued = _queued_ns()
        after = time.perf_counter()
        if after - before < _UNDISTURBED_S:
            break
    return before, queued, after


def _call_cpu(thunk: Callable[[], object]) -> float:
    """Milliseconds of one call, less the time its thread stood in the scheduler's queue because of other programs.

    With several threads only the calling thread's queue is known, so nothing is taken off.
    """
    if torch.get_num_threads() != 1:
        begin = time.perf_counter()
        thunk()
        return 1e3 * (time.perf_counter() - begin)
    _, queued_before, begin = _queue_reading()
    thunk()
    end, queued_after, _ = _queue_reading()
    took = end - begin
    queued = 0.0 if queued_before is None or queued_after is None else (queued_after - queued_before) / 1e9
    return 1e3 * (took - queued if queued < took else took)


def _call_cuda(thunk: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    thunk()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class Timer:
    """One call, timed: CUDA work with events around it after a synchronisation, launch gaps included.

    cold: overwrite the caches before each call (a layer in a model finds them full of other data); None: on a GPU.
    """

    def __init__(self, device: torch.device, cold: bool | None = None) -> None:
        self.cuda = device.type == "cuda"
        wanted = self.cuda if cold is None else cold
        self.flush = torch.zeros(_FLUSH_BYTES, dtype=torch.int8, device=device) if wanted else None

    def __call__(self, thunk: Callable[[], object]) -> float:
        """Milliseconds of thunk()."""
        if self.flush is not None:
            self.flush.add_(1)  # read and written: a plain fill may go past a CPU's caches
        return _call_cuda(thunk) if self.cuda else _call_cpu(thunk)


def _undecided(samples: Mapping[str, list[float]], headline: str | None, close: float) -> list[str]:
    """Those whose median is within `close` times the headline's, and the ceilings; nobody without a headline."""
    if headline not in samples:
        return []
    medians = {name: statistics.median(values) for name, values in samples.items()}
    low, high = medians[headline] / close, medians[headline] * close
    return [name for name, ms in medians.items() if low <= ms <= high or name in (_PRODUCT, _COPY)]


def interleave(
    thunks: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: Budget,
    cold: bool | None = None,
    headline: str | None = None,
) -> dict[str, Times]:
    """Time every thunk, in turns.

    With a headline, a second phase follows where slow contestants left time for few rounds only: those close to the
    headline, itself and the two ceilings take turns on, while those far off, whose ratio is clear, keep what they have.

    Args:
        thunks: name -> callable without arguments; compiled and checked already.
        device: where they run. budget: how long. cold: see `Timer`.
        headline: the thunk that the others are compared with; None, or not among `thunks`: there is one phase only.
    """
    timer = Timer(device, cold)
    names, samples = list(thunks), {name: [] for name in thunks}
    shuffled = random.Random(0)  # in a fixed circle everybody would always follow the same one

    def take_turns(names: list[str]) -> None:
        shuffled.shuffle(names)
        for name in names:
            samples[name].append(timer(thunks[name]))

    for thunk in thunks.values():
        for _ in range(budget.warmup):
            thunk()
    begin, done = time.perf_counter(), 0
    while names and done < budget.max_rounds:
        if done >= budget.min_rounds and time.perf_counter() - begin > budget.seconds:
            break
        take_turns(names)
        done += 1
    most = min(budget.enough, budget.max_rounds)
    if 0 < done < most and (names := _undecided(samples, headline, budget.close)):
        begin = time.perf_counter()
        while done < most and time.perf_counter() - begin < budget.seconds:
            take_turns(names)
            done += 1
    return {name: summarise(values) for name, values in samples.items()}


def peak_bytes(thunk: Callable[[], object], device: torch.device, python: bool = False) -> int:
    """Most memory one call held at once beyond what was held before it (inputs and parameters do not count).

    CUDA: torch's allocator statistics. CPU: the running sum of every allocation and release of torch's CPU allocator,
    from its profiler; scratch memory that a math library takes from the system by itself is not seen. python: also
    the most that numpy arrays and Python objects held, from tracemalloc.
    """
    if python:
        held = []
        tracemalloc.start()
        try:
            tensors = peak_bytes(lambda: (thunk(), held.append(tracemalloc.get_traced_memory()[1])), device)
        finally:
            tracemalloc.stop()
        return tensors + held[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        thunk()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler library reports its own start and stop on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        thunk()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):  # stable: ties keep the order they were recorded in
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class CeilingWork:
    """A large square product in `dtype` and a large copy, on random data: what the machine reaches on plain work.

    They are timed in turns with a case's contestants, so that a floor knows the same conditions as what stands on it.
    """

    thunks: Mapping[str, Callable[[], object]]
    flops: int
    bytes: int

    def ceilings(self, times: Mapping[str, Times]) -> Ceilings:
        """From what `interleave` found for `thunks`."""
        product, copy = (times[name].ms / 1e3 for name in (_PRODUCT, _COPY))
        return Ceilings(self.flops / product, self.bytes / copy)


def ceiling_work(device: torch.device, dtype: torch.dtype) -> CeilingWork:
    """Buffers and thunks; sizes beyond any cache."""
    size, elements = _CEILING_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    thunks = {_PRODUCT: lambda: torch.mm(a, b, out=out), _COPY: lambda: target.copy_(source)}
    return CeilingWork(thunks, 2 * size**3, 2 * source.nbytes)
