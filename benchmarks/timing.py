"""Measuring: interleaved times, peak memory, and the machine's two ceilings.

Contestants of a case take turns, one call each, in an order that rotates every round: drift of a shared machine
(clock, other load) hits all of them alike, so ratios of their medians hold although absolute times may not.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # larger than any L2


@dataclass(frozen=True)
class Budget:
    """How long to measure: rounds until `seconds` are spent, at least `min_rounds`, at most `max_rounds`."""

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 200
    warmup: int = 1


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


def _call_cpu(thunk: Callable[[], object]) -> float:
    begin = time.perf_counter()
    thunk()
    return 1e3 * (time.perf_counter() - begin)


def _call_cuda(thunk: Callable[[], object], flush: torch.Tensor | None) -> float:
    if flush is not None:
        flush.zero_()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    thunk()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleave(
    thunks: Mapping[str, Callable[[], object]], device: torch.device, budget: Budget, cold: bool = True
) -> dict[str, Times]:
    """Time every thunk, in turns.

    Args:
        thunks: name -> callable without arguments; compiled and checked already.
        device: CUDA work is timed with events around the call, after a synchronisation, launch gaps included.
        budget: how long.
        cold: on a GPU, overwrite the L2 cache before each call (a layer in a model finds it full of other data).
    """
    cuda = device.type == "cuda"
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if cuda and cold else None
    names, samples = list(thunks), {name: [] for name in thunks}
    for thunk in thunks.values():
        for _ in range(budget.warmup):
            thunk()
    begin, done = time.perf_counter(), 0
    while names and done < budget.max_rounds:
        if done >= budget.min_rounds and time.perf_counter() - begin > budget.seconds:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            thunk = thunks[name]
            samples[name].append(_call_cuda(thunk, flush) if cuda else _call_cpu(thunk))
        done += 1
    return {name: summarise(values) for name, values in samples.items()}


def peak_bytes(thunk: Callable[[], object], device: torch.device) -> int:
    """Most memory one call held at once beyond what was held before it (inputs and parameters do not count).

    CUDA: torch's allocator statistics. CPU: the running sum of every allocation and release of torch's CPU allocator,
    from its profiler; scratch memory that a math library takes from the system by itself is not seen.
    """
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


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> Ceilings:
    """A large copy (bytes read plus written) and a large square product in `dtype`, on random data."""
    cuda = device.type == "cuda"
    size, elements = (8192, 1 << 30) if cuda else (1536, 1 << 24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    work = {"matmul": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    best = interleave(work, device, Budget(seconds, min_rounds=5, max_rounds=50), cold=False)
    # the 20th percentile: a ceiling is what the machine can do, not what it does while others disturb it
    return Ceilings(2 * size**3 / (best["matmul"].p20 / 1e3), 2 * source.nbytes / (best["copy"].p20 / 1e3))
