"""Points of the memory curves and the optional baselines of the CPU suite."""

from __future__ import annotations

import pytest
import torch

from calm_fast.benchmarks import timing
from calm_fast.benchmarks.cases import linear_logprob, linear_nce
from calm_fast.benchmarks.cases.cross_attention_core import CoreShape, core_case
from calm_fast.benchmarks.measure import Setting, is_red, measure
from calm_fast.benchmarks.registry import cases
from calm_fast.benchmarks.timing import Budget
from calm_fast.core import native_library

CPU = torch.device("cpu")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # test_timing tests the real ones


@pytest.mark.parametrize(
    ("op", "series"), [("linear_logprob", linear_logprob.VOCABULARY), ("linear_nce", linear_nce.TOKENS)]
)
def test_memory_curves_differ_in_one_size_and_have_two_baselines(op, series):
    points = [case for case in cases(op, CPU, "quick") if case.series == series]
    sizes = [case.shape[series.size] for case in points]
    assert len(points) >= 4 and sizes == [sizes[0] * 2**i for i in range(len(sizes))]
    rest = [{name: size for name, size in case.shape.items() if name != series.size} for case in points]
    assert all(shape == rest[0] for shape in rest) and all(case.share < 1 for case in points)
    assert all([c.ours for c in case.contestants] == [True, False, False] for case in points)
    assert [case.flops / size for case, size in zip(points, sizes, strict=True)] == [points[0].flops / sizes[0]] * 4


@pytest.mark.parametrize("m", [1, 16, 17])
def test_the_compiled_library_has_a_row_whatever_the_number_of_queries(m):
    case = core_case("t", CoreShape(b=2, m=m, n=40, h=2, d=8), torch.float32, CPU)
    rows, _ = measure(case, SETTING)
    assert not any(row["failure"] for row in rows)
    present = native_library.obstacle("cross_attention", "cpu") is None
    assert ("native" in {row["impl"] for row in rows}) == present


def test_one_query_reads_keys_as_a_cache_keeps_them():
    made = core_case("t", CoreShape(b=2, m=1, n=40, h=3, d=8), torch.float32, CPU).make(0)
    assert made["k"].shape == (2, 40, 3, 8) and made["k"].transpose(1, 2).is_contiguous()
    assert core_case("t", CoreShape(b=2, m=5, n=40, h=3, d=8), torch.float32, CPU).make(0)["k"].is_contiguous()


def test_flex_attention_on_a_cpu_is_a_row_with_the_reason_where_it_cannot_run():
    shape = CoreShape(b=1, m=6, n=6, h=1, d=8, causal=True, train=True)
    rows, _ = measure(core_case("t", shape, torch.float32, CPU, flex=True), SETTING)
    failures = {row["impl"]: row["failure"] for row in rows if row["failure"]}
    assert failures == {"flex_attention": "cannot run: FlexAttention has no backward on a CPU"}
    assert not any(is_red(row) for row in rows)


@pytest.mark.slow  # torch.compile
def test_flex_attention_on_a_cpu_is_right():
    shape = CoreShape(b=1, m=40, n=52, h=2, d=16, documents=2)
    rows, _ = measure(core_case("t", shape, torch.float32, CPU, flex=True), SETTING)
    assert {row["impl"]: row["failure"] for row in rows}["flex_attention"] is None


def test_peft_is_named_in_every_training_case_of_dual_lora():
    found = [case for case in cases("dual_lora", CPU, "quick") if case.name.startswith("d1_training")]
    assert len(found) == 2 and all("peft_lora" in {c.name for c in case.contestants} for case in found)
