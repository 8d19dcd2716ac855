"""Every tested family: identity at init, no leak, and cached generation equal to recomputation."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, composed_model, left_padded, prompts

from calm_fast.hf import ComposedCache, ComposedForCausalLM, compose
from calm_fast.hf.cache_names import cache_argument, cache_of

NAMES = list(FAMILIES)
each_family = pytest.mark.parametrize("name", NAMES)
STEPS = 7


@cache
def shared(name: str) -> ComposedForCausalLM:
    """One composition per family, for tests that do not change it."""
    return composed_model(name)


def recompute(model: Any, ids: torch.Tensor, steps: int = STEPS) -> torch.Tensor:
    """Continue greedily, each step from scratch through the plain forward, without cache or generate()."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@each_family
@torch.no_grad()
def test_logits_at_init_are_the_anchors_bit_for_bit(name: str) -> None:
    anchor, augmenter = FAMILIES[name].model(0), FAMILIES[name].model(1)
    ids = prompts()
    padded, mask = left_padded(ids)
    before = [anchor(ids).logits, anchor(padded, attention_mask=mask).logits]
    state = copy.deepcopy(anchor.state_dict())
    composed = compose(anchor, augmenter, [(-1, -1), (0, 1), (2, 2)])
    after = [composed(ids).logits, composed(padded, attention_mask=mask).logits]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert anchor.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in anchor.state_dict().items())


def stepwise(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits of a left-padded batch in two cached pieces; the model computes the positions."""
    first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    return model(ids[:, 6:], attention_mask=mask, **{cache_argument(model.forward): cache_of(first)}).logits


@each_family
@torch.no_grad()
def test_cached_steps_at_init_are_the_anchors_bit_for_bit(name: str) -> None:
    anchor, augmenter = FAMILIES[name].model(0), FAMILIES[name].model(1)
    padded, mask = left_padded(prompts())
    expected = stepwise(anchor, padded, mask)
    assert torch.equal(stepwise(compose(anchor, augmenter, [(0, 1), (1, -1)]), padded, mask), expected)


@each_family
@torch.no_grad()
def test_a_future_token_never_moves_earlier_logits(name: str) -> None:
    composed, ids = shared(name), prompts()
    plain = composed(ids).logits
    for changed in (5, 8):
        other = ids.clone()
        other[:, changed] = (other[:, changed] - 1) % EOS
        moved = composed(other).logits
        torch.testing.assert_close(moved[:, :changed], plain[:, :changed], rtol=0, atol=2e-5)
        assert (moved[:, changed:] - plain[:, changed:]).abs().amax() > 1e-2


@each_family
@torch.no_grad()
def test_padding_content_never_matters(name: str) -> None:
    composed, ids = shared(name), prompts()
    positions = torch.arange(9).expand(2, 9)
    for pads in (slice(0, 3), slice(7, 9)):  # left, right
        mask = torch.ones_like(ids)
        mask[0, pads] = 0
        where = (mask.cumsum(1) - 1).clamp(min=0) if pads.start == 0 else positions
        first = composed(ids.masked_fill(mask == 0, 5), attention_mask=mask, position_ids=where).logits
        second = composed(ids.masked_fill(mask == 0, 50), attention_mask=mask, position_ids=where).logits
        real = mask.bool()
        assert torch.equal(first[real], second[real])
        short = composed(ids[:1, mask[0].bool()]).logits  # the row alone, without padding
        torch.testing.assert_close(first[:1][real[:1]], short[0], rtol=0, atol=5e-5)


@each_family
def test_greedy_generation_equals_recomputation(name: str) -> None:
    composed, ids = shared(name), prompts()
    expected = recompute(composed, ids)
    assert torch.equal(composed.generate(ids, max_new_tokens=STEPS, do_sample=False, eos_token_id=None), expected)
    # the composition has an effect: the anchor alone gives other tokens
    assert not torch.equal(recompute(composed.anchor, ids), expected)


VARIANTS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
    "static chunked": {"cache_implementation": "static", "prefill_chunk_size": 4},
}
HOW_TO_CACHE = ("cache_implementation", "prefill_chunk_size")


@each_family
@pytest.mark.parametrize("padding", ["no padding", "left padding"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_generation_equals_recomputation(name: str, variant: str, padding: str) -> None:
    composed, ids, mask = shared(name), prompts(), None
    if variant == "static chunked" and not FAMILIES[name].static_chunks:
        with pytest.raises(RuntimeError, match="index_copy_"):  # it fails without a composition too
            composed.anchor.generate(ids, max_new_tokens=2, **VARIANTS[variant])
        return
    if padding == "left padding":
        ids, mask = left_padded(ids)
    how = {"do_sample": False, "max_new_tokens": STEPS, "attention_mask": mask} | VARIANTS[variant]
    torch.manual_seed(0)
    cached = composed.generate(ids, **how)
    torch.manual_seed(0)
    plain = {key: value for key, value in how.items() if key not in HOW_TO_CACHE}
    assert torch.equal(cached, composed.generate(ids, use_cache=False, **plain))
    assert cached.shape[0] == 2 * how.get("num_return_sequences", 1)


@each_family
def test_left_padded_row_generates_what_it_generates_alone(name: str) -> None:
    composed, (ids, mask) = shared(name), left_padded(prompts())
    together = composed.generate(ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    alone = recompute(composed, ids[:1, 4:])
    assert torch.equal(together[:1, 4:], alone)


@each_family
@torch.no_grad()
def test_cached_logits_equal_full_logits_step_by_step(name: str) -> None:
    composed, ids = shared(name), prompts(2, 8)
    full = composed(ids, use_cache=False).logits
    outputs = composed(ids[:, :3], use_cache=True)
    steps = [outputs.logits]
    for piece in (ids[:, 3:7], ids[:, 7:]):
        assert isinstance(outputs.cache, ComposedCache)
        outputs = composed(piece, cache=outputs.cache)
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-4)
    assert outputs.cache.get_seq_length() == 8


@each_family
def test_frozen_parts_get_no_gradient_and_no_dropout(name: str) -> None:
    composed = composed_model(name).train()
    ids = prompts()
    torch.manual_seed(1)
    first = composed(ids, labels=ids)
    torch.manual_seed(2)
    second = composed(ids, labels=ids)
    assert torch.equal(first.logits, second.logits) and first.cache is None
    first.loss.backward()
    for parameter_name, parameter in composed.named_parameters():
        if parameter_name.startswith("connections."):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert parameter.grad is None and not parameter.requires_grad, parameter_name
    assert all(not m.training for part in (composed.anchor, *composed.augmenters) for m in part.modules())
