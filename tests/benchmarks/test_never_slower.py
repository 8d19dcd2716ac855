"""The never-slower sweep: its shapes, and how it decides. Times are made up; nothing here depends on a clock."""

from __future__ import annotations

import json

import pytest
import torch

from calm_fast.benchmarks import never_slower
from calm_fast.benchmarks.cases import never_slower as shapes
from calm_fast.benchmarks.measure import Setting
from calm_fast.benchmarks.never_slower import AHEAD, LEAST, decide, result, rivals, sweep
from calm_fast.benchmarks.registry import REGISTRY, Case, Contestant
from calm_fast.benchmarks.run import main, select
from calm_fast.benchmarks.timing import Budget, Times

SETTING = Setting(torch.device("cpu"), "cpu", {}, None, Budget(0.0, 1, 1, 0))


def double(inputs, dtype=torch.float32):
    return {"out": 2 * inputs["x"].to(dtype)}


def contestant(name, **options):
    return Contestant(name, lambda inputs: lambda: double(inputs), **options)


def case_of(*contestants, headline="auto"):
    def make(seed):
        return {"x": torch.randn(8, generator=torch.Generator().manual_seed(seed))}

    return Case("tiny", "tiny", {"N": 8}, torch.float32, 8, 64, make, contestants, double, headline)


AUTO, FAST, SLOW = contestant("auto", ours=True), contestant("fast"), contestant("slow")
CASE = case_of(AUTO, FAST, SLOW, contestant("bare", yardstick=True))


def times(**ms):
    return {name: Times(value, value, value, 3) for name, value in ms.items()}


class Scripted:
    """A timing that returns prepared times, phase by phase, and records which thunks it was given."""

    def __init__(self, *phases):
        self.phases, self.asked = list(phases), []

    def __call__(self, thunks, budget):
        self.asked.append(sorted(thunks))
        phase = self.phases.pop(0)
        return {name: t for name, t in phase.items() if name in thunks}


def test_rivals_do_the_same_work_and_are_not_far_behind():
    assert rivals(CASE, times(auto=1.0, fast=0.9, slow=AHEAD + 0.01, bare=0.1)) == ["fast"]
    assert rivals(CASE, times(auto=1.0, fast=AHEAD, slow=0.2)) == ["fast", "slow"]
    assert rivals(CASE, times(auto=1.0)) == []


def test_result_is_the_ratio_to_the_best_that_does_the_same_work():
    found = result(CASE, times(auto=2.0, fast=1.5, slow=4.0, bare=0.1))
    assert (found.best, found.ratio) == ("fast", 0.75)
    assert result(CASE, times(auto=2.0, bare=0.1)).ratio is None


def test_far_behind_is_decided_at_once_and_the_others_meet_again():
    thunks = dict.fromkeys(("auto", "fast", "slow", "bare"), lambda: {})
    timing = Scripted(times(auto=1.0, fast=3.0, slow=5.0, bare=0.1))
    assert decide(CASE, thunks, timing).ratio == 3.0
    assert len(timing.asked) == 1
    timing = Scripted(times(auto=1.0, fast=0.9, slow=5.0, bare=0.1), times(auto=1.0, fast=1.1))
    assert decide(CASE, thunks, timing).ratio == 1.1
    assert timing.asked[1] == ["auto", "fast"]


def test_a_slow_shape_is_measured_again_against_its_best_baseline_alone():
    first = times(auto=1.0, fast=0.9, slow=0.95)
    timing = Scripted(first, first, times(auto=1.0, fast=0.8))
    row = sweep(CASE, SETTING, lambda _: None, timing)
    assert timing.asked[-1] == ["auto", "fast"]
    assert (row["ratio"], row["confirmed"]) == (0.9, 0.8)
    assert never_slower.below(row)
    timing = Scripted(first, first, times(auto=1.0, fast=LEAST))
    assert not never_slower.below(sweep(CASE, SETTING, lambda _: None, timing))  # chance, and not confirmed


