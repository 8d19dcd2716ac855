"""A tokenizer that knows more tokens than its model: named where a text has them, harmless where they only pad."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import ranker_models
import torch
from self_consistency_setup import consistency
from tiny_models import FAMILIES, character_tokenizer

from calm_fast import SelfConsistency, nat
from calm_fast.consistency import Ranker
from calm_fast.core.token_ids import padding_id

EXTRA = "<added>"


def with_padding_of_its_own() -> Any:
    """The tokenizer whose padding token was added to it alone, as `add_special_tokens` does."""
    tok = character_tokenizer()
    tok.add_special_tokens({"pad_token": EXTRA})
    return tok


@pytest.mark.seam(
    attach="a tokenizer with tokens that the model does not embed",
    to="SelfConsistency",
    result="refused",
    why="resize the model's embeddings, or use its own tokenizer; as padding alone such a token is harmless",
)
def test_a_question_with_a_token_beyond_the_vocabulary_is_named() -> None:
    tok = character_tokenizer()
    tok.add_tokens(EXTRA)
    run = SelfConsistency(FAMILIES["llama"].model(0), tok, rule="count", n=1, max_new_tokens=2, progress=False)
    with pytest.raises(ValueError, match=r"`tokenizer` must give .* in \[0, 97\), got 97.*resize_token"):
        run([f"1+1 {EXTRA}"])


def test_padding_beyond_the_vocabulary_does_not_reach_the_model() -> None:
    model, questions = FAMILIES["llama"].model(0), ["1+2?", "33+44 = ?"]
    plain = consistency(model)(questions)
    run = consistency(model)
    run.tokenizer = with_padding_of_its_own()
    assert [r.rationales for r in run(questions)] == [r.rationales for r in plain]


def test_a_ranker_names_such_tokens_and_pads_without_them() -> None:
    tok = ranker_models.tokenizer("llama")
    model = ranker_models.backbone("llama", len(tok))
    questions, rationales = ["what is 3 ?"], [["so surely the sum is 7", "maybe 8"]]
    want = Ranker.from_backbone(model, tok, max_length=48).eval().score(questions, rationales)
    tok.add_special_tokens({"pad_token": EXTRA})
    scorer = Ranker.from_backbone(model, tok, max_length=48).eval()
    torch.testing.assert_close(scorer.score(questions, rationales), want)
    with pytest.raises(ValueError, match=r"Ranker: `rationales\[0\]` must hold token ids .*LlamaModel does not"):
        scorer.score(questions, [["so", f"so {EXTRA}"]])


@pytest.mark.seam(
    attach="a tokenizer with tokens that the model does not embed",
    to="NAT",
    result="refused",
    why="resize the model's embeddings, or use its own tokenizer; as padding alone such a token is harmless",
)
def test_a_stage_names_such_tokens_before_it_trains(tmp_path) -> None:
    model, tok = FAMILIES["llama"].model(0), character_tokenizer()
    tok.add_tokens(EXTRA)
    settings = nat.Settings(steps=1, rank=1, gate_dim=1, value_dim=1, progress=False)
    wrong = nat.RationaleDataset([nat.Example("1+1?", "2"), nat.Example("2+2?", EXTRA)], tok)
    with pytest.raises(ValueError, match=r"train_negative: `wrong\[1\]` must hold token ids in \[0, 97\), got 97"):
        nat.train_negative(model, wrong, 0, tmp_path, settings)
    model, right = FAMILIES["llama"].model(0), nat.RationaleDataset([nat.Example("1+1?", "2")], tok)
    with pytest.raises(ValueError, match=r"plain_lora: `pad_id` must hold token ids in \[0, 97\), got 97"):
        nat.plain_lora(model, right, 97, tmp_path, replace(settings, seed=1))


def test_the_padding_is_a_token_of_the_model() -> None:
    model, tok = FAMILIES["llama"].model(0), character_tokenizer()
    assert padding_id(tok, model) == padding_id(tok) == tok.pad_token_id
    assert padding_id(with_padding_of_its_own()) == 97
    assert padding_id(with_padding_of_its_own(), model) == tok.eos_token_id
    assert padding_id(with_padding_of_its_own(), model, ends=[500, 5]) == 5
    assert padding_id(object(), model) == 0
