"""The parts of every number: quantiles, turns, floors, peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import types

import pytest
import torch

from calm_fast.benchmarks import timing
from calm_fast.benchmarks.timing import Budget, Ceilings, ceiling_work, interleave, peak_bytes, summarise

CPU = torch.device("cpu")
PRODUCT = f"{timing._CEILING}torch float32"


def test_summarise_gives_median_and_quantiles():
    t = summarise([5.0, 1.0, 4.0, 2.0, 3.0, 100.0])
    assert (t.ms, t.p20, t.p80, t.rounds) == (3.5, 2.0, 5.0, 6)
    one = summarise([7.0])
    assert (one.ms, one.p20, one.p80, one.rounds) == (7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("flops", "moved", "expected"),
    [(2_000_000_000, 0, 2.0), (0, 3_000_000, 30.0), (2_000_000_000, 3_000_000, 30.0), (0, 0, 0.0)],
)
def test_floor_is_the_larger_of_arithmetic_and_movement(flops, moved, expected):
    assert Ceilings(flops_per_s=1e12, bytes_per_s=1e8).floor_ms(flops, moved) == pytest.approx(expected)


def test_interleave_takes_turns_in_an_order_that_changes():
    calls = []
    thunks = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleave(thunks, CPU, Budget(seconds=0.0, min_rounds=12, max_rounds=20, warmup=2))
    assert calls[:6] == list("aabbcc")
    rounds = ["".join(calls[begin : begin + 3]) for begin in range(6, len(calls), 3)]
    assert len(rounds) == 12 and {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len({turn[0] for turn in rounds}) == 3, "everybody begins a round now and then"
    followers = {(first, then) for turn in rounds for first, then in zip(turn, turn[1:], strict=False)}
    assert len(followers) == 6, "everybody follows everybody"
    assert {t.rounds for t in times.values()} == {12}


def test_interleave_ends_after_the_last_round():
    times = interleave({"a": lambda: None}, CPU, Budget(seconds=100.0, min_rounds=1, max_rounds=3))
    assert times["a"].rounds == 3


@pytest.fixture
def turns(monkeypatch):
    """Return turns(ms, budget, headline), which runs `interleave` on a fake clock that each call advances by its `ms`.

    It returns the times, the names in the order of their calls and the seconds passed. ms: a number, or one per call.
    """

    def run(ms, budget, headline, slow=None):
        clock, calls = [0.0], []

        def timer(thunk):
            name = thunk()
            calls.append(name)
            took = ms[name][calls.count(name) - 1] if isinstance(ms[name], list) else ms[name]
            clock[0] += took / 1e3
            return took

        monkeypatch.setattr(timing, "Timer", lambda device, cold: timer)
        monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
        times = interleave(
            {name: (lambda name=name: name) for name in ms}, CPU, budget, headline=headline, slow=slow or {}
        )
        return times, calls, clock[0]

    return run


SLOW = {
    **{"ours": 100.0, "a bit faster": 70.0, "a bit slower": 145.0, "faster": 60.0, "slower": 160.0, "slow": 4000.0},
    **{PRODUCT: 1.0, timing._COPY: 900.0},
}


def test_close_contestants_and_ceilings_go_on_and_those_far_off_stop(turns):
    times, calls, _ = turns(SLOW, Budget(seconds=20.0, warmup=0), "ours")
    on = {"ours", "a bit faster", "a bit slower", PRODUCT, timing._COPY}
    assert {name: t.rounds for name, t in times.items()} == {name: 15 if name in on else 5 for name in SLOW}
    later = calls[5 * len(SLOW) :]
    rounds = [later[begin : begin + len(on)] for begin in range(0, len(later), len(on))]
    assert len(rounds) == 10 and all(set(turn) == on for turn in rounds)
    assert len({turn[0] for turn in rounds}) > 1 and len({tuple(turn) for turn in rounds}) > 5, "newly shuffled"


def test_samples_of_both_phases_count(turns):
    times, _, _ = turns({"ours": [100.0] * 5 + [120.0] * 10, "slow": 4000.0}, Budget(seconds=20.0, warmup=0), "ours")
    assert (times["ours"].ms, times["ours"].p20, times["slow"].ms) == (120.0, 100.0, 4000.0)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 5), (1.0, 8), (1.1, 8), (1.3, 9), (100.0, 15)])
def test_going_on_takes_the_budget_once_more_at_most(turns, seconds, expected):
    # the first phase takes at least 5 rounds; a round of the second takes 0.4 s, and the last may overrun
    slow = {"ours": 200.0, "other": 200.0, "slow": 25_000.0}
    times, _, passed = turns(slow, Budget(seconds, warmup=0), "ours")
    assert {name: t.rounds for name, t in times.items()} == {"ours": expected, "other": expected, "slow": 5}
    assert passed - 5 * 25.4 < seconds + 0.4


def test_going_on_ends_at_the_most_rounds(turns):
    times, _, _ = turns(SLOW, Budget(seconds=20.0, max_rounds=7, warmup=0), "ours")
    assert times["ours"].rounds == 7 and times["slow"].rounds == 5


def test_enough_and_close_are_the_budgets(turns):
    times, _, _ = turns(SLOW, Budget(seconds=20.0, warmup=0, enough=9, close=2.0), "ours")
    assert {name for name, t in times.items() if t.rounds == 9} == set(SLOW) - {"slow"} and times["slow"].rounds == 5


@pytest.mark.parametrize("headline", [None, "broke before it was timed"])
def test_no_second_phase_without_a_headline(turns, headline):
    times, _, _ = turns(SLOW, Budget(seconds=20.0, warmup=0), headline)
    assert {t.rounds for t in times.values()} == {5}


def test_with_enough_rounds_a_headline_changes_nothing(turns):
    budget = Budget(seconds=2.0, warmup=0)
    fast = {"ours": 10.0, "other": 11.0, "slow": 100.0}
    assert turns(fast, budget, "ours") == turns(fast, budget, None)
    assert turns(fast, budget, "ours")[0]["slow"].rounds == 17


def test_cold_overwrites_the_caches_before_each_call(monkeypatch):
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 64)
    timer = timing.Timer(CPU, cold=True)
    seen = []
    for _ in range(3):
        timer(lambda: seen.append(timer.flush.clone()))
    assert [int(flush.min()) for flush in seen] == [int(flush.max()) for flush in seen] == [1, 2, 3]
    assert timing.Timer(CPU).flush is None and timing.Timer(CPU, cold=False).flush is None


def test_interleave_with_nothing_to_measure():
    assert interleave({}, CPU, Budget()) == {}


def test_peak_counts_what_is_held_at_once():
    x = torch.randn(256, 1024)  # 1 MiB

    def two_at_once():
        y = x * 2
        z = y * 2
        del y
        return z * 2  # z and the result

    def one_after_another():
        for _ in range(5):
            (x * 2).sum()

    mib = 2**20
    assert 2 * mib <= peak_bytes(two_at_once, CPU) < 2 * mib + 4096
    assert mib <= peak_bytes(one_after_another, CPU) < mib + 4096


def test_peak_counts_what_autograd_keeps():
    x = torch.randn(256, 1024, requires_grad=True)

    def step():
        return torch.autograd.grad(x.exp().exp().sum(), x)

    assert peak_bytes(step, CPU) >= 3 * 2**20  # both exponentials kept, and a gradient


def test_peak_of_numpy_and_python_counts_on_request():
    numpy = pytest.importorskip("numpy")
    x = numpy.ones(2**17)  # 1 MiB

    def call():
        y = x * 2
        z = y * 2
        del y
        words = [str(i) for i in range(1000)]
        return torch.from_numpy(z * 2), words

    mib = 2**20
    assert peak_bytes(call, CPU) < 4096
    assert 2 * mib + 40_000 <= peak_bytes(call, CPU, python=True) < 2 * mib + 200_000
    assert peak_bytes(lambda: torch.ones(2**18) * 2, CPU, python=True) >= 2 * mib  # and tensors too


def test_ceilings_are_measured():
    work = ceiling_work(CPU, torch.float32)
    c = work.ceilings(interleave(work.thunks, CPU, Budget(seconds=0.0, min_rounds=2)))
    assert 1e8 < c.flops_per_s < 1e15
    assert 1e8 < c.bytes_per_s < 1e14


def test_the_ceiling_is_the_best_product_that_holds_the_numbers(monkeypatch):
    """A CPU without instructions for bfloat16 multiplies it at a few GFLOP/s: that is no floor."""
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (64, 1 << 12))
    ms = {"torch bfloat16": 100.0, "torch float32": 2.0, "packed float32": 1.0}
    times = {f"{timing._CEILING}{name}": summarise([value]) for name, value in ms.items()}
    work = timing.CeilingWork(dict.fromkeys([*times, timing._COPY]), 10**9, 10**6)
    c = work.ceilings({**times, timing._COPY: summarise([1.0])})
    assert (c.flops_per_s, c.bytes_per_s, c.product) == (1e12, 1e9, "packed float32")
    assert not any("bfloat16" in name for name in ceiling_work(CPU, torch.float32).thunks), "it cannot hold float32"
    assert list(ceiling_work(CPU, torch.float64).thunks) == [f"{timing._CEILING}torch float64", timing._COPY]


def test_a_hopeless_product_sets_no_ceiling_and_runs_once(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (64, 1 << 12))
    calls, made = [], timing._torch_product

    def slow_in_bfloat16(a, b, dtype):
        name, product = made(a, b, dtype)
        return name, lambda: (calls.append(name), time.sleep(0.2 if dtype == torch.bfloat16 else 0), product())

    monkeypatch.setattr(timing, "_torch_product", slow_in_bfloat16)
    work = ceiling_work(CPU, torch.bfloat16)
    assert f"{timing._CEILING}torch bfloat16" not in work.thunks and calls.count("torch bfloat16") == 1


def test_slow_thunks_take_no_turns(turns):
    budget = Budget(seconds=3.0, warmup=0)
    ms = {"ours": 100.0, "slow": 2000.0, "slower": 9000.0}
    times, calls, passed = turns(ms, budget, "ours", {"slow": 2100.0, "slower": 9000.0})
    assert times["ours"].rounds > 15 and passed < 3.2 + 2.0
    assert (times["slow"].rounds, times["slow"].p20, times["slow"].p80) == (2, 2000.0, 2100.0)
    assert times["slower"].rounds == 1 and calls.count("slower") == 0
    assert budget.is_slow(2000.0, 100.0) and not budget.is_slow(700.0, 100.0) and not budget.is_slow(500.0, 1.0)
    # five rounds of 3.1 s are more than five budgets: three times the fastest is clear enough
    assert budget.is_slow(3100.0, 1000.0) and not budget.is_slow(2900.0, 900.0) and not budget.is_slow(3100.0, 1050.0)


def spin(seconds):
    end = time.thread_time() + seconds  # this thread's own work, independent of other programs
    while time.thread_time() < end:
        pass


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="the system does not say who waited")
def test_time_lost_to_other_programs_does_not_count(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    rival = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    rivals = [subprocess.Popen(rival, stdout=subprocess.PIPE) for _ in range(2 * os.cpu_count())]
    try:
        for process in rivals:
            process.stdout.readline()  # wait until it runs
        begin = time.perf_counter()
        took = timing._call_cpu(lambda: spin(0.2))
        wall = 1e3 * (time.perf_counter() - begin)
    finally:
        for process in rivals:
            process.kill()
            process.communicate()
    assert 195 < took < 300 < wall


@pytest.mark.parametrize("loses", [1, 2, 3])
def test_core_lost_between_reading_the_queue_and_the_call_is_not_taken_off(monkeypatch, loses):
    lost_ns, readings = [0], [0]

    def queued_ns():  # lose the core for 20 ms after the reading
        before, readings[0] = lost_ns[0], readings[0] + 1
        if readings[0] <= loses:
            time.sleep(0.02)
            lost_ns[0] += 20_000_000
        return before

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(timing, "_queued_ns", queued_ns)
    assert timing._call_cpu(lambda: time.sleep(0.05)) > 49


def test_sleeping_counts():
    assert timing._call_cpu(lambda: time.sleep(0.05)) > 45


def test_queue_longer_than_the_call_takes_nothing_off(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(timing, "_queued_ns", lambda: time.perf_counter_ns() * 1000)
    assert timing._call_cpu(lambda: time.sleep(0.01)) >= 10
