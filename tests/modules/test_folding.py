"""The cost model of folding against counted FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calm_fast import CrossAttention
from calm_fast.modules import folding
from calm_fast.modules.folding import key_value_cost

DA, DB, KV, B, N = 24, 40, 16, 2, 33


def _counted(fold: bool, *, training: bool, augmenter_grad: bool) -> int:
    """Return the FLOPs that torch counts for k and v of a layer, folded or not."""
    layer = CrossAttention(DB, DA, 2, head_dim=KV // 2)
    layer.requires_grad_(training)
    hidden = torch.randn(B, N, DA, requires_grad=augmenter_grad)
    params = (layer.k_proj.weight, layer.v_proj.weight, layer.proj.weight)
    with FlopCounterMode(display=False) as counter:
        if fold:
            weight = torch.cat((params[0], params[1])) @ params[2]
            out = hidden @ weight.t()
        else:
            inner = hidden @ params[2].t()
            out = torch.cat((inner @ params[0].t(), inner @ params[1].t()), -1)
        if training or augmenter_grad:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("training", "augmenter_grad"), [(False, False), (True, False), (True, True)])
def test_cost_counts_the_flops_torch_counts(training: bool, augmenter_grad: bool) -> None:
    cost = key_value_cost(B * N, DA, DB, KV, training=training, augmenter_grad=augmenter_grad, cached=False)
    assert cost.folded == _counted(True, training=training, augmenter_grad=augmenter_grad)
    assert cost.unfolded == _counted(False, training=training, augmenter_grad=augmenter_grad)


def test_cost_folds_many_tokens_and_not_few() -> None:
    def folds(tokens: int, **kw) -> bool:
        defaults = dict(training=True, augmenter_grad=False, cached=False)
        return key_value_cost(tokens, 512, 768, 768, **(defaults | kw)).fold

    assert folds(8192) and not folds(64)
    assert folds(1, training=False, cached=True)
    assert not folds(1, training=False)
    # an fp32 fold without tensor cores costs 14 times more per FLOP than the bf16 products it saves
    assert not folds(2048, param_slowness=14.0)


def test_cost_keeps_the_inner_product_where_kv_is_wide() -> None:
    # DA much wider than DB: going through P's narrow output is the cheaper order, whatever the token count
    assert not key_value_cost(10**6, 4096, 256, 1024, training=False, augmenter_grad=False, cached=True).fold


def test_slowness_knows_tf32() -> None:
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        ieee = folding.slowness(torch.float32, "cuda")
        torch.set_float32_matmul_precision("high")
        assert folding.slowness(torch.float32, "cuda") < ieee
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"  # torch's newer way to allow it
        assert folding.slowness(torch.float32, "cuda") < ieee
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
    assert folding.slowness(torch.float32, "cpu") == folding.slowness(torch.bfloat16, "cpu")


def test_slowness_of_a_gpu_works_while_tracing() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * folding.slowness(torch.float32, "cuda")

    x = torch.ones(2)
    assert torch.equal(torch.compile(scaled, fullgraph=True, backend="eager")(x), scaled(x))
