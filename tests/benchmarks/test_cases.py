"""The cases of cross_attention: correct costs, and the same results from every contestant."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calm_fast._ops.cross_attention.reference import interval_mask
from calm_fast.benchmarks import timing
from calm_fast.benchmarks.baselines.cross_attention import FixedCache, explicit_attention, visible
from calm_fast.benchmarks.cases.alignment import aligned_intervals
from calm_fast.benchmarks.cases.cross_attention_core import CoreShape, core_case
from calm_fast.benchmarks.cases.cross_attention_layer import LayerShape, layer_case
from calm_fast.benchmarks.measure import Setting, measure
from calm_fast.benchmarks.registry import REGISTRY, cases
from calm_fast.benchmarks.timing import Budget
from calm_fast.ops import OPS

CPU = torch.device("cpu")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))
LAYER = {"b": 2, "m": 24, "n": 24, "da": 16, "db": 32, "h": 4, "d": 8}
CORE = {"b": 2, "m": 20, "n": 20, "h": 2, "d": 8}
TEXTS = {"b": 2, "m": 40, "n": 52, "h": 2, "d": 8, "documents": 3}
STEP = {**LAYER, "m": 1, "cached": True}
TINY = {
    "layer": layer_case("layer", LayerShape(**LAYER), torch.float32, CPU),
    "layer_training": layer_case("layer", LayerShape(**LAYER, train=True), torch.float32, CPU, check_batch=1),
    "layer_causal": layer_case("layer", LayerShape(**LAYER, causal=True), torch.float32, CPU),
    "layer_causal_training": layer_case("layer", LayerShape(**LAYER, causal=True, train=True), torch.float32, CPU),
    "decode": layer_case("decode", LayerShape(**STEP), torch.float32, CPU),
    "layer_bfloat16": layer_case("layer", LayerShape(**LAYER), torch.bfloat16, CPU),
    "core": core_case("core", CoreShape(**CORE), torch.float32, CPU),
    "core_causal_training": core_case("core", CoreShape(**CORE, causal=True, train=True), torch.float32, CPU),
    "intervals": core_case("intervals", CoreShape(**TEXTS), torch.float32, CPU),
    "intervals_training": core_case("intervals", CoreShape(**TEXTS, train=True), torch.float32, CPU),
}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # what they are is tested in test_timing


@pytest.mark.parametrize("name", TINY)
def test_every_contestant_is_right_and_timed(name):
    rows, ceilings = measure(TINY[name], SETTING)
    assert [row["failure"] for row in rows] == [None] * len(rows)
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["floor_ms"] == ceilings.floor_ms(row["flops"], row["bytes"]) for row in rows)
    assert {row["ours"] for row in rows} == {True, False}


def test_registry_covers_every_op():
    assert set(REGISTRY) == {*OPS, "model"}  # whole composed models belong to no op


@pytest.mark.parametrize("device", ["cpu", "cuda"])  # listing GPU cases needs no GPU
@pytest.mark.parametrize("suite", ["quick", "full"])
def test_cases_have_unique_names_and_known_targets(device, suite):
    found = cases("cross_attention", torch.device(device), suite)
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for word in ("x1_", "x2_", "x3_", "x4_layer_inference", "x4_layer_training", "x5_decode"):
        assert any(name.startswith(word) for name in names)
    for case in found:
        contestants = [c.name for c in case.contestants]
        assert len(set(contestants)) == len(contestants)
        assert case.headline in contestants and case.flops > 0 and case.bytes > 0
        for target in case.targets:
            assert target.impl in contestants and target.baseline in (*contestants, "best")


def test_quick_is_part_of_full():
    quick, full = ({c.name for c in cases("cross_attention", CPU, suite)} for suite in ("quick", "full"))
    assert quick < full


def test_layer_flops_are_what_the_folded_layer_does():
    s = LayerShape(**LAYER)
    case = TINY["layer"]
    thunk = case.contestants[0].prepare(case.make(0))
    with FlopCounterMode(display=False):  # nothing is packed under a counter, which could not count it
        thunk()  # the fold is cached from here on
    with FlopCounterMode(display=False) as counter:
        thunk()
    attention = 4 * s.b * s.m * s.n * s.h * s.d
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert products + attention == case.flops == s.flops()


def test_layer_flops_by_hand():
    s = LayerShape(b=3, m=5, n=7, da=11, db=13, h=2, d=4)
    products = 4 * 15 * 13 * 8 + 4 * 21 * 11 * 8
    assert s.flops() == products + 4 * 3 * 5 * 7 * 8
    square = LayerShape(b=3, m=5, n=5, da=11, db=13, h=2, d=4, causal=True)
    assert square.flops() == 4 * 15 * 13 * 8 + 4 * 15 * 11 * 8 + 4 * 3 * 15 * 8
    long = LayerShape(b=64, m=512, n=512, da=11, db=13, h=2, d=4, train=True)  # folding pays here
    tokens = 64 * 512
    fold = 4 * 8 * 13 * 11
    assert long.flops() == 3 * 4 * tokens * 13 * 8 + 2 * 4 * tokens * 11 * 8 + 3 * fold + 14 * tokens * 512 * 8
    step = LayerShape(b=3, m=1, n=7, da=11, db=13, h=2, d=4, cached=True)
    assert step.flops() == 4 * 3 * 13 * 8 + 4 * 3 * 11 * 8 + 4 * 3 * 7 * 8


def test_layer_bytes_by_hand():
    s = LayerShape(b=3, m=5, n=7, da=11, db=13, h=2, d=4)
    assert s.bytes(4) == 4 * (2 * 15 * 13 + 21 * 11 + 2 * 8 * 13 + 2 * 8 * 11)
    step = LayerShape(b=3, m=1, n=7, da=11, db=13, h=2, d=4, cached=True)
    assert step.bytes(2) == 2 * (2 * 3 * 13 + 3 * 11 + 2 * 3 * 7 * 8 + 2 * 8 * 13 + 2 * 8 * 11)


def test_core_costs_by_hand():
    assert CoreShape(b=2, m=3, n=5, h=2, d=4).flops() == 4 * 2 * 15 * 8
    assert CoreShape(b=2, m=5, n=5, h=2, d=4, causal=True, train=True).flops() == 14 * 2 * 15 * 8
    assert CoreShape(b=2, m=3, n=5, h=2, d=4).bytes(2) == 2 * (2 * 2 * 3 * 8 + 2 * 2 * 5 * 8)
    s = CoreShape(**TEXTS)
    lo, hi = s.intervals(0)
    assert s.flops() == 4 * int((hi - lo).sum()) * s.h * s.d


@pytest.mark.parametrize(("m", "n", "documents"), [(4096, 5200, 4), (512, 650, 2), (100, 100, 1), (64, 20, 3)])
def test_aligned_intervals_are_those_of_packed_documents(m, n, documents):
    lo, hi = aligned_intervals(m, n, documents, seed=3)
    assert lo.shape == hi.shape == (m,) and lo.dtype == hi.dtype == torch.int32
    assert bool(((lo >= 0) & (lo <= hi) & (hi <= n)).all())
    assert bool((lo.diff() >= 0).all() and (hi.diff() >= 0).all())
    assert lo[0] == 0 and hi[0] <= 3
    if n >= m:
        assert len(lo.unique()) == documents
        assert 0.9 * n <= int(hi[-1]) <= n
    again, other = aligned_intervals(m, n, documents, seed=3), aligned_intervals(m, n, documents, seed=4)
    assert torch.equal(hi, again[1]) and not torch.equal(hi, other[1])


def test_visible_is_the_interval_mask():
    g = torch.Generator().manual_seed(0)
    lo, hi = torch.randint(0, 8, (2, 2, 5), generator=g).int()
    assert torch.equal(visible(5, 7, CPU, lo, hi, False)[:, 0], interval_mask(lo, hi, False, 5, 7, CPU))
    assert torch.equal(visible(5, 7, CPU, None, hi, False)[:, 0], interval_mask(None, hi, False, 5, 7, CPU))
    assert torch.equal(visible(5, 7, CPU, None, None, True)[0], interval_mask(None, None, True, 5, 7, CPU))
    assert visible(5, 7, CPU, None, None, False) is None


def test_explicit_attention_is_sdpa():
    q, k, v = (torch.randn(1, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    mask = visible(6, 6, CPU, None, None, True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(explicit_attention(q, k, v, mask, 1 / math.sqrt(8)), expected)


def test_fixed_cache_keeps_its_length():
    keys = torch.zeros(1, 2, 5, 4)
    cache = FixedCache(keys, keys)
    k, v = cache.update(torch.ones(1, 2, 1, 4), torch.full((1, 2, 1, 4), 2.0))
    assert k.shape == v.shape == keys.shape
    assert bool((k[:, :, -1] == 1).all() and (v[:, :, -1] == 2).all() and (k[:, :, :-1] == 0).all())
    assert bool((keys == 0).all())
