"""The cases of linear_logprob and linear_nce: the same results from every contestant, and correct costs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calm_fast._ops.linear_logprob.torch_impl import linear_logprob_torch_bwd, linear_logprob_torch_fwd
from calm_fast._ops.linear_nce.torch_impl import linear_nce_torch_bwd, linear_nce_torch_fwd, linear_nce_torch_step
from calm_fast.benchmarks import timing
from calm_fast.benchmarks.cases import linear_logprob, linear_nce
from calm_fast.benchmarks.cases.linear_logprob import logprob_case
from calm_fast.benchmarks.cases.linear_nce import nce_case
from calm_fast.benchmarks.measure import Setting, measure
from calm_fast.benchmarks.timing import Budget

CPU = torch.device("cpu")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))
SIZES = {"t": 24, "d": 16, "v": 300}
TINY = {
    "logprob": logprob_case("score", linear_logprob.Shape(**SIZES), torch.float32, CPU),
    "logprob_training": logprob_case("training", linear_logprob.Shape(**SIZES, train=True), torch.float32, CPU),
    "logprob_bfloat16": logprob_case("score", linear_logprob.Shape(**SIZES), torch.bfloat16, CPU),
    "nce": nce_case("nce", linear_nce.Shape(**SIZES), torch.float32, CPU),
    "nce_trained_head": nce_case("nce", linear_nce.Shape(**SIZES, head=True), torch.float32, CPU),
    "nce_bfloat16": nce_case("nce", linear_nce.Shape(**SIZES, head=True), torch.bfloat16, CPU),
}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # test_timing tests the real ones


@pytest.mark.parametrize("name", TINY)
def test_every_contestant_is_right_and_timed(name):
    rows, _ = measure(TINY[name], SETTING)
    assert [row["failure"] for row in rows] == [None] * len(rows)
    assert all(row["ms"] > 0 for row in rows)
    assert {row["ours"] for row in rows} == {True, False}


def products(work) -> int:
    """Count the FLOPs of a call's matrix products. A registered op is opaque to the counter: call its inside."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["logprob", "logprob_training"])
def test_logprob_flops_are_those_of_the_products(name):
    x = TINY[name].make(0)
    head = (x["hidden"], x["weight"], None, x["targets"])
    results = linear_logprob_torch_fwd(*head, 1.0, None, -100, False, False)
    flops = products(lambda: linear_logprob_torch_fwd(*head, 1.0, None, -100, False, False))
    if "dlogprob" in x:
        rest = (results[3], results[1], results[4], 1.0, None, -100, (True, False, False))
        flops += products(lambda: linear_logprob_torch_bwd(x["dlogprob"], None, *head, *rest))
    assert flops == TINY[name].flops


def test_nce_flops_are_those_of_the_products():
    """With a trained head the op repeats two products to store no logits; the cheapest known form does not."""
    x = TINY["nce"].make(0)
    streams, head = (x["student"], x["nat"], x["neg"]), (x["weight"], None, x["targets"])
    arguments = (*streams, *head, x["seq_ids"], 0.5, 1.0, 0.5, None, -100)
    assert products(lambda: linear_nce_torch_step(*arguments)) == TINY["nce"].flops
    loss, lse, coefficients = linear_nce_torch_fwd(*arguments)
    flops = products(lambda: linear_nce_torch_fwd(*arguments))
    rest = (lse, coefficients, 1.0, None, -100, (True, True, False))
    flops += products(lambda: linear_nce_torch_bwd(torch.ones_like(loss), *streams[:2], *head, *rest))
    logits_again = products(lambda: [h @ x["weight"].T for h in streams[:2]])
    assert flops - logits_again == TINY["nce_trained_head"].flops


def test_absent_packages_get_a_row_that_says_so():
    case = logprob_case("score", linear_logprob.Shape(4, 8, 20), torch.float32, CPU, packages=True)
    others = [c for c in case.contestants if c.name in ("liger_fused_linear_cross_entropy", "cut_cross_entropy")]
    assert len(others) == 2
    rows, _ = measure(case, SETTING)
    failures = {row["impl"]: row["failure"] for row in rows}
    for other in others:
        assert failures[other.name] is None or "cannot run" in failures[other.name]


@pytest.mark.parametrize("module", [linear_logprob, linear_nce])
@pytest.mark.parametrize("suite", ["quick", "full"])
def test_gpu_cases_have_their_targets(module, suite):
    first = module.cases(torch.device("cuda"), suite)[0]
    assert first.shape == {"T": 8192, "d": 4096, "V": 128256}
    assert {t.quantity for t in first.targets} == {"ms", "peak_bytes"}
    names = {contestant.name for contestant in first.contestants} | {"best"}
    assert all({t.impl, t.baseline} <= names for t in first.targets)
