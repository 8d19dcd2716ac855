"""The cases of maj_at_k: every contestant is correct, those with other subsets within their sampling noise."""

from __future__ import annotations

import pytest
import torch

from calm_fast.benchmarks import timing
from calm_fast.benchmarks.baselines import maj_at_k as baselines
from calm_fast.benchmarks.cases.maj_at_k import Shape, _make, cases, curve_case
from calm_fast.benchmarks.measure import Setting, measure
from calm_fast.benchmarks.timing import Budget
from calm_fast.core import native_library
from calm_fast.ops import maj_at_k

CPU = torch.device("cpu")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))
SMALL = Shape(6, 16, resamples=40, classes=5)


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # what they are is tested in test_timing


def failures(case):
    return {row["impl"]: row["failure"] for row in measure(case, SETTING)[0]}


@pytest.mark.parametrize("slow", [False, True])
def test_every_contestant_is_right_and_timed(slow):
    found = failures(curve_case("v", SMALL, CPU, slow=slow))
    if native_library.obstacle("maj_at_k_resample"):
        assert found.pop("calm_fast_native").startswith("cannot run")
    assert found == dict.fromkeys(found)
    assert {"python", "calm_fast_torch"} & set(found) == ({"python", "calm_fast_torch"} if slow else set())


def test_a_wrong_baseline_is_found(monkeypatch):
    """A curve that is 30 % too low exceeds its sampling noise."""
    right = baselines.numpy_curve

    def too_low(answers, correct, ks, resamples, seed):
        values = right(answers, correct, ks, resamples, seed)
        exact = maj_at_k(torch.from_numpy(answers), torch.from_numpy(correct), ks=ks).accuracy
        return values | {"accuracy": exact * 0.7}

    monkeypatch.setattr(baselines, "numpy_curve", too_low)
    found = failures(curve_case("v", Shape(60, 16, resamples=200, classes=5), CPU))
    assert [name for name, why in found.items() if why and "wrong" in why] == ["numpy"]


def in_chunks(answers, correct, ks, resamples, seed):
    return baselines.torch_curve(answers, correct, ks, resamples, seed, columns=7 * resamples + 1)


@pytest.mark.parametrize("resample", [baselines.numpy_curve, baselines.python_curve, in_chunks])
def test_baselines_agree_with_the_exact_curve(resample):
    s = Shape(40, 16, resamples=300, classes=5)
    inputs = _make(s, CPU)(3)
    answers, correct = inputs["answers"], inputs["correct"]
    exact = maj_at_k(answers, correct, ks=s.ks())
    as_given = {baselines.numpy_curve: torch.Tensor.numpy, baselines.python_curve: torch.Tensor.tolist}
    found = resample(*map(as_given.get(resample, torch.clone), (answers, correct)), s.ks(), s.resamples, 1)
    # the variance of one credit is at most 1 / 4
    sigma = (1 / (4 * s.resamples * s.q)) ** 0.5
    assert (found["accuracy"] - exact.accuracy).abs().max() <= 4 * sigma
    torch.testing.assert_close(found["stderr"], exact.stderr, rtol=0.1, atol=0)
    assert found["accuracy"][-1].item() == pytest.approx(exact.accuracy[-1].item(), rel=1e-12)  # all samples: no noise


@pytest.mark.parametrize("resample", [baselines.numpy_curve, in_chunks])
def test_baselines_draw_without_replacement(resample):
    """Seven samples, three correct, the others all different: any six have a majority of correct ones."""
    answers = torch.tensor([[0, 1, 0, 2, 0, 3, 4]] * 20)
    correct = torch.zeros(20, dtype=torch.int64)
    given = [t.numpy() if resample is baselines.numpy_curve else t for t in (answers, correct)]
    found = resample(*given, [7, 1, 6, 6], 50, 0)["accuracy"]
    assert found[0] == found[2] == found[3] == 1.0
    assert found[1] == pytest.approx(3 / 7, abs=4 * (3 / 7 * 4 / 7 / 1000) ** 0.5)


def test_costs_by_hand():
    assert Shape(3, 8, resamples=5).ks() == [1, 2, 4, 8]
    assert Shape(3, 8, resamples=5).flops() == 2 * 3 * 5 * 4 and Shape(3, 8).bytes() == 3 * 9 * 8 + 16 * 4


@pytest.mark.parametrize(("device", "least"), [("cpu", 10.0), ("cuda", 20.0)])
@pytest.mark.parametrize("suite", ["quick", "full"])
def test_targets(device, suite, least):
    case = cases(torch.device(device), suite)[-1]
    assert (case.shape["Q"], case.shape["K"]) == (5000, 64)
    assert case.shape["resamples"] == (1000 if suite == "full" else 200)
    (target,) = case.targets
    assert (target.impl, target.baseline, target.least) == ("calm_fast", "numpy", least)
