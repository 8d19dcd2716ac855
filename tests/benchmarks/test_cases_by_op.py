"""The cases of dual_lora, linear_nce and linear_logprob: expected shapes and baselines, all with correct results."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
from torch import nn

from calm_fast.benchmarks import timing
from calm_fast.benchmarks.baselines.dual_lora import peft_layer
from calm_fast.benchmarks.baselines.vocabulary import chunked_logprob, log_softmax_logprob
from calm_fast.benchmarks.cases import dual_lora, linear_logprob, linear_nce
from calm_fast.benchmarks.measure import Setting, is_red, measure
from calm_fast.benchmarks.registry import REGISTRY, cases
from calm_fast.benchmarks.timing import Budget

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETTING = Setting(CPU, "cpu", {}, None, Budget(seconds=0.0, min_rounds=1, warmup=0))
LORA = {"t": 20, "d": 32, "r": 4, "m": 8, "g": 8}
TOKENS = {"t": 300, "d": 16, "v": 70}  # more than a chunk
PACKAGES = {
    "peft_lora": "peft",
    "liger_fused_linear_jsd": "liger_kernel",
    "liger_fused_linear_cross_entropy": "liger_kernel",
    "cut_cross_entropy": "cut_cross_entropy",
}
TINY = {
    "lora": lambda: dual_lora.layer_case("t", dual_lora.Shape(**LORA, variant="released"), torch.float32, CPU),
    "lora_training": lambda: dual_lora.layer_case(
        "t", dual_lora.Shape(**LORA, variant="paper", train=True), torch.bfloat16, CPU, packages=True
    ),
    "nce": lambda: linear_nce.nce_case("t", linear_nce.Shape(**TOKENS), torch.float32, CPU),
    "nce_trained_head": lambda: linear_nce.nce_case("t", linear_nce.Shape(**TOKENS, head=True), torch.bfloat16, CPU),
    "logprob": lambda: linear_logprob.logprob_case("t", linear_logprob.Shape(**TOKENS), torch.bfloat16, CPU),
    "logprob_training": lambda: linear_logprob.logprob_case(
        "t", linear_logprob.Shape(**TOKENS, train=True), torch.float32, CPU
    ),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setitem(timing._CEILING_SIZES, "cpu", (128, 1 << 16))  # what they are is tested in test_timing
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)  # not installed, on any machine


@pytest.mark.parametrize("name", TINY)
def test_every_contestant_is_right_and_timed(name):
    rows, _ = measure(TINY[name](), SETTING)
    failures = {row["impl"]: row["failure"] for row in rows if row["failure"]}
    assert set(failures) == ({"peft_lora"} if name == "lora_training" else set())
    assert all(text.startswith("cannot run: peft cannot be used here") for text in failures.values())
    assert all(row["ms"] > 0 for row in rows if row["impl"] not in failures)
    assert not any(is_red(row) for row in rows)


@pytest.mark.parametrize("name", ["nce", "logprob"])
def test_absent_packages_are_rows_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)  # torch.compile has its own tests
    module = {"nce": linear_nce, "logprob": linear_logprob}[name]
    case = getattr(module, f"{name}_case")("t", module.Shape(**TOKENS), torch.float32, CPU, packages=True)
    rows, _ = measure(case, SETTING)
    failures = {row["impl"]: row["failure"] for row in rows if row["failure"]}
    assert failures and set(failures) <= set(PACKAGES)
    assert all(text.startswith("cannot run: ") and "cannot be used here" in text for text in failures.values())
    assert not any(is_red(row) for row in rows)


def test_peft_gets_the_same_factors_and_scale(monkeypatch):
    class Lora(nn.Module):
        def __init__(self, base, config):
            super().__init__()
            self.base, self.scale = base, config["lora_alpha"] / config["r"]
            self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, config["r"], bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(config["r"], base.out_features, bias=False)})

        def forward(self, x):
            return self.base(x) + self.scale * self.lora_B["default"](self.lora_A["default"](x))

    peft = types.ModuleType("peft")
    peft.LoraConfig = dict
    peft.inject_adapter_in_model = lambda config, model: model.update({"base": Lora(model["base"], config)})
    monkeypatch.setitem(sys.modules, "peft", peft)
    rows, _ = measure(TINY["lora_training"](), SETTING)
    assert {row["impl"]: row["failure"] for row in rows}["peft_lora"] is None
    layer = peft_layer(nn.Linear(3, 2), torch.ones(4, 3), torch.ones(2, 4), 2.0)
    assert layer.scale == 2.0


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)  # listing GPU cases needs no GPU
@pytest.mark.parametrize("suite", ["quick", "full"])
@pytest.mark.parametrize("op", REGISTRY)
def test_cases_have_unique_names_and_known_targets(op, suite, device):
    found = cases(op, device, suite)
    assert len({case.name for case in found}) == len(found) > 0
    for case in found:
        contestants = [c.name for c in case.contestants]
        assert len(set(contestants)) == len(contestants) and case.op == op
        assert case.headline in contestants and case.flops > 0 and case.bytes > 0
        for target in case.targets:
            assert target.impl in contestants and target.baseline in (*contestants, "best")


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("op", REGISTRY)
def test_every_quick_case_has_two_baselines_that_do_the_same_work(op, device):
    for case in cases(op, device, "quick"):
        assert len([c for c in case.contestants if not c.ours and not c.yardstick]) >= 2, case.name


@pytest.mark.parametrize("head", [False, True])
def test_losses_of_chunks_are_the_loss(head):
    """Five sequences of 128 tokens, the last one shorter, in chunks of two."""
    s = linear_nce.Shape(600, 8, 50, head=head)
    inputs = linear_nce._make(s, torch.float64, CPU)(0)
    whole = linear_nce._run(linear_nce._eager, head)(inputs)()
    chunked = linear_nce._chunked(256, head)(inputs)()
    assert set(chunked) == set(whole) == {"loss", "d_student"} | ({"d_weight"} if head else set())
    for name, values in whole.items():
        torch.testing.assert_close(chunked[name], values)


def test_log_probabilities_of_chunks_are_checkpointed_where_gradients_are_wanted():
    inputs = linear_logprob._make(linear_logprob.Shape(300, 8, 4096, train=True), torch.float32, CPU)(0)
    whole = linear_logprob._run(log_softmax_logprob)(inputs)
    chunked = linear_logprob._run(partial(chunked_logprob, chunk=64))(inputs)
    for name, values in whole().items():
        torch.testing.assert_close(chunked()[name], values)
    assert timing.peak_bytes(chunked, CPU) < timing.peak_bytes(whole, CPU) / 3


def gpu_cases(op, prefix):
    found = [case for case in cases(op, CUDA, "full") if case.name.startswith(prefix)]
    assert found and all(case.dtype == torch.bfloat16 for case in found)
    return found, [{c.name for c in case.contestants} for case in found]


@pytest.mark.parametrize(("prefix", "graph"), [("d1_", ""), ("d2_", "_graph")])
def test_gpu_cases_of_dual_lora(prefix, graph):
    found, contestants = gpu_cases("dual_lora", prefix)
    shapes = {(case.shape["T"], case.shape["R"]) for case in found}
    assert shapes == ({(8192, 8), (8192, 16), (8192, 64)} if prefix == "d1_" else {(1, 16), (16, 16), (64, 16)})
    assert all(case.shape["d"] == 4096 for case in found)
    wanted = {f"{name}{graph}" for name in ("calm_fast", "formula", "compiled_formula", "base_linear", "peft_lora")}
    assert all(wanted <= names for names in contestants)
    for variant in ("released", "paper"):
        assert len([case for case in found if variant in case.name]) == len(found) / 2


@pytest.mark.parametrize(
    ("op", "case", "wanted"),
    [
        ("linear_nce", "n1", {"three_softmax", "compiled_three_softmax", "liger_fused_linear_jsd"}),
        (
            "linear_logprob",
            "l1_score",
            {"product", "log_softmax", "liger_fused_linear_cross_entropy", "cut_cross_entropy"},
        ),
    ],
)
def test_gpu_cases_of_the_vocabulary(op, case, wanted):
    found, contestants = gpu_cases(op, case)
    assert found[0].name == case and wanted <= contestants[0]
    assert found[0].shape == {"T": 8192, "d": 4096, "V": 128256}


def test_memory_target_of_linear_logprob_is_64_mib():
    (score,) = (case for case in cases("linear_logprob", CUDA, "quick") if case.name == "l1_score")
    (memory,) = (target for target in score.targets if target.quantity == "peak_bytes")
    logits = score.shape["T"] * score.shape["V"] * 2
    assert memory.baseline == "product" and logits / memory.least == 64 << 20  # product holds only the logits
