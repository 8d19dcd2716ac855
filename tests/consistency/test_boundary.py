"""Ids of a text after a prompt: no dummy space, the prompt's ids as in generation, special tokens as such."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import EOS, FAMILIES, PAD
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from calm_fast import SelfConsistency, nat, score_sequences

PIECES = ["▁", "a", "b", "c", "=", "\n", "▁a", "ab", "==", "▁ab", "?"]


def sentencepiece(scheme: str, end: bool = False) -> Any:
    """A tokenizer that writes ▁ for a space and before a text; its tokens may cross the end of a prompt."""
    names = ["<pad>", "<s>", *PIECES]
    vocabulary = {name: i for i, name in enumerate(names)} | {"</s>": EOS}
    merges = [("▁", "a"), ("a", "b"), ("=", "="), ("▁a", "b")]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def ids(tok: Any, *tokens: str) -> list[int]:
    return tok.convert_tokens_to_ids(list(tokens))


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].model(0)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize(
    ("prompt", "completion", "want"),
    [
        ("b=", "c", (("▁", "b", "="), ("c",))),
        ("b=", "=c", (("▁", "b", "="), ("=", "c"))),  # "==" would take the prompt's last token
        ("b ", "ab", (("▁", "b", "▁"), ("ab",))),  # the space is the prompt's
        ("ca", "b a", (("▁", "c", "a"), ("b", "▁a"))),
        ("b=", " ab", (("▁", "b", "="), ("▁ab",))),
        ("b=", "=</s>", (("▁", "b", "="), ("=", "</s>"))),
        ("b=", "", (("▁", "b", "="), ())),
    ],
)
def test_a_completion_is_the_middle_of_a_text(model, scheme, end, prompt, completion, want) -> None:
    tok = sentencepiece(scheme, end)
    before, after = [1, *ids(tok, *want[0])], ids(tok, *want[1])
    expected = score_sequences(model, [before], [[after]])[0]
    for given in (prompt, before):  # the prompt's text, or its ids
        got = score_sequences(model, [given], [[completion]], tokenizer=tok)[0]
        assert torch.equal(got.sum, expected.sum) and got.tokens.tolist() == [len(after)]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_rationales_are_taught_as_they_are_sampled(scheme) -> None:
    tok = sentencepiece(scheme)
    item = nat.RationaleDataset([nat.Example("b?", "ab a")], tok)[0]
    assert item["input_ids"] == [1, *ids(tok, "▁", "b", "?", "\n", "ab", "▁a"), EOS]


def test_existing_samples_are_scored_by_the_ids_that_sampling_gives(model) -> None:
    tok = sentencepiece("always")
    row = {"question": "b?", "generated_answer": ["ab a"]}
    run = SelfConsistency(model, tok, prompt="{question}=", rule="weighted", pattern="a", progress=False)
    (result,) = run.from_samples([row])
    prompt, sample = [1, *ids(tok, "▁", "b", "?", "=")], ids(tok, "ab", "▁a")
    assert result.scores == pytest.approx(score_sequences(model, [prompt], [[sample]])[0].mean.exp().tolist())


def test_padding_is_no_token_of_these_tests() -> None:
    assert PAD not in sentencepiece("first")("ab a=\nc?")["input_ids"]
