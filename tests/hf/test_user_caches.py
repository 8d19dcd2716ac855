"""Caches that users bring: empty ones are taken and remembered, others are refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, composed_model, prompts, randomize
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from calm_fast.hf import ComposedCache, ComposedForCausalLM, compose
from calm_fast.hf.cache_names import generate_argument

GREEDY = {"max_new_tokens": 4, "do_sample": False}
NAME = generate_argument()  # "cache", and before transformers 5.24 "past_key_values"


def dynamic(model: ComposedForCausalLM) -> Cache:
    return DynamicCache(config=model.config)


def bare(model: ComposedForCausalLM) -> Cache:
    return DynamicCache()


def static(model: ComposedForCausalLM) -> Cache:
    return StaticCache(config=model.config, max_cache_len=40)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            dynamic,
            marks=pytest.mark.seam(
                attach="an empty `DynamicCache`, passed again turn after turn",
                to="composition",
                result="works",
                why="the object remembers what the augmenters have read",
            ),
        ),
        bare,
        pytest.param(
            static,
            marks=pytest.mark.seam(
                attach="an empty `StaticCache`, passed again turn after turn",
                to="composition",
                result="works",
                why="it holds the anchor's part; the others grow",
            ),
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_chat_keeps_one_cache_object(family: str, build: Callable[[Any], Cache]) -> None:
    model, ids = composed_model(family), prompts()
    cache = build(model)
    for turn in range(3):
        expected = model.generate(ids, **GREEDY, use_cache=False)
        assert torch.equal(model.generate(ids, **GREEDY, **{NAME: cache}), expected)
        ids = torch.cat([expected, prompts(2, 3, seed=turn)], dim=1)


def test_a_hand_written_loop_may_pass_its_own_object() -> None:
    model, ids = composed_model("llama"), prompts()
    expected, cache, step = model.generate(ids, **GREEDY), DynamicCache(config=model.config), ids
    for _ in range(GREEDY["max_new_tokens"]):
        with torch.no_grad():
            outputs = model(step, **{NAME: cache})
        step = outputs.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], dim=1)
    assert torch.equal(ids, expected)
    assert isinstance(outputs.cache, ComposedCache) and outputs.cache.anchor is cache


@pytest.mark.seam(
    attach="`copy.deepcopy` of a filled cache, yours or ours",
    to="composition",
    result="works",
    why="both continue by themselves, so a prefix is read once",
)
def test_a_prefix_is_read_once_for_several_questions() -> None:
    model, prefix = composed_model("llama"), prompts(1, 12)
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        outputs = model(prefix, **{NAME: own})
    for seed in range(2):
        ids = torch.cat([prefix, prompts(1, 3, seed=seed)], dim=1)
        expected = model.generate(ids, **GREEDY, use_cache=False)
        for kept in (own, outputs.cache):
            assert torch.equal(model.generate(ids, **GREEDY, **{NAME: copy.deepcopy(kept)}), expected)
    assert own.get_seq_length() == 12
    again = pickle.loads(pickle.dumps(outputs.cache))
    assert torch.equal(model.generate(ids, **GREEDY, **{NAME: again}), expected)


@pytest.mark.seam(
    attach='`QuantizedCache`, `cache_implementation="quantized"`',
    to="composition",
    result="works",
    why="the anchor's part is quantised as the anchor's own would be; the others are not",
)
def test_a_quantised_cache_holds_the_anchors_part() -> None:
    how = GREEDY | {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    anchor, ids = FAMILIES["llama"].model(0), prompts()
    try:
        expected = anchor.generate(ids, **how)
    except ValueError as problem:
        pytest.skip(str(problem))
    untrained = compose(anchor, FAMILIES["llama"].model(1), [(0, 1)])
    assert torch.equal(untrained.generate(ids, **how), expected)
    own = QuantizedCache(backend="fp8", config=untrained.config)
    assert torch.equal(untrained.generate(ids, **GREEDY, **{NAME: own}), expected)


def foreign(model: ComposedForCausalLM, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.anchor(ids, **{NAME: cache}, use_cache=True)
    return cache


def of_another(model: ComposedForCausalLM, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return randomize(copy.deepcopy(model), 9)(ids, use_cache=True).cache


def held_by_another(model: ComposedForCausalLM, ids: torch.Tensor) -> Any:
    return of_another(model, ids).anchor


def changed(model: ComposedForCausalLM, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{NAME: cache})
        model.anchor(ids[:, :1], **{NAME: cache}, use_cache=True)
    return cache


def pair(model: ComposedForCausalLM, ids: torch.Tensor) -> Any:
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        pytest.param(
            foreign,
            "a DynamicCache that another model filled.*pass an empty cache and all tokens",
            marks=pytest.mark.seam(
                attach="a cache that another model filled, or the anchor alone",
                to="composition",
                result="refused",
                why="the augmenters have not read its tokens; pass an empty cache and all tokens",
            ),
        ),
        pytest.param(
            of_another,
            "the ComposedCache of another composition",
            marks=pytest.mark.seam(
                attach="the ComposedCache of another composition",
                to="composition",
                result="refused",
                why="each composition has its own; start a new cache",
            ),
        ),
        (held_by_another, "a DynamicCache that another model filled"),
        pytest.param(
            changed,
            "a DynamicCache that was changed since; crop or reset outputs",
            marks=pytest.mark.seam(
                attach="a cache of your own that was cropped or continued without the composition",
                to="composition",
                result="refused",
                why="only the anchor's part changed; crop or reset `outputs.cache`",
            ),
        ),
        pytest.param(
            pair,
            "got EncoderDecoderCache",
            marks=pytest.mark.seam(
                attach="an `EncoderDecoderCache`, a tuple of tensors",
                to="composition",
                result="refused",
                why="the anchor is a decoder; pass a DynamicCache or none",
            ),
        ),
        (lambda model, ids: ((ids, ids),), "got tuple"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_another_models_cache_is_refused(build: Callable[..., Any], problem: str, call: str) -> None:
    model, ids = composed_model("llama"), prompts(1)
    cache = build(model, ids[:, :-1])
    with pytest.raises(ValueError, match=rf"`{NAME}` must be .*{problem}"):
        if call == "forward":
            model(ids[:, -1:], **{NAME: cache})
        else:
            model.generate(ids, **GREEDY, **{NAME: cache})


def test_an_emptied_cache_is_taken_by_another_composition() -> None:
    model, ids = composed_model("llama"), prompts(1)
    cache = DynamicCache(config=model.config)
    model.generate(ids, **GREEDY, **{NAME: cache})
    cache.layers = DynamicCache(config=model.config).layers
    other = randomize(compose(model.anchor, FAMILIES["llama"].model(1), [(1, 1)]), 5)
    expected = other.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(other.generate(ids, **GREEDY, **{NAME: cache}), expected)


@pytest.mark.seam(
    attach="one cache used by two threads at once",
    to="composition",
    result="refused",
    why="give each thread its own; `copy.deepcopy` copies a prefix",
)
def test_two_threads_cannot_use_one_cache_at_once() -> None:
    model, ids = composed_model("llama"), prompts(1)
    cache, inside, problems = DynamicCache(config=model.config), threading.Event(), []
    done = threading.Event()

    def wait(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inside.set()
        done.wait(30)
        return scores

    def other() -> None:
        inside.wait(30)
        try:
            model(ids, **{NAME: known})
        except ValueError as problem:
            problems.append(str(problem))
        finally:
            done.set()

    with torch.no_grad():
        known = model(ids[:, :2], **{NAME: cache}).cache
    thread = threading.Thread(target=other)
    thread.start()
    got = model.generate(ids, **GREEDY, **{NAME: known}, logits_processor=[wait])
    thread.join()
    assert torch.equal(got, model.generate(ids, **GREEDY, use_cache=False))
    assert len(problems) == 1 and "must be used by one thread at a time" in problems[0]
    with torch.no_grad():
        model(got[:, -1:], **{NAME: known})  # free again


def empties() -> bool:
    """Return True if the installed transformers empties a growing layer on reset; earlier ones write zeros into it."""
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    layer.reset()
    return layer.get_seq_length() == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_crop_and_reset_reach_every_part(family: str) -> None:
    model, ids = composed_model(family), prompts(2, 5)
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
        expected = model(ids[:, 2:4], **{NAME: model(ids[:, :2], use_cache=True).cache}).logits
        cache.crop(-3)
        got = model(ids[:, 2:4], **{NAME: cache}).logits
        torch.testing.assert_close(got, expected)
        if not empties():
            with pytest.raises(ValueError, match="transformers' own reset leaves filled; start a new cache"):
                cache.reset()
            return
        cache.reset()
        torch.testing.assert_close(model(ids[:, :4], **{NAME: cache}).logits[:, 2:], expected)


@pytest.mark.seam(
    attach="`cache.crop` after an augmenter read tokens of its own",
    to="composition",
    result="refused",
    why="which of its tokens to remove is known only where an aligner made them; start a new cache",
)
def test_a_cache_with_an_augmenters_own_tokens_is_not_cropped() -> None:
    model, ids = composed_model("llama"), prompts()
    hi = torch.full((2, 9), 4, dtype=torch.int32)
    with torch.no_grad():
        cache = model(ids, augmenter_input_ids=ids[:, :4], hi=hi, use_cache=True).cache
    with pytest.raises(ValueError, match="crop: augmenter 0 must read the anchor's tokens, got tokens of its own"):
        cache.crop(-1)


@pytest.mark.seam(
    attach="a filled cache with a prompt that is not longer than it, in generate",
    to="composition",
    result="refused",
    why="another text needs a new cache; crop a cache that holds the whole prompt by one token",
)
@pytest.mark.parametrize("build", [dynamic, static])
@pytest.mark.parametrize("tokens", [3, 4])
def test_generate_goes_on_after_the_cached_tokens(build: Callable[[Any], Cache], tokens: int) -> None:
    model, ids = composed_model("llama"), prompts()[:, :4]
    cache = build(model)
    with torch.no_grad():
        model(ids, **{NAME: cache})
    with pytest.raises(ValueError, match=r"generate: `input_ids` must be a whole text .* the 4 tokens cached"):
        model.generate(ids[:, :tokens], **GREEDY, **{NAME: cache})
    longer = prompts()[:, :5]
    assert torch.equal(model.generate(longer, **GREEDY, **{NAME: cache}), model.generate(longer, **GREEDY))


def test_a_cache_of_the_whole_prompt_is_cropped_by_one() -> None:
    model, ids = composed_model("llama"), prompts()
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
    cache.crop(-1)
    assert torch.equal(model.generate(ids, **GREEDY, **{NAME: cache}), model.generate(ids, **GREEDY))
