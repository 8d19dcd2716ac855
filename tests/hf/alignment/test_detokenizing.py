"""Detokenizer: text that comes token by token is what decode gives for all tokens."""

from __future__ import annotations

import random

import pytest
from many_tokenizers import KINDS, random_ids, tokenizer
from tokenizers import Tokenizer, decoders, models

from calm_fast.hf.alignment.detokenizing import Detokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_what_decode_gives(kind: str) -> None:
    inner, source = tokenizer(kind), random.Random(kind)
    detokenizer = Detokenizer(inner)
    for _ in range(250):
        ids = random_ids(source, kind)
        assert detokenizer.read(ids) == inner.decode(ids, skip_special_tokens=True)


def test_a_pause_gives_complete_characters_and_keeps_half_ones() -> None:
    for kind in ("gpt2", "gemma"):
        inner = tokenizer(kind)
        detokenizer = Detokenizer(inner)
        ids = [i for i in inner.encode("aé", add_special_tokens=False).ids]
        rare = inner.encode("\U0001f9ff", add_special_tokens=False).ids
        assert len(rare) > 1
        state, text = detokenizer.start, ""
        for token_id in [*ids, *rare[:-1]]:
            state, new = detokenizer.step(state, token_id)
            text += new
        state, new = detokenizer.finish(state)
        assert text + new == "aé"
        state, new = detokenizer.step(state, rare[-1])
        assert new + detokenizer.finish(state)[1] == "\U0001f9ff"


def test_a_decoder_without_a_rule_is_refused_by_name() -> None:
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.decoder = decoders.CTC()
    with pytest.raises(ValueError, match="`tokenizer` must be .* a decoder with CTC. Pass a tokenizer whose"):
        Detokenizer(inner)


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="`tokenizer` must be a fast tokenizer"):
        Detokenizer(object())
