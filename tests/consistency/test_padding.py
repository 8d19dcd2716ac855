"""Whether prompts of different lengths are sampled together is tried on the model, once, where it matters."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from self_consistency_setup import QUESTIONS, consistency
from tiny_models import FAMILIES, OTHERS, character_tokenizer
from transformers import LlamaForCausalLM

from calm_fast.consistency.sampling import padding
from calm_fast.consistency.sampling.padding import leaves_padding_out, prompt_batches
from calm_fast.consistency.sampling.prefix import PrefixReader


class DropsPositions(LlamaForCausalLM):
    """As GIT: a step of generate forgets the positions that it is given, and counts the padding in the cache."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        found = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = found.get("past_key_values", found.get("cache"))
        if cache is not None and cache.get_seq_length():
            found.pop("position_ids", None)
        return found


def drops_positions() -> Any:
    plain = FAMILIES["llama"].model(0)
    model = DropsPositions(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def asked(model: Any) -> bool:
    return leaves_padding_out(PrefixReader(model), character_tokenizer())


def test_a_model_that_counts_padding_in_its_steps_gives_the_samples_of_each_prompt_alone() -> None:
    model = drops_positions()
    together = consistency(model, n=3, round_size=3, max_new_tokens=8)(QUESTIONS)
    for question, result in zip(QUESTIONS, together, strict=True):
        (alone,) = consistency(model, n=3, round_size=3, max_new_tokens=8)([question])
        assert alone.rationales == result.rationales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_tells_models_that_count_padding_from_those_that_leave_it_out(dtype: torch.dtype) -> None:
    assert not asked(drops_positions().to(dtype))
    # BLOOM's and MPT's forward takes no positions, and counts real tokens only
    for name in ("llama", "gpt2", "bloom"):
        assert asked(FAMILIES[name].model(0).to(dtype)), name
    assert asked(OTHERS["mpt"].model(0).to(dtype))


def test_without_a_cache_no_mask_is_passed_and_nothing_is_tried() -> None:
    model = OTHERS["rwkv"].model(0)
    model.forward = None  # any call fails
    assert not asked(model)


def test_a_model_is_tried_once_only_for_prompts_of_different_lengths_and_forgotten(monkeypatch: Any) -> None:
    plain, trials = padding._measure, []
    monkeypatch.setattr(padding, "_measure", lambda reader, tokenizer: trials.append(1) or plain(reader, tokenizer))
    model, before = FAMILIES["llama"].model(0), len(padding._outcomes)
    sampler = consistency(model, n=2, round_size=2, max_new_tokens=2, batch_size=4)
    sampler(["1+2?", "3+4?", "5+6?"])
    assert not trials
    state = torch.get_rng_state()
    for _ in range(2):
        sampler(["1+2?", "33+4?"])
    assert len(trials) == 1 and len(padding._outcomes) == before + 1
    assert torch.equal(torch.get_rng_state(), state)
    del model, sampler
    gc.collect()
    assert len(padding._outcomes) == before


def test_batches_keep_the_order_until_one_needs_padding_that_the_model_cannot_have() -> None:
    pairs = [(name, [0] * length) for name, length in zip("abcdefg", (2, 2, 2, 3, 3, 2, 3), strict=True)]
    for pads, expected in ((True, ["ab", "cd", "ef", "g"]), (False, ["ab", "cf", "de", "g"])):
        calls: list[int] = []
        found = prompt_batches(iter(pairs), 2, lambda pads=pads, calls=calls: calls.append(1) is None and pads)
        assert ["".join(name for name, _ in batch) for batch in found] == expected
    assert calls == [1]
    assert not list(prompt_batches(iter([]), 2, lambda: False))
