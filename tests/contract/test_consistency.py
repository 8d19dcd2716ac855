"""Scoring and sampling with five families and the decoder of an encoder-decoder; voting over answers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, VOCAB, composed_model
from tiny_models import character_tokenizer, rows
from transformers import BartConfig, BartForCausalLM, BartForConditionalGeneration, GenerationConfig

from calm_fast import SelfConsistency, ops, score_sequences
from calm_fast.consistency import group_answers
from calm_fast.consistency.sampling.prefix import PrefixReader

MODELS = FAMILIES | OTHERS
NAMES = ("llama", "gpt2", "gemma3_text", "mixtral", "mamba", "bart", "composed")


def bart(kind: type = BartForCausalLM) -> Any:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
        pad_token_id=0, eos_token_id=96, bos_token_id=96, decoder_start_token_id=96, forced_eos_token_id=None,
    )  # fmt: skip
    return kind(config).eval()


@cache
def model_of(name: str) -> Any:
    special = {"bart": bart, "composed": lambda: composed_model("llama")}
    return special[name]() if name in special else MODELS[name].model()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores_equal_the_plain_forward(name: str) -> None:
    model, prompt, completions = model_of(name), rows(7)[0], rows(5, 1, 3, seed=1)
    (found,) = score_sequences(model, [prompt], [completions])
    for k, completion in enumerate(completions):
        logprobs = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].log_softmax(-1)
        expected = sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(completion))
        assert float(found.sum[k]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_read_once_where_the_cache_holds_keys_and_values(name: str) -> None:
    assert PrefixReader(model_of(name)).shares == (name != "mamba")


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_those_of_reading_every_prompt_anew(name: str) -> None:
    """At temperature 0 a sample equals the model's own greedy continuation without any cache."""
    model, tokenizer = model_of(name), character_tokenizer()
    settings = {"n": 2, "temperature": 0, "max_new_tokens": 8, "rule": "count", "progress": False}
    questions = ["3+4?", "a longer question?"]
    found = SelfConsistency(model, tokenizer, prompt=str, **settings)(questions)  # the question alone
    for question, result in zip(questions, found, strict=True):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        how = GenerationConfig(max_new_tokens=8, do_sample=False, use_cache=False, eos_token_id=96, pad_token_id=0)
        expected = model.generate(ids, generation_config=how)[0, ids.shape[1] :]
        assert result.rationales == [tokenizer.decode(expected, skip_special_tokens=True)] * 2


def test_an_encoder_decoder_is_refused_by_name() -> None:
    model = bart(BartForConditionalGeneration)
    with pytest.raises(ValueError, match="`model` must be a decoder-only .* got BartForConditionalGeneration"):
        score_sequences(model, [[5, 6]], [[[7]]])


def test_a_percentage_votes_with_the_bare_number() -> None:
    groups = group_answers([[r"50\%", "50", "49"]], gold=["50"], workers=1)
    vote = ops.vote(groups.answers, valid=groups.valid)
    assert vote.weight.tolist() == [2.0] and int(vote.winner[0]) == int(groups.correct[0])
