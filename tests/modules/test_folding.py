"""The cost model against counted FLOPs, and changes that must drop kept folded weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from calm_fast import CrossAttention
from calm_fast.modules import folding
from calm_fast.modules.folding import FoldedWeights, key_value_cost, may_cache

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


def _counting_cache() -> tuple[FoldedWeights, list[int], object]:
    cache, calls = FoldedWeights(), []

    def get(*params: torch.nn.Parameter, extra: tuple = ()):
        def compute():
            calls.append(1)
            return (params[0] * 2,)

        return cache.get(params, extra, compute)[0]

    return cache, calls, get


def test_folded_weights_are_computed_once() -> None:
    _, calls, get = _counting_cache()
    p = torch.nn.Parameter(torch.randn(3))
    assert get(p) is get(p) and len(calls) == 1


@pytest.mark.parametrize("change", ["in_place", "optimizer", "load", "data_swap", "replace", "extra", "dtype"])
def test_folded_weights_follow_every_change(change: str) -> None:
    _, calls, get = _counting_cache()
    p = torch.nn.Parameter(torch.randn(3))
    module = torch.nn.Module()
    module.p = p
    get(p)
    extra: tuple = ()
    if change == "in_place":
        with torch.no_grad():
            p.add_(1)
    elif change == "optimizer":
        p.grad = torch.ones(3)
        torch.optim.AdamW([p]).step()
    elif change == "load":
        module.load_state_dict({"p": torch.zeros(3)})
    elif change == "data_swap":
        p.data = torch.randn(3)
    elif change == "replace":
        p = torch.nn.Parameter(torch.randn(3))
    elif change == "extra":
        extra = (torch.bfloat16,)
    else:
        module.double()
        p = module.p
    assert torch.equal(get(p, extra=extra), p.detach() * 2)
    assert len(calls) == 2


def test_folded_weights_can_be_cleared_after_a_write_through_data() -> None:
    cache, _, get = _counting_cache()
    p = torch.nn.Parameter(torch.randn(3))
    get(p)
    p.data.add_(1)  # moves no version counter: the documented case for clear()
    cache.clear()
    assert torch.equal(get(p), p.detach() * 2)


def test_folded_weights_are_neither_copied_nor_pickled() -> None:
    _, _, get = _counting_cache()
    layer = CrossAttention(8, 8, 2)
    h = torch.randn(1, 3, 8)
    with torch.no_grad():
        layer(h, h)
    assert layer._folded.value is not None
    assert copy.deepcopy(layer)._folded.value is None
    assert not any("folded" in key for key in layer.state_dict())


def test_may_cache_only_where_no_gradient_flows_and_changes_can_be_seen() -> None:
    p = torch.nn.Parameter(torch.randn(3))
    assert not may_cache((p,))
    with torch.no_grad():
        assert may_cache((p, None))
    with torch.inference_mode():
        assert may_cache((p,))
        made_here = torch.nn.Parameter(torch.randn(3))
        assert not may_cache((made_here,))
    p.requires_grad_(False)
    assert may_cache((p,))


def test_weights_kept_under_inference_mode_serve_gradients_later() -> None:
    layer = CrossAttention(8, 8, 2).requires_grad_(False)
    h = torch.randn(1, 3, 8)
    with torch.inference_mode():
        layer(h, h)
    leaf = h.clone().requires_grad_()
    layer(leaf, h).sum().backward()
    assert leaf.grad is not None
