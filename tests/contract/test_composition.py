"""Compositions of five families: the anchor at init, cached generation equals recomputation, Trainer, saved files."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, OTHERS, PAD, prompts, randomize
from transformers import AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from calm_fast import ComposedForCausalLM, compose, score_sequences
from calm_fast.consistency.sampling.prefix import PrefixReader
from calm_fast.hf import ComposedCache, find_layers

NAMES = ("llama", "gpt2", "gemma3_text", "mixtral", "mamba")
MODELS = FAMILIES | OTHERS
STEPS = 6
each_family = pytest.mark.parametrize("name", NAMES)


def fresh(name: str, parts: Any = None) -> ComposedForCausalLM:
    """Return an untrained composition of two models of one family."""
    anchor, augmenter = parts or (MODELS[name].model(0), MODELS[name].model(1))
    return compose(anchor, augmenter, [(-1, -1), (0, 1), (1, 2)], num_heads=4)


@cache
def shared(name: str) -> ComposedForCausalLM:
    """Return a composition with random weights, one per family, for tests that only read it."""
    return randomize(fresh(name))


def left_padded() -> dict[str, torch.Tensor]:
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@each_family
@torch.no_grad()
def test_an_untrained_composition_is_its_anchor(name: str) -> None:
    # frozen first: torch.matmul may choose another product for a weight that needs gradients (docs/numerics.md)
    anchor, inputs = MODELS[name].model(0).requires_grad_(False), left_padded()
    before = anchor(**inputs).logits
    assert torch.equal(fresh(name, (anchor, MODELS[name].model(1))).forward(**inputs).logits, before)


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}


@each_family
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_generation_equals_recomputation(name: str, variant: str) -> None:
    composed, inputs = shared(name), left_padded()
    how = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    how |= VARIANTS[variant]
    torch.manual_seed(0)
    cached = composed.generate(**inputs, **how)
    torch.manual_seed(0)
    how.pop("cache_implementation", None)
    assert torch.equal(cached, composed.generate(**inputs, **how, use_cache=False))
    # the row without padding, step by step through the plain forward, without generate() or a cache
    if variant in ("greedy", "static"):
        ids = inputs["input_ids"][1:]
        for _ in range(STEPS):
            with torch.no_grad():
                ids = torch.cat([ids, composed(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(cached[1:], ids)


@pytest.mark.parametrize("name", (*NAMES, "olmo_hybrid"))
@torch.no_grad()
def test_an_augmenter_that_stops_early_fills_its_cache(name: str) -> None:
    """Its last layer is not connected, so it never runs and has no entry in the cache."""
    parts, ids = [MODELS[name].model(0), MODELS[name].model(1)], prompts()
    composed = randomize(compose(*parts, [(0, 1), (1, 2)], num_heads=4))
    outputs = composed(ids[:, :8])
    assert all(layer.get_seq_length() == 8 for layer in outputs.cache.layers if hasattr(layer, "get_seq_length"))
    last = composed(ids[:, 8:], cache=outputs.cache).logits
    torch.testing.assert_close(last, composed(ids, use_cache=False).logits[:, 8:], rtol=0, atol=1e-4)
    assert PrefixReader(composed).shares == (name not in ("mamba", "olmo_hybrid"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        score_sequences(composed, [[5, 6, 7]], [[[8, 9], [10]]])


@pytest.mark.old_names
@each_family
@torch.no_grad()
def test_cached_steps_equal_one_forward(name: str) -> None:
    composed, ids = shared(name), prompts()
    full = composed(ids, use_cache=False).logits
    step = composed(ids[:, :8])
    assert isinstance(step.cache, ComposedCache) and step.past_key_values is step.cache
    for spelling in ("cache", "past_key_values"):
        again = composed(ids[:, :8]).cache
        last = composed(ids[:, 8:], **{spelling: again})
        torch.testing.assert_close(last.logits, full[:, 8:], rtol=0, atol=1e-4)


@each_family
def test_a_foreign_cache_is_refused(name: str) -> None:
    composed, ids = shared(name), prompts()
    for spelling in ("cache", "past_key_values"):
        foreign = DynamicCache(config=composed.anchor.config)
        with torch.no_grad():
            composed.anchor(ids[:, :-1], **{composed.signatures[0].cache: foreign}, use_cache=True)
        with pytest.raises(ValueError, match=f"`{spelling}` must be .* a DynamicCache that another model filled"):
            composed.generate(ids, max_new_tokens=2, **{spelling: foreign})


@each_family
def test_an_empty_cache_is_taken_turn_after_turn(name: str) -> None:
    composed, ids = shared(name), prompts()
    own = DynamicCache(config=composed.anchor.config)
    for _ in range(2):
        expected = composed.generate(ids, max_new_tokens=2, do_sample=False)
        assert torch.equal(composed.generate(ids, max_new_tokens=2, do_sample=False, cache=own), expected)
        ids = torch.cat([expected, ids[:, :1]], dim=1)


def trainer(model: ComposedForCausalLM, out: Path, steps: int, **more: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for row in prompts(12, 8, seed=11).tolist()]
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(out), max_steps=steps, **(settings | more))
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


@each_family
def test_trainer_trains_evaluates_and_resumes(name: str, tmp_path: Path) -> None:
    straight, resumed = fresh(name), fresh(name)
    whole = trainer(straight, tmp_path / "a", 4, save_strategy="steps", save_steps=2)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    trainer(resumed, tmp_path / "b", 4).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    expected, got = straight.connections.state_dict(), resumed.connections.state_dict()
    assert all(bool(value.any()) for key, value in expected.items() if "o_proj.weight" in key)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-6, msg=key)


@each_family
def test_gradient_checkpointing_reaches_the_layers_above_the_first_connection(name: str) -> None:
    composed, ids = randomize(fresh(name)).train(), prompts()

    def gradients() -> list[torch.Tensor]:
        composed.zero_grad()
        composed(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in composed.connections.parameters()]

    expected = gradients()
    names = (f"{word}_checkpointing_enable" for word in ("activation", "gradient"))
    next(getattr(composed, name) for name in names if hasattr(composed, name))({"use_reentrant": False})
    layers = find_layers(composed.anchor)[1]
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, True]
    assert not any(layer.training for layer in layers)  # a frozen layer's dropout stays off
    for got, want in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@each_family
@torch.no_grad()
def test_a_saved_composition_is_the_same_model(name: str, tmp_path: Path) -> None:
    parts = [MODELS[name].model(0), MODELS[name].model(1)]
    for part, folder in zip(parts, ("anchor", "augmenter"), strict=True):
        part.save_pretrained(tmp_path / folder)
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("anchor", "augmenter")]
    composed, inputs = randomize(fresh(name, loaded)), left_padded()
    composed.save_pretrained(tmp_path / "composed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "composed")
    assert isinstance(again, ComposedForCausalLM)
    assert torch.equal(again(**inputs).logits, composed(**inputs).logits)
    assert not (again(**inputs).logits - loaded[0](**inputs).logits).abs().max() < 1e-2
    assert again.generation_config.eos_token_id == EOS
