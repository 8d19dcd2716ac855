"""A composition computes the equation of CALM and does not change its parts."""

from __future__ import annotations

import copy
import gc
import os
import shutil
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, composed_model, prompts, randomize
from torch import nn
from transformers.cache_utils import DynamicLayer

from calm_fast.hf import ComposedCache, ComposedForCausalLM, compose, find_layers
from calm_fast.hf.hooks import running
from calm_fast.hf.inputs import AugmenterCall
from calm_fast.hf.masks import Visibility

PACKED = [name for name, family in FAMILIES.items() if family.positions]


def llama_pair(depth: int = 4) -> tuple[nn.Module, nn.Module]:
    return FAMILIES["llama"].model(0), FAMILIES["llama"].model(1, width=24, depth=depth)


@torch.no_grad()
def states(model: nn.Module, ids: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    return model(ids, output_hidden_states=True, **kwargs).hidden_states


def entering(composed: ComposedForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the input of the anchor's layer 0 (some families record hidden_states[0] before it)."""
    seen: list[torch.Tensor] = []
    layer = find_layers(composed.anchor)[1][0]
    handle = layer.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    composed(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pair", [(-1, -1), (-1, 0), (0, -1), (1, 1)])
@torch.no_grad()
def test_a_connection_computes_its_module_on_the_two_hidden_states(name: str, pair: tuple[int, int]) -> None:
    anchor, augmenter, ids = FAMILIES[name].model(0), FAMILIES[name].model(1), prompts()
    # requested before composing, so that transformers installs its recording hooks first
    read, written = states(augmenter, ids)[pair[0] + 1], states(anchor, ids)[pair[1] + 1]
    composed = randomize(compose(anchor, augmenter, [pair]))
    expected = composed.connections[0](written, read, causal=True)
    got = entering(composed, ids) if pair[1] == -1 else states(composed, ids)[pair[1] + 1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_residuals_of_several_augmenters_at_one_layer_add() -> None:
    anchor, first = llama_pair()
    second = FAMILIES["gpt2"].model(2, width=16)
    ids = prompts()
    both = randomize(compose(anchor, [first, second], [[(3, 1)], [(-1, 1), (2, 1)]]))
    plain = states(anchor, ids)[2]
    alone = []
    for index, (model, pair) in enumerate([(first, (3, 1)), (second, (-1, 1)), (second, (2, 1))]):
        one = compose(anchor, model, [pair])
        one.connections[0].load_state_dict(both.connections[index].state_dict())
        alone.append(states(one, ids)[2] - plain)
    torch.testing.assert_close(states(both, ids)[2], plain + sum(alone), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_several_augmenters_generate_as_recomputed(kwargs: dict[str, Any]) -> None:
    anchor, first = llama_pair()
    augmenters = [first, FAMILIES["bloom"].model(2, width=16), FAMILIES["gemma3_text"].model(3)]
    composed = randomize(compose(anchor, augmenters, ["uniform:2", [(0, -1), (1, 0)], "uniform:3"]))
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cached = composed.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "cache_implementation"}
    again = composed.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False, **kwargs)
    assert torch.equal(cached, again)


@pytest.mark.parametrize("pads", [slice(0, 4), slice(6, 9)])
@torch.no_grad()
def test_padding_gets_no_residual_at_all(pads: slice) -> None:
    anchor, augmenter = llama_pair()
    composed = randomize(compose(anchor, augmenter, [(1, 0)], bias=True))
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[1, pads] = 0
    plain, read = states(anchor, ids, attention_mask=mask)[1], states(composed, ids, attention_mask=mask)[1]
    assert torch.equal(read[mask == 0], plain[mask == 0])
    assert (read - plain)[mask == 1].abs().amax(-1).min() > 0


def test_prompt_lookup_crops_every_part_of_the_cache() -> None:
    composed = composed_model("llama")
    ids = prompts(1, 4).repeat(1, 3)
    greedy = composed.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(composed.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3), greedy)


@torch.no_grad()
def test_anchor_and_augmenter_used_alone_are_untouched() -> None:
    anchor, augmenter = llama_pair()
    ids = prompts()
    before = anchor(ids).logits, augmenter(ids).logits
    generated = anchor.generate(ids, max_new_tokens=5, do_sample=False)
    keys = list(anchor.state_dict()), list(augmenter.state_dict())
    composed = randomize(compose(anchor, augmenter, [(-1, -1), (3, 0), (1, 2)]))
    assert not torch.equal(composed(ids).logits, before[0])
    assert torch.equal(anchor(ids).logits, before[0]) and torch.equal(augmenter(ids).logits, before[1])
    assert torch.equal(anchor.generate(ids, max_new_tokens=5, do_sample=False), generated)
    assert (list(anchor.state_dict()), list(augmenter.state_dict())) == keys
    assert anchor.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_two_compositions_share_an_anchor() -> None:
    anchor, augmenter = llama_pair()
    ids = prompts()
    first = randomize(compose(anchor, augmenter, [(0, 0), (3, 2)]), 1)
    alone = first(ids).logits
    second = randomize(compose(anchor, augmenter, [(1, 0), (-1, -1)]), 2)
    assert torch.equal(first(ids).logits, alone)
    assert not torch.equal(second(ids).logits, alone)
    assert first.anchor is second.anchor
    mirrored = randomize(compose(augmenter, anchor, [(1, 1)]), 3)  # the roles swapped, on the same layers
    assert torch.isfinite(mirrored(ids).logits).all() and torch.equal(first(ids).logits, alone)


@torch.no_grad()
def test_a_model_composes_with_itself() -> None:
    anchor, _ = llama_pair()
    composed, ids = randomize(compose(anchor, anchor, [(2, 0), (-1, 1)])), prompts()
    plain = anchor(ids).logits
    assert not torch.equal(composed(ids).logits, plain) and torch.equal(anchor(ids).logits, plain)


@torch.no_grad()
def test_deepcopy_is_a_composition_of_its_own() -> None:
    composed, ids = composed_model("llama"), prompts()
    expected = composed(ids).logits
    twin = copy.deepcopy(composed)
    assert torch.equal(twin(ids).logits, expected)
    for parameter in composed.connections.parameters():
        parameter.zero_()
    assert torch.equal(twin(ids).logits, expected) and not torch.equal(composed(ids).logits, expected)
    anchor = copy.deepcopy(twin.anchor)
    assert torch.equal(anchor(ids).logits, twin.anchor(ids).logits)


def test_hooks_go_with_the_composition() -> None:
    anchor, augmenter = llama_pair()
    composed = compose(anchor, augmenter, [(-1, -1), (3, 0), (1, 2)])
    layers = [*anchor.model.layers, *augmenter.model.layers]
    assert sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers) == 6
    del composed
    gc.collect()
    assert sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in layers) == 0


