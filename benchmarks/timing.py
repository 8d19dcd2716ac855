"""Measure interleaved times, peak memory, and the machine's two ceilings.

The contestants of a case take turns, one call each, in a new random order every round. Drift of a shared machine
(clock, memory traffic of other programs) and the caches left by the previous call then affect all of them alike, so
ratios of their medians hold even where absolute times do not.
"""

from __future__ import annotations

import os
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

_FLUSH_BYTES = 256 << 20  # larger than a GPU's L2 and than one core's part of a CPU's L3
_CEILING_SIZES = {"cuda": (8192, 1 << 30), "cpu": (1024, 1 << 24)}  # width of the product, elements of the copy
_UNDISTURBED_S = 2e-4  # reading the queue takes 10 to 30 us; a reading that loses its core takes 1 ms or more
_READINGS = 20
_CEILING, _COPY = "ceiling: ", "ceiling: copy"
_HOPELESS = 2.0  # a product that takes so many times the fastest one's time in its first call sets no ceiling


@dataclass(frozen=True)
class Budget:
    """The timing budget: rounds until `seconds` are spent, at least `min_rounds`, at most `max_rounds`.

    If that gave fewer than `enough` rounds, contestants within `close` times the headline's median continue until they
    have `enough`, for at most `seconds` more; see `interleave`.
    """

    seconds: float = 10.0
    min_rounds: int = 5
    max_rounds: int = 200
    warmup: int = 1
    enough: int = 15
    close: float = 1.5
    slow: float = 8.0
    clear: float = 3.0

    def is_slow(self, ms: float, fastest: float) -> bool:
        """Return True for a contestant that is `slow` times slower than the fastest and alone would spend the budget.

        Its ratio is clear after one call or two. If its rounds alone would spend five budgets, `clear` times suffice:
        a CPU without 16-bit products needs 15 s for a call of N1's baselines.
        """
        spent = self.min_rounds * ms / 1e3
        return spent > self.seconds and ms > (self.clear if spent > 5 * self.seconds else self.slow) * fastest


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contestant: median, 20th and 80th percentile, and the number of calls."""

    ms: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Ceilings:
    """The rates this machine reaches on plain work in the same run: FLOP/s of a product, bytes/s of a copy.

    product: the fastest product measured, e.g. "torch float32".
    """

    flops_per_s: float
    bytes_per_s: float
    product: str = ""

    def floor_ms(self, flops: int, moved: int) -> float:
        """Return the time that no version of the work can beat by much: the larger of arithmetic and data movement."""
        return 1e3 * max(flops / self.flops_per_s, moved / self.bytes_per_s)


def summarise(samples: list[float]) -> Times:
    """Return the median and quantiles (nearest rank) of one contestant's milliseconds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def _queued_ns() -> int | None:
    """Return the nanoseconds this thread spent ready to run but waiting for a core; None if the system does not say."""
    try:
        with open("/proc/thread-self/schedstat") as stat:
            return int(stat.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _queue_reading() -> tuple[float, int | None, float]:
    """Read the queue's counter undisturbed: (time before, nanoseconds queued, time after).

    If the thread loses its core during the reading, it is unclear on which side of the reading that wait falls, so the
    reading is repeated.
    """
    for _ in range(_READINGS):
        before = time.perf_counter()
        queued = _queued_ns()
        after = time.perf_counter()
        if after - before < _UNDISTURBED_S:
            break
    return before, queued, after


def _call_cpu(thunk: Callable[[], object]) -> float:
    """Return the milliseconds of one call, minus the time its thread waited for a core held by other programs.

    With several threads only the calling thread's queue is known, so nothing is subtracted.
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
    """Times one call. CUDA work is timed by events after a synchronisation, launch gaps included.

    cold: overwrite the caches before each call, as a layer in a model finds them; None: only on a GPU.
    """

    def __init__(self, device: torch.device, cold: bool | None = None) -> None:
        self.cuda = device.type == "cuda"
        wanted = self.cuda if cold is None else cold
        self.flush = torch.zeros(_FLUSH_BYTES, dtype=torch.int8, device=device) if wanted else None

    def __call__(self, thunk: Callable[[], object]) -> float:
        """Return the milliseconds of thunk()."""
        if self.flush is not None:
            self.flush.add_(1)  # read and write: a plain fill may bypass a CPU's caches
        return _call_cuda(thunk) if self.cuda else _call_cpu(thunk)


def _undecided(samples: Mapping[str, list[float]], headline: str | None, close: float) -> list[str]:
    """Return the thunks within `close` times the headline's median, and the ceilings; none without a headline."""
    if headline is None or headline not in samples:
        return []
    medians = {name: statistics.median(values) for name, values in samples.items()}
    low, high = medians[headline] / close, medians[headline] * close
    return [name for name, ms in medians.items() if low <= ms <= high or name.startswith(_CEILING)]


def interleave(
    thunks: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: Budget,
    cold: bool | None = None,
    headline: str | None = None,
    slow: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Times]:
    """Time every thunk, in turns.

    With a headline, a second phase follows if slow contestants left time for only a few rounds. The headline, those
    close to it and the two ceilings continue to take turns. The ratios of those further off are clear already.

    Args:
        thunks: name -> callable without arguments; compiled and checked already.
        device: where they run. budget: for how long. cold: see `Timer`.
        headline: the thunk that the others are compared with. If None or not among `thunks`, there is only one phase.
        slow: names of thunks that need most of the budget for a few calls, and the milliseconds of a call each has had.
            That call counts, and one more is made if the budget allows it.
    """
    timer = Timer(device, cold)
    names = [name for name in thunks if name not in slow]
    samples = {name: [slow[name]] if name in slow else [] for name in thunks}
    order = random.Random(0)  # in a fixed order each would always follow the same predecessor

    def take_turns(names: list[str]) -> None:
        order.shuffle(names)
        for name in names:
            samples[name].append(timer(thunks[name]))

    for name in names:
        for _ in range(budget.warmup):
            thunks[name]()
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
    for name, ms in slow.items():
        if ms <= 1e3 * budget.seconds:
            samples[name].append(timer(thunks[name]))
    return {name: summarise(values) for name, values in samples.items()}


def peak_bytes(thunk: Callable[[], object], device: torch.device, python: bool = False) -> int:
    """Return the most memory one call held at once, beyond its inputs and parameters.

    CUDA: torch's allocator statistics. CPU: the running sum of the allocations and releases of torch's CPU allocator,
    from its profiler; scratch memory that a math library takes directly from the system is not seen.
    python: add the peak of numpy arrays and Python objects, from tracemalloc.
    """
    if python:
        traced: list[int] = []

        def traced_call() -> None:
            found = thunk()  # kept alive while the peak is read
            traced.append(tracemalloc.get_traced_memory()[1])
            del found

        tracemalloc.start()
        try:
            tensors = peak_bytes(traced_call, device)
        finally:
            tracemalloc.stop()
        return tensors + traced[0]
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        thunk()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silence the profiler library's own messages on stderr
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        thunk()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):  # a stable sort: ties keep their recorded order
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@dataclass(frozen=True)
class CeilingWork:
    """Large square products and a large copy, on random data: the plain work that sets the ceilings.

    They take turns with a case's contestants, so that floor and contestants are measured under the same conditions.
    """

    thunks: Mapping[str, Callable[[], object]]
    flops: int
    bytes: int

    def ceilings(self, times: Mapping[str, Times]) -> Ceilings:
        """Return the ceilings from the times that `interleave` measured for `thunks`."""
        products = {name: times[name].ms / 1e3 for name in self.thunks if name != _COPY}
        best = min(products, key=products.__getitem__)
        return Ceilings(self.flops / products[best], self.bytes / (times[_COPY].ms / 1e3), best.removeprefix(_CEILING))


