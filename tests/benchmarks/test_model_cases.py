"""The cases of whole composed models: the same results from every contestant, and correct costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calm_fast.benchmarks import timing
from calm_fast.benchmarks.baselines.composition import Part, plain_head, plain_layers, random_model
from calm_fast.benchmarks.cases import model, model_generate, model_training
from calm_fast.benchmarks.cases.model_generate import generation_case
from calm_fast.benchmarks.cases.model_shape import ModelShape
from calm_fast.benchmarks.cases.model_training import training_case
from calm_fast.benchmarks.measure import Setting, measure
from calm_fast.benchmarks.registry import cases
from calm_fast.benchmarks.timing import Budget

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))
STEP = ModelShape(Part(32, 4, 4, 2, 48), Part(16, 3, 2, 1, 24), 61, b=2, m=20, connections=2)
TALK = replace(STEP, m=9, new=4)
TINY = {
    "training": lambda: training_case("t", STEP, torch.float32, CPU),
    "training_bfloat16": lambda: training_case("t", STEP, torch.bfloat16, CPU),
    "three_augmenters": lambda: training_case("t", replace(STEP, augmenters=3), torch.float32, CPU),
    "generation": lambda: generation_case("t", TALK, torch.float32, CPU),
    "generation_bfloat16": lambda: generation_case("t", TALK, torch.bfloat16, CPU),
    "generation_two_augmenters": lambda: generation_case("t", replace(TALK, augmenters=2), torch.float32, CPU),
}


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # what they are is tested in test_timing


@pytest.mark.parametrize("name", TINY)
def test_every_contestant_is_right_and_timed(name):
    rows, _ = measure(TINY[name](), SETTING)
    assert [row["failure"] for row in rows] == [None] * len(rows)
    assert all(row["ms"] > 0 and row["peak_bytes"] > 0 for row in rows)
    wanted = {"calm_fast", "parts"} | (
        {"calm_fast_loop", "eager_cache", "unfolded_sdpa_cache", "eager_recompute", "released", "calm_pytorch"}
        if "generation" in name
        else {"eager", "unfolded_sdpa"} | ({"released"} if "augmenters" not in name else set())
    )
    assert {row["impl"] for row in rows} == wanted


@pytest.mark.parametrize("build", [training_case, generation_case])
def test_a_connection_that_is_left_out_is_caught(build, monkeypatch):
    def crippled(inputs):
        found = composed(inputs)
        with torch.no_grad():
            found.connections[1].o_proj.weight.zero_()
        return found

    composed = model_training.composed
    for module in (model_training, model_generate):
        monkeypatch.setattr(module, "composed", crippled)
    shape = TALK if build is generation_case else STEP
    rows, _ = measure(build("t", shape, torch.float32, CPU), SETTING)
    failures = {row["impl"]: row["failure"] for row in rows}
    ours = {name for name in failures if name.startswith("calm_fast")}
    assert ours == ({"calm_fast", "calm_fast_loop"} if build is generation_case else {"calm_fast"})
    assert all(failures.pop(name).startswith("wrong: error") for name in ours) and not any(failures.values())


def test_plain_definition_is_the_transformers_model():
    part = Part(32, 3, 4, 2, 48)
    found = random_model(part, 61, torch.float32, CPU, 0)
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    plain = plain_head(found, plain_layers(found, ids, torch.float64))
    torch.testing.assert_close(found(input_ids=ids).logits.double(), plain, atol=2e-5, rtol=1e-5)
    again = random_model(part, 61, torch.float32, CPU, 0)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), again.parameters(), strict=True))
    assert 0.3 < plain.std() < 3 and not any(p.requires_grad for p in found.parameters())


def products(thunk) -> int:
    """Count the FLOPs of matrix products outside attention. A call beforehand folds the weights.

    Both times under a counter, where kept weights are not packed: it could not count packed products.
    """
    with FlopCounterMode(display=False):
        thunk()
    with FlopCounterMode(display=False) as counter:
        thunk()
    counts = counter.get_flop_counts()["Global"].items()
    return sum(n for op, n in counts if str(op) in ("aten.mm", "aten.addmm", "aten.bmm"))


@pytest.mark.parametrize(
    "shape",
    [
        replace(STEP, m=160),  # enough tokens for folding to pay off
        replace(STEP, m=160, augmenters=2, connections=3),
        TALK,
        replace(TALK, augmenters=2, new=3, b=1),
    ],
    ids=["training", "training_two", "generation", "generation_two"],
)
def test_flops_are_those_of_the_products(shape):
    build = generation_case if shape.new else training_case
    case = build("t", shape, torch.float32, CPU)
    assert products(case.contestants[0].prepare(case.make(0))) + shape.attention_flops() == case.flops


def test_attention_flops_by_hand():
    pairs = 2 * 20 * 21 // 2
    augmenter, anchor, links = 3 * 4 * pairs * 16, 4 * 4 * pairs * 32, 2 * 4 * pairs * 32
    # backward 2.5 times: three anchor layers lie above the first connection
    assert STEP.attention_flops() == augmenter + anchor + 5 * (3 * 4 * pairs * 32) // 2 + 7 * links // 2
    pairs = 2 * 12 * 13 // 2  # nine prompt tokens, three of four new ones are read
    assert TALK.attention_flops() == 4 * pairs * (3 * 16 + 4 * 32 + 2 * 32)


def test_bytes_by_hand():
    augmenter, anchor = 3 * (2 * 16 * 8 * 3 + 3 * 16 * 24), 4 * (2 * 32 * 8 * 6 + 3 * 32 * 48)
    parts, embedded = augmenter + anchor + 32 * 61, 2 * (16 + 32)
    factors = 2 * (32 + 32 * 16 + 4 * 32 * 32)
    assert STEP.bytes(4) == 4 * (parts + 2 * factors + 20 * embedded)
    folded, row = 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * (3 * 8 + 4 * 16 + 2 * 32)
    assert TALK.bytes(2) == 2 * (4 * (parts + folded) + 2 * row * (9 + 10 + 11 + 12) + 12 * embedded)


def test_peak_memory_of_many_augmenters_grows_at_most_linearly():
    shapes = [replace(STEP, augmenters=k) for k in (1, 2, 4)]
    peaks = []
    for shape in shapes:
        case = training_case("t", shape, torch.float32, CPU)
        peaks.append(timing.peak_bytes(case.contestants[0].prepare(case.make(0)), CPU))
    assert peaks[0] < peaks[1] < peaks[2] and peaks[2] - peaks[1] <= 2.2 * (peaks[1] - peaks[0])


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_scaling_curves_have_their_points(device):
    found = [case for case in cases("model", device, "full" if device == CUDA else "quick") if case.series]
    curves = {}
    for case in found:
        curves.setdefault(case.series, []).append(case)
        assert case.share < 1 and case.headline == "calm_fast"
    assert set(curves) == {model.AUGMENTERS, model.LENGTH, model.LAYER_LENGTH}
    assert [case.shape["augmenters"] for case in curves[model.AUGMENTERS]] == [1, 2, 4, 8]
    assert all([c.name for c in case.contestants][:3] == ["calm_fast", "eager", "unfolded_sdpa"] for case in found)
    for curve, points in curves.items():
        sizes = [case.shape[curve.size] for case in points]
        assert sizes == sorted(set(sizes)) and len(sizes) >= 4
        other = [{name: size for name, size in case.shape.items() if name not in (curve.size, "N")} for case in points]
        assert all(shape == other[0] for shape in other)
        flops = [case.flops / case.shape[curve.size] ** curve.power for case in points]
        assert flops == sorted(flops, reverse=True)  # the necessary FLOPs grow no faster than the curve allows


def test_gpu_cases_are_an_8b_and_a_1b_class_model():
    found = {case.name: case for case in cases("model", CUDA, "full")}
    step, talk = found["e1_training"], found["e2_long_b16"]
    anchor, augmenter = Part(4096, 32, 32, 8, 14336), Part(2048, 16, 32, 8, 8192)
    weights = [p.depth * p.layer_weights() + 2 * p.width * 128256 for p in (anchor, augmenter)]
    assert 7.5e9 < weights[0] < 8.5e9 and 0.9e9 < weights[1] < 1.6e9
    assert step.shape["B"] * step.shape["M"] == 8192 and (talk.shape["B"], talk.shape["new"]) == (16, 512)
    assert {(t.baseline, t.least) for t in step.targets} == {("released", 2.0), ("parts", 1 / 1.1)}