@torch.no_grad()
def test_an_error_inside_a_forward_leaves_no_hook_active() -> None:
    composed, ids = composed_model("llama"), prompts()
    plain, expected = composed.anchor(ids).logits, composed(ids).logits
    handle = composed.anchor.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        composed(ids)
    handle.remove()
    assert torch.equal(composed.anchor(ids).logits, plain) and torch.equal(composed(ids).logits, expected)


def test_augmenter_stops_after_its_last_connected_layer() -> None:
    anchor, augmenter = llama_pair(depth=4)
    expected = augmenter(prompts()).logits
    composed = randomize(compose(anchor, augmenter, [(-1, 0), (1, 2)]))
    assert torch.equal(augmenter(prompts()).logits, expected) and len(augmenter.model.layers) == 4
    ran = []
    for index, layer in enumerate(augmenter.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    augmenter.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    composed(prompts())
    assert ran == [0, 1]
    kept = {name for name, _ in composed.augmenters[0].named_parameters()}
    assert not any(name.startswith(("lm_head", "model.layers.2", "model.layers.3")) for name in kept)
    assert composed.augmenters[0].model.layers[1] is augmenter.model.layers[1]


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    composed, ids = composed_model(name), prompts(1, 11)
    positions = torch.cat([torch.arange(4), torch.arange(7)])[None]
    packed = composed(ids, position_ids=positions)
    apart = torch.cat([composed(ids[:, :4]).logits, composed(ids[:, 4:]).logits], 1)
    torch.testing.assert_close(packed.logits, apart, rtol=0, atol=1e-4)
    assert packed.cache is None


@torch.no_grad()
def test_intervals_and_tokens_from_outside() -> None:
    composed, ids, other = composed_model("llama", [(1, 1)]), prompts(), prompts(2, 6, seed=8)
    causal = torch.arange(1, 10, dtype=torch.int32).expand(2, 9)
    expected = composed(ids).logits
    torch.testing.assert_close(composed(ids, hi=causal).logits, expected, rtol=0, atol=1e-5)
    hi = torch.tensor([[0, 0, 1, 1, 3, 3, 4, 6, 6], [0, 2, 2, 2, 2, 5, 5, 5, 6]], dtype=torch.int32)
    read = states(FAMILIES["llama"].model(1), other)[2]
    written = states(composed.anchor, ids)[2]
    outside = states(composed, ids, augmenter_input_ids=[other], hi=[hi])[2]
    torch.testing.assert_close(outside, composed.connections[0](written, read, None, hi), rtol=0, atol=1e-5)
    assert torch.equal(outside[0, :2], written[0, :2])  # an empty interval adds nothing


@pytest.mark.parametrize("pair", [(-1, -1), (1, 1)])
@torch.no_grad()
def test_outside_tokens_with_a_cache_equal_all_at_once(pair: tuple[int, int]) -> None:
    composed, ids, other = composed_model("llama", [pair]), prompts(), prompts(2, 6, seed=8)
    hi = torch.tensor([0, 0, 1, 1, 3, 3, 4, 5, 6], dtype=torch.int32).expand(2, 9)
    want = composed(ids, augmenter_input_ids=other, hi=hi).logits
    first = composed(ids[:, :7], augmenter_input_ids=other[:, :4], hi=hi[:, :7], use_cache=True)
    cache = first.cache
    assert cache.get_seq_length() == 7  # the anchor's tokens, not the augmenter's
    rest = composed(ids[:, 7:], cache=cache, augmenter_input_ids=other[:, 4:], hi=hi[:, 7:])
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_intervals_follow_the_layer_to_its_device(monkeypatch) -> None:
    composed, seen = composed_model("llama", [(1, 1)]), []

    def forward(hidden: torch.Tensor, *others: Any, causal: bool) -> torch.Tensor:
        seen.extend(t.device.type for t in others if t is not None)
        return hidden

    monkeypatch.setattr(composed.connections[0], "forward", forward)
    hi = torch.arange(1, 10, dtype=torch.int32).expand(2, 9)
    states = {(0, 1): torch.randn(2, 9, 8)}
    hidden = torch.empty(2, 9, 8, device="meta")  # a layer that a device map put on another device than the inputs
    calls = [AugmenterCall({}, Visibility(torch.zeros_like(hi), hi, False))]
    composed._add_residuals(states, calls, None, 9, 0, 1, hidden)
    assert seen == ["meta"] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_connections_are_float32_by_default_over_smaller_dtypes(dtype: torch.dtype) -> None:
    composed = compose(*(model.to(dtype) for model in llama_pair()), "uniform:2")
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in composed.connections.parameters()} == {expected}