def ceiling_work(device: torch.device, dtype: torch.dtype) -> CeilingWork:
    """Return the ceiling work for `device` and `dtype`; its sizes exceed a core's caches.

    The ceiling is the machine's, not that of one library in one dtype: torch multiplies bfloat16 at a few GFLOP/s on a
    CPU without instructions for it. So torch's product in the dtype, in float32 where that holds the dtype's numbers,
    and our own packed product compete; those that are out of the race after one call are left out.
    """
    size, elements = _CEILING_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    products = [_torch_product(a, b, dtype)]
    if device.type == "cpu" and dtype.itemsize <= 4:
        products += [_torch_product(a, b, torch.float32)] * (dtype != torch.float32) + _packed_product(a, b)
    timer = Timer(device, cold=False)
    first: dict[str, float] = {}
    for name, product in reversed(products):  # float32 first: a hopeless product runs once
        first[name] = timer(product)
        if first[name] <= 2 * _HOPELESS * min(first.values()):
            first[name] = min(first[name], timer(product))  # the first call also sets up the library's threads
    kept = {f"{_CEILING}{n}": p for n, p in products if first[n] <= _HOPELESS * min(first.values())}
    return CeilingWork({**kept, _COPY: lambda: target.copy_(source)}, 2 * size**3, 2 * source.nbytes)


def _torch_product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[str, Callable[[], object]]:
    left, right = a.to(dtype), b.to(dtype)
    out = torch.empty_like(left)
    return f"torch {str(dtype).removeprefix('torch.')}", lambda: torch.mm(left, right, out=out)


def _packed_product(a: torch.Tensor, b: torch.Tensor) -> list[tuple[str, Callable[[], object]]]:
    """Return our product of float32 with a packed weight, or nothing where nothing is packed."""
    try:
        from calm_fast._ops.packed_linear.api import Packed, linear, pack
    except ImportError:  # an older revision of `--compare`
        return []
    weight = pack(b)
    return [("packed float32", lambda: linear(a, weight))] if isinstance(weight, Packed) else []
