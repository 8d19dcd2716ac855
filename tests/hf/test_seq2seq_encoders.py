"""Bidirectional augmenters over encoder-decoders: they read the source in full, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import encoder
from families import EOS, FAMILIES, PAD, randomize
from ragged import rounding
from seq2seq_models import PAIRS, anchor, padded, texts
from test_encoder_tokenizers import wordpiece
from texts import tokenizer

from calm_fast.hf import ComposedForSeq2SeqLM, compose

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
KINDS = ("bert", "t5", "whole t5", "bart")


def composed(kind: str = "bert", name: str = "t5", **kwargs: Any) -> ComposedForSeq2SeqLM:
    model = compose(anchor(name), encoder(kind), list(PAIRS), bidirectional="prompt", **kwargs)
    assert isinstance(model, ComposedForSeq2SeqLM)
    return model


@pytest.mark.seam(
    attach='an encoder (BERT, of T5 or BART) as augmenter of an encoder-decoder, `bidirectional="prompt"`',
    to="composition",
    result="works",
    why="it reads the source in full, once, and every token of the decoder reads all of it",
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_untrained_composition_is_its_anchor_and_a_trained_one_generates_as_it_recomputes(kind: str) -> None:
    model, (source, target) = composed(kind), texts()
    plain = model.anchor(source, decoder_input_ids=target).logits
    assert torch.equal(model(source, decoder_input_ids=target).logits, plain)
    randomize(model)
    for how in ({}, {"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}):
        cached = model.generate(source, **GREEDY, **how)
        assert torch.equal(cached, model.generate(source, use_cache=False, **GREEDY, **how))
    moved = (model(source, decoder_input_ids=target).logits - plain).abs().amax((1, 2))
    assert bool((moved > rounding(plain)).all())


@torch.no_grad()
def test_its_states_are_those_of_the_encoder_alone() -> None:
    whole, (source, _) = encoder("bert"), texts()
    model = compose(anchor("t5"), whole, list(PAIRS), bidirectional="prompt")
    read = model.get_encoder()(source)
    alone = whole(input_ids=source, attention_mask=torch.ones_like(source), output_hidden_states=True).hidden_states
    for (_, layer), states in zip(read.layers, read.augmenter_states, strict=True):
        assert torch.equal(states, alone[layer + 1])
    assert [t.tolist() for t in (*read.augmenter_lo, *read.augmenter_hi)] == [[[0], [0]], [[7], [7]]]


@pytest.mark.parametrize("pads", [slice(4, 7), slice(0, 3), slice(2, 4)], ids=["right", "left", "hole"])
@torch.no_grad()
def test_a_padded_source_gives_what_the_row_gives_alone(pads: slice) -> None:
    model, (source, target) = randomize(composed()), texts()
    padding, mask = padded(source, pads)
    both = model(padding, attention_mask=mask, decoder_input_ids=target).logits
    other = padding.masked_fill(mask == 0, 50)
    assert torch.equal(model(other, attention_mask=mask, decoder_input_ids=target).logits, both)
    if pads.start != 2:  # T5 counts a hole as positions
        alone = model(source[:1, mask[0].bool()], decoder_input_ids=target[:1]).logits
        torch.testing.assert_close(both[:1], alone, rtol=0, atol=rounding(alone))


@torch.no_grad()
def test_beside_a_causal_augmenter_and_with_a_source_of_its_own() -> None:
    parts = [FAMILIES["llama"].model(1), encoder("bert")]
    model = randomize(compose(anchor("t5"), parts, [(0, 1), (2, 2)], bidirectional=[None, "prompt"]))
    source, target = texts()
    plain = model(source, decoder_input_ids=target).logits
    own = model(source, decoder_input_ids=target, augmenter_input_ids=[None, source]).logits
    assert torch.equal(own, plain)
    moved = model(source, decoder_input_ids=target, augmenter_input_ids=[None, source.flip(0)]).logits
    assert bool(((moved - plain).abs().amax((1, 2)) > rounding(plain)).all())
    # the residuals of both are there: without either one the logits are others
    for index in range(2):
        kept = [model.connections[c].o_proj.weight.clone() for c, pair in enumerate(model.pairs) if pair[0] == index]
        for c, pair in enumerate(model.pairs):
            if pair[0] == index:
                model.connections[c].o_proj.weight.zero_()
        less = model(source, decoder_input_ids=target).logits
        assert float((less - plain).abs().max()) > rounding(plain)
        for c, pair in enumerate(model.pairs):
            if pair[0] == index:
                model.connections[c].o_proj.weight.copy_(kept.pop(0))


@torch.no_grad()
def test_it_reads_the_source_in_the_tokens_of_its_own_tokenizer() -> None:
    own, theirs = tokenizer("bytes"), wordpiece()
    parts = anchor("t5", vocab_size=len(own)), encoder("bert", vocab=len(theirs))
    model = randomize(compose(*parts, [(0, 1), (2, 2)], bidirectional="prompt", tokenizers=[own, theirs]))
    sentences = ["the cat sat", "a small model reads what a large model"]
    batch, target = own(sentences, padding=True, return_tensors="pt"), texts()[1]
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    got = model(**given, decoder_input_ids=target).logits
    expected = theirs(sentences, padding=True, return_tensors="pt")
    direct = {"augmenter_input_ids": expected["input_ids"], "augmenter_attention_mask": expected["attention_mask"]}
    assert torch.equal(model(**given, **direct, decoder_input_ids=target).logits, got)


def test_it_trains_and_is_saved(tmp_path: Path) -> None:
    anchor("t5").save_pretrained(tmp_path / "anchor")
    encoder("whole t5").save_pretrained(tmp_path / "encoder")
    paths = tmp_path / "anchor", tmp_path / "encoder"
    model = randomize(compose(*paths, list(PAIRS), bidirectional="prompt"))
    source, target = texts()
    model.train()(source, labels=target).loss.backward()
    assert all(bool(p.grad.any()) for p in model.connections.parameters())
    assert all(p.grad is None for part in (model.anchor, model.augmenters) for p in part.parameters())
    model.eval().save_pretrained(tmp_path / "composed")
    loaded = ComposedForSeq2SeqLM.from_pretrained(tmp_path / "composed")
    with torch.no_grad():
        expected = model(source, decoder_input_ids=target).logits
        assert torch.equal(loaded(source, decoder_input_ids=target).logits, expected)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match='`bidirectional` must be None or "prompt" over an encoder-decoder, whose'):
        compose(anchor("t5"), encoder("bert"), "uniform:2", bidirectional="reencode")
    with pytest.raises(ValueError, match='`augmenters` must be .*pass bidirectional="prompt"'):
        compose(anchor("t5"), encoder("whole t5"), "uniform:2")
    model, (source, target) = composed(), texts(1)
    long = torch.randint(2, EOS, (1, 65))
    with pytest.raises(ValueError, match="`input_ids` must be of at most 64 tokens for augmenter 0"):
        model(long, decoder_input_ids=target)
    with pytest.raises(ValueError, match="ComposedForSeq2SeqLM: `input_ids` must be a tensor whose values can be read"):
        torch.func.vmap(lambda ids: model(ids[None], decoder_input_ids=target).logits)(source)