@pytest.mark.seam(
    attach="bfloat16 or float16 parts, trained with the default dtype",
    to="composition",
    result="works",
    why="the connections are float32 and compute in the dtype of the parts",
)
def test_small_steps_move_every_parameter_of_a_composition_over_bfloat16() -> None:
    composed, ids = randomize(compose(*(model.to(torch.bfloat16) for model in llama_pair()), "uniform:2")), prompts()
    parameters = list(composed.connections.parameters())
    before = [p.detach().clone() for p in parameters]
    composed(ids, labels=ids).loss.backward()
    torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0).step()
    moved = sum(int((p != q)[p.grad != 0].sum()) for p, q in zip(parameters, before, strict=True))
    assert moved == sum(int((p.grad != 0).sum()) for p in parameters)


@torch.no_grad()
def test_float32_connections_over_bfloat16_models_are_as_exact_as_bfloat16_ones() -> None:
    def composed(dtype: torch.dtype, parts: torch.dtype) -> ComposedForCausalLM:
        models = (model.to(torch.bfloat16).to(parts) for model in llama_pair())
        return compose(*models, "uniform:3", dtype=dtype)

    exact = randomize(composed(torch.float64, torch.float64))
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        one = composed(dtype, torch.bfloat16)
        one.connections.load_state_dict(exact.connections.state_dict())
        errors.append((one(prompts()).logits.double() - exact(prompts()).logits).pow(2).mean().sqrt())
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_composition_over_bfloat16_models(autocast: bool) -> None:
    anchor, augmenter = (model.to(torch.bfloat16) for model in llama_pair())
    composed = randomize(compose(anchor, augmenter, "uniform:2", dtype=torch.float32))
    ids = prompts()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = composed(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    for parameter in composed.connections.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


def test_cache_reports_and_resets_every_part() -> None:
    composed, ids = composed_model("llama"), prompts()
    cache = composed(ids).cache
    assert isinstance(cache, ComposedCache) and not cache.is_compileable
    assert len(cache.layers) == 3 + 3 + 3 and all(layer.get_seq_length() == 9 for layer in cache.layers)
    cache.crop(-2)
    assert cache.get_seq_length() == cache.anchor.get_seq_length() == 7
    cache.batch_select_indices(torch.tensor([1]))
    assert all(layer.keys.shape[0] == 1 for layer in cache.layers)
    cache.reset()
    plain = DynamicLayer()
    plain.update(*torch.ones(2, 1, 1, 7, 2))
    plain.reset()  # to length 0, or in older releases to zeros
    assert all(layer.get_seq_length() == plain.get_seq_length() for layer in cache.layers)


@pytest.mark.parametrize("name", ["mamba", "mpt", "gptj", "qwen3_next", "olmo_hybrid"])
def test_families_that_name_things_differently(name: str) -> None:
    family, ids = OTHERS[name], prompts()
    composed = compose(family.model(0), family.model(1), [(-1, -1), (0, 1)], num_heads=4)
    with torch.no_grad():
        assert torch.equal(composed(ids).logits, composed.anchor(ids).logits)
    randomize(composed)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(composed.generate(ids, use_cache=True, **how), composed.generate(ids, use_cache=False, **how))
    with torch.no_grad():
        full = composed(ids, use_cache=False).logits
        first = composed(ids[:, :8], use_cache=True)  # one token left: Mamba itself can continue with no more
        rest = composed(ids[:, 8:], cache=first.cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), full, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_compiles_as_one_graph(backend: str) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "")))):
        pytest.skip("inductor compiles C++ on a CPU: neither g++, clang++ nor $CXX is here")
    composed, ids = composed_model("llama", [(-1, -1), (2, 2)]), prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    torch.compiler.reset()
    compiled = torch.compile(composed, fullgraph=True, backend=backend)
    packed = {"position_ids": torch.cat([torch.arange(4), torch.arange(5)])[None]}
    # every new combination compiles again, which is slow with inductor
    for kwargs in ({}, packed, {"attention_mask": mask})[-1 if backend == "inductor" else 0 :]:
        expected = composed(ids, labels=ids, **kwargs)
        outputs = compiled(ids, labels=ids, **kwargs)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=5e-5)
    outputs.loss.backward()
    got = [p.grad.clone() for p in composed.connections.parameters()]
    composed.zero_grad()
    expected.loss.backward()
    for gradient, parameter in zip(got, composed.connections.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
    assert isinstance(composed, ComposedForCausalLM) and running() is None


@pytest.mark.parametrize(("width", "head_dim", "heads"), [(128, None, 2), (32, 8, 4)])
def test_an_anchor_without_attention_heads_gets_them_from_its_width(
    width: int, head_dim: int | None, heads: int
) -> None:
    mamba = OTHERS["mamba"].model(width=width)
    composed = compose(mamba, FAMILIES["llama"].model(1), [(0, 1)], head_dim=head_dim)
    assert composed.connections[0].num_heads == heads


@torch.no_grad()
def test_the_head_gets_states_of_their_own_on_a_cpu() -> None:
    """torch multiplies a slice of several rows by one copy of the weight per row."""
    seen: list[bool] = []
    model, ids = composed_model("llama"), prompts(batch=3)
    model.anchor.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    whole = model(ids).logits
    for keep in (1, 4):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, whole[:, -keep:])
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert len(seen) == 5 and all(seen)
