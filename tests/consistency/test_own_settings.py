"""Of the model's own generation settings only its end tokens count when SelfConsistency samples."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from self_consistency_setup import QUESTIONS, consistency
from tiny_models import EOS, FAMILIES, composed_model

KINDS = ("plain", "composed")
SETTINGS: list[dict[str, Any]] = [
    {"forced_eos_token_id": EOS},  # BART, Marian, Pegasus
    {"suppress_tokens": list(range(2, 60))},  # Whisper
    {"begin_suppress_tokens": list(range(2, 60))},
    {"bad_words_ids": [[token] for token in range(2, 60)]},
    {"min_p": 0.9},
    {"typical_p": 0.2},
    {"epsilon_cutoff": 0.2},
    {"sequence_bias": {(5,): 50.0}},
    {"exponential_decay_length_penalty": (0, 9.0)},
    {"min_new_tokens": 8},
    {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
    {"stop_strings": ["1", "2", "3"]},  # without a tokenizer generate would refuse them
    {"max_time": 0.0},
    {"cache_implementation": "static"},
    {"prompt_lookup_num_tokens": 3},
    {"guidance_scale": 3.0},
    {"num_beams": 3, "num_return_sequences": 2, "do_sample": True, "return_dict_in_generate": True},
    {"output_scores": True, "output_hidden_states": True, "output_attentions": True},
]


def drawn(model: Any) -> list[Any]:
    found = consistency(model, n=3, round_size=3, max_new_tokens=8)(QUESTIONS[:2])
    return [(result.rationales, result.scores) for result in found]


@functools.cache
def usual(kind: str) -> list[Any]:
    return drawn(made(kind))


def made(kind: str) -> Any:
    return composed_model("llama") if kind == "composed" else FAMILIES["llama"].model(0)


CASES = [("plain", settings) for settings in SETTINGS] + [("composed", SETTINGS[0]), ("composed", SETTINGS[-3])]


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda part: part if part in KINDS else next(iter(part)))
def test_the_models_other_settings_do_not_count(kind: str, settings: dict[str, Any]) -> None:
    model = made(kind)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert drawn(model) == usual(kind)
    assert all(getattr(model.generation_config, name) == value for name, value in settings.items())
