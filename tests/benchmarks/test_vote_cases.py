"""The cases of vote: the same results from every contestant, and correct costs."""

from __future__ import annotations

import pytest
import torch

from calm_fast.benchmarks import timing
from calm_fast.benchmarks.cases.vote import Shape, cases, vote_case
from calm_fast.benchmarks.measure import Setting, measure
from calm_fast.benchmarks.timing import Budget
from calm_fast.core import native_library

CPU = torch.device("cpu")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))
SHAPES = {
    "count": Shape(40, 12),
    "weighted": Shape(40, 12, weighted=True),
    "many-classes": Shape(30, 20, classes=60),
    "one-class-often": Shape(60, 3, classes=3),
}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # test_timing tests the real ones


@pytest.mark.parametrize("name", SHAPES)
def test_every_contestant_is_right_and_timed(name):
    rows, _ = measure(vote_case("v", SHAPES[name], CPU), SETTING)
    failures = {row["impl"]: row["failure"] for row in rows}
    if native_library.obstacle("vote"):
        assert failures.pop("calm_fast_native").startswith("cannot run")
    assert failures == dict.fromkeys(failures)
    assert {row["ours"] for row in rows} == {True, False}


def test_a_wrong_winner_is_found(monkeypatch):
    from calm_fast.benchmarks.baselines import vote as baselines

    right = baselines.scatter_vote

    def wrong(*arguments):
        values = right(*arguments)
        values["winner"][7] += 1
        return values

    monkeypatch.setattr(baselines, "scatter_vote", wrong)
    rows, _ = measure(vote_case("v", SHAPES["count"], CPU), SETTING)
    assert [row["impl"] for row in rows if row["failure"] and "wrong" in row["failure"]] == ["torch_scatter"]


def test_costs_by_hand():
    assert Shape(3, 5).bytes() == 3 * (5 * 8 + 40) and Shape(3, 5).flops() == 30
    assert Shape(3, 5, weighted=True).bytes() == 3 * (5 * 12 + 40)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", ["quick", "full"])
def test_first_case_has_the_shape_and_targets_asked_for(device, suite):
    first = cases(torch.device(device), suite)[0]  # listing GPU cases needs no GPU
    assert first.shape == {"Q": 5000, "K": 64}
    least = {target.baseline: target.least for target in first.targets}
    assert least == {"counter": 20.0, "torch_one_hot": 1.5, "torch_scatter": 1.5}
    assert set(least) <= {contestant.name for contestant in first.contestants}