def test_a_shape_that_is_fast_enough_is_not_measured_again():
    first = times(auto=1.0, fast=LEAST, slow=1.2)
    row = sweep(CASE, SETTING, lambda _: None, Scripted(first, first))
    assert row["confirmed"] is None and not never_slower.below(row) and not never_slower.is_red(row)


def test_wrong_values_have_no_time():
    wrong = Contestant("auto", lambda inputs: lambda: {"out": 2.1 * inputs["x"]}, ours=True)
    row = sweep(case_of(wrong, FAST), SETTING, lambda _: None, Scripted())
    assert never_slower.is_red(row) and "wrong" in row["failures"]["auto"]
    assert "RED" in never_slower.line(row)
    cheat = Contestant("cheat", lambda inputs: lambda: {"out": 2.1 * inputs["x"]})
    row = sweep(case_of(AUTO, cheat), SETTING, lambda _: None, Scripted(times(auto=1.0, cheat=0.1)))
    assert row["best"] is None and "wrong" in row["failures"]["cheat"]


@pytest.fixture(scope="module")
def everything():
    return {op: shapes.cases(op) for op in REGISTRY}


def test_shapes_cover_every_op_dtype_and_both_sides_of_each_limit(everything):
    found = [case for cases in everything.values() for case in cases]
    names = [case.name for case in found]
    assert len(set(names)) == len(names) and 200 <= len(names) <= 500
    for op in ("cross_attention", "dual_lora", "linear_logprob", "linear_nce", "model"):
        assert {case.dtype for case in everything[op]} == {torch.float32, torch.bfloat16}
    assert {1, 15, 16, 32} <= {case.shape["T"] for case in everything["linear_logprob"]}
    for case in found:
        contestants = {c.name: c for c in case.contestants}
        assert contestants[case.headline].ours
        assert any(not c.yardstick for name, c in contestants.items() if name != case.headline)


def test_small_shapes_of_every_op_are_right():
    """Run the smallest case of each kind to its end, with real thunks."""
    picked = {"cross_attention": "packed_k128_rows512_t4", "linear_logprob": "logprob_t4_d256_v8192_fp32"}
    picked |= {"vote": "vote_q16_k16", "maj_at_k": "curve_exact_q1_k16", "dual_lora": "lora_paper_d256_t16_fp32"}
    for op, name in picked.items():
        (case,) = select([op], torch.device("cpu"), never_slower.SUITE, [name])[:1]
        row = sweep(case, SETTING, lambda _: None, lambda thunks, _: {n: Times(1.0, 1.0, 1.0, 1) for n in thunks})
        assert row["case"] == name and row["failures"] == {} and row["ratio"] == 1.0


def test_command_line_writes_a_row_per_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(never_slower, "cases", lambda op: [case_of(AUTO, FAST)])
    monkeypatch.setattr(never_slower, "timed", lambda setting: lambda thunks, _: times(auto=1.0, fast=0.5))
    monkeypatch.setattr("calm_fast.benchmarks.memory.keep", lambda: None)
    assert main(["--suite", "never-slower", "--op", "vote", "--out", str(tmp_path)]) == 0
    (row,) = map(json.loads, (tmp_path / "never_slower.jsonl").read_text().splitlines())
    assert (row["best"], row["ratio"], row["confirmed"]) == ("fast", 0.5, 0.5)
    assert "1 shapes, 1 below 0.97" in capsys.readouterr().out
    assert main(["--suite", "never-slower", "--compare", "HEAD"]) == 2


def test_shapes_that_torch_cannot_compute_in_time_are_left_out(monkeypatch):
    monkeypatch.setattr(never_slower, "_product_rate", lambda dtype: 2.0)
    fits, costly = never_slower.affordable([CASE])
    assert not fits and costly == [CASE]  # 8 FLOP at 2 a second take 4 s
    assert "tiny" in never_slower.summary([], costly)
