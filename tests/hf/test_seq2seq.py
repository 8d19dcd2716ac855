"""Compositions over an encoder-decoder: the equation, identity at first, caches, padding, and what is refused."""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, randomize
from families import composed_model as causal_model
from ragged import rounding
from seq2seq_models import ANCHORS, OTHERS, anchor, composed_model, padded, shared, texts
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

from calm_fast.hf import ComposedForSeq2SeqLM, compose, find_layers
from calm_fast.hf.cache_names import cache_of

STEPS = 6
each = pytest.mark.parametrize("name", ANCHORS)
greedy = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None}


@pytest.mark.seam(
    attach="an encoder-decoder as the anchor (T5, BART, Switch Transformers, ...)",
    to="composition",
    result="works",
    why="connections end at decoder layers, and the augmenters read the source of the encoder",
)
@each
@torch.no_grad()
def test_an_untrained_composition_is_the_anchor_bit_for_bit(name: str) -> None:
    model, (source, target) = anchor(name), texts()
    source, mask = padded(source, slice(5, 7))
    plain, generated = model(source, attention_mask=mask, labels=target), model.generate(source, **greedy)
    composed = compose(model, FAMILIES["llama"].model(1), [(-1, -1), (0, 1), (2, 2)])
    same = composed(source, attention_mask=mask, labels=target)
    assert isinstance(composed, ComposedForSeq2SeqLM)
    assert torch.equal(same.logits, plain.logits) and torch.equal(same.loss, plain.loss)
    assert torch.equal(composed.generate(source, **greedy), generated)


@each
@pytest.mark.parametrize("pair", [(-1, -1), (-1, 0), (1, 1)])
@torch.no_grad()
def test_a_connection_reads_all_real_tokens_of_the_source(name: str, pair: tuple[int, int]) -> None:
    model, augmenter, (source, target) = anchor(name), FAMILIES["llama"].model(1, width=24), texts()
    source, mask = padded(source, slice(5, 7))
    # requested before composing, so that transformers installs its recording hooks first
    given = {"attention_mask": mask, "decoder_input_ids": target, "output_hidden_states": True}
    written = model(source, **given).decoder_hidden_states[pair[1] + 1]
    read = augmenter(source, attention_mask=mask, output_hidden_states=True).hidden_states[pair[0] + 1]
    composed = randomize(compose(model, augmenter, [pair]))
    hi = mask.sum(1, keepdim=True).expand(target.shape).to(torch.int32)
    expected = composed.connections[0](written, read, None, hi)
    entered: list[torch.Tensor] = []
    find_layers(model)[1][0].register_forward_hook(lambda _, args, output: entered.append(args[0]))
    states = composed(source, **given).decoder_hidden_states
    got = entered[0] if pair[1] == -1 else states[pair[1] + 1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert not torch.equal(composed(source, **given).logits, model(source, **given).logits)


@each
@torch.no_grad()
def test_a_future_token_of_the_decoder_never_moves_earlier_logits(name: str) -> None:
    composed, (source, target) = shared(name), texts()
    plain = composed(source, decoder_input_ids=target).logits
    other = target.clone()
    other[:, 3] = (other[:, 3] - 1) % EOS
    moved = composed(source, decoder_input_ids=other).logits
    torch.testing.assert_close(moved[:, :3], plain[:, :3], rtol=0, atol=2e-5)
    assert (moved[:, 3:] - plain[:, 3:]).abs().amax() > 1e-3


VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
}


@each
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_generation_equals_recomputation(name: str, variant: str) -> None:
    composed, (source, _) = shared(name), texts()
    source, mask = padded(source, slice(4, 7))
    how = greedy | {"attention_mask": mask} | VARIANTS[variant]
    torch.manual_seed(0)
    cached = composed.generate(source, **how)
    how.pop("cache_implementation", None)
    torch.manual_seed(0)
    assert torch.equal(cached, composed.generate(source, use_cache=False, **how))
    torch.manual_seed(0)
    # the composition has an effect: the anchor alone gives other tokens
    assert not torch.equal(cached, composed.anchor.generate(source, **how))


@each
@torch.no_grad()
def test_logits_step_by_step_equal_full_logits(name: str) -> None:
    composed, (source, target) = shared(name), texts(target=6)
    full = composed(source, decoder_input_ids=target, use_cache=False)
    assert full.cache is None
    read = composed.get_encoder()(source)
    outputs = composed(encoder_outputs=read, decoder_input_ids=target[:, :2])
    steps = [outputs.logits]
    for piece in (target[:, 2:5], target[:, 5:]):
        outputs = composed(encoder_outputs=read, decoder_input_ids=piece, cache=outputs.cache)
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full.logits, rtol=0, atol=rounding(full.logits))
    assert outputs.cache.get_seq_length() == 6


@torch.no_grad()
def test_a_cache_that_another_thread_uses_is_refused() -> None:
    composed, (source, target) = shared("t5"), texts()
    read, problems = composed.get_encoder()(source), []
    cache = composed(encoder_outputs=read, decoder_input_ids=target[:, :2]).cache
    plain = composed(encoder_outputs=read, decoder_input_ids=target[:, 2:3], cache=copy.deepcopy(cache)).logits

    def other() -> None:
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match="ComposedForSeq2SeqLM: `cache` must be used by one thread"),
        ):
            composed(encoder_outputs=read, decoder_input_ids=target[:, 2:3], cache=cache)
        problems.append("refused")

    def meanwhile(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    hook = composed.anchor.lm_head.register_forward_pre_hook(meanwhile)
    try:
        got = composed(encoder_outputs=read, decoder_input_ids=target[:, 2:3], cache=cache).logits
    finally:
        hook.remove()
    assert problems == ["refused"] and torch.equal(got, plain)
    composed(encoder_outputs=read, decoder_input_ids=target[:, 3:4], cache=cache)  # free again


@each
@pytest.mark.parametrize("pads", [slice(4, 7), slice(0, 3), slice(2, 4)], ids=["right", "left", "hole"])
@torch.no_grad()
def test_a_padded_source_gives_what_the_row_gives_alone(name: str, pads: slice) -> None:
    composed, (source, target) = shared(name), texts()
    short, (source, mask) = source[:1], padded(source, pads)
    both = composed(source, attention_mask=mask, decoder_input_ids=target).logits
    again = composed(source.masked_fill(mask == 0, 50), attention_mask=mask, decoder_input_ids=target).logits
    if name == "switch_transformers":  # how a mixture of experts rounds depends on all tokens of a batch
        torch.testing.assert_close(again, both, rtol=0, atol=rounding(both))
    else:
        assert torch.equal(again, both)  # what stands in padding does not matter
    if pads.start == 4 or name != "bart" and pads.start == 0:  # the encoders of others count padding as positions
        alone = composed(short[:, mask[0].bool()], decoder_input_ids=target[:1]).logits
        torch.testing.assert_close(both[:1], alone, rtol=0, atol=rounding(alone))


@torch.no_grad()
def test_the_augmenters_read_a_source_once_per_generation() -> None:
    model, (source, _) = anchor("bart"), texts()
    augmenters = [FAMILIES["llama"].model(1), FAMILIES["gpt2"].model(2, width=16)]
    composed = randomize(compose(model, augmenters, ["uniform:2", [(1, 2)]]))
    runs: list[int] = []
    for index, augmenter in enumerate(augmenters):
        list(augmenter.children())[0].register_forward_hook(lambda *_, index=index: runs.append(index))
    expected = composed.generate(source, num_beams=2, **greedy)
    read = composed.get_encoder()(source)
    runs.clear()
    for _ in range(2):  # generate repeats the rows of a copy
        assert torch.equal(composed.generate(encoder_outputs=read, num_beams=2, **greedy), expected)
    assert runs == []


@torch.no_grad()
def test_an_augmenter_may_read_a_source_of_its_own() -> None:
    composed, (source, target) = shared("t5"), texts()
    plain = composed(source, decoder_input_ids=target).logits
    assert torch.equal(composed(source, decoder_input_ids=target, augmenter_input_ids=source).logits, plain)
    other, mask = padded(torch.cat([source, source], 1), slice(7, 14))
    other[1, 7:], mask[1, 7:] = 0, 0
    given = {"decoder_input_ids": target, "augmenter_input_ids": other, "augmenter_attention_mask": mask}
    torch.testing.assert_close(composed(source, **given).logits, plain, rtol=0, atol=rounding(plain))
    given["augmenter_input_ids"] = other.flip(0)
    assert (composed(source, **given).logits - plain).abs().amax() > 1e-3
    own = {name: value for name, value in given.items() if name != "decoder_input_ids"}
    cached = composed.generate(source, **own, **greedy)
    assert torch.equal(cached, composed.generate(source, use_cache=False, **own, **greedy))
    assert not torch.equal(cached, composed.generate(source, **greedy))


@torch.no_grad()
def test_an_augmenter_with_another_tokenizer_reads_the_source_in_its_own_tokens() -> None:
    from texts import tokenizer

    own, theirs = tokenizer("bytes"), tokenizer("metaspace")
    model = anchor("t5", vocab_size=len(own))
    augmenter = FAMILIES["llama"].model(1, vocab=len(theirs))
    composed = randomize(compose(model, augmenter, [(0, 1), (2, 2)], tokenizers=[own, theirs]))
    batch = own(["the cat sat", "a small model reads what a large model"], padding=True, return_tensors="pt")
    source, mask = batch["input_ids"], batch["attention_mask"]
    (aligner,) = composed.aligners
    rows = [
        aligner.align(row[real.bool()].tolist(), int(real.sum()))[0] for row, real in zip(source, mask, strict=True)
    ]
    most = max(map(len, rows))
    ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (most - len(row)) for row in rows])
    target = texts()[1]
    got = composed(source, attention_mask=mask, decoder_input_ids=target).logits
    given = {"augmenter_input_ids": ids, "augmenter_attention_mask": real}
    assert torch.equal(got, composed(source, attention_mask=mask, decoder_input_ids=target, **given).logits)
    assert theirs.decode(rows[0], skip_special_tokens=True) == "the cat sat"
    how = greedy | {"attention_mask": mask}
    assert torch.equal(composed.generate(source, **how), composed.generate(source, use_cache=False, **how))


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_families(name: str) -> None:
    model, (source, target) = anchor(name), texts()
    source, mask = padded(source, slice(5, 7))
    plain = model(source, attention_mask=mask, decoder_input_ids=target).logits
    other = torch.cat([target[:, :-1], target[:, -1:] - 1], 1)
    if not torch.allclose(
        model(source, attention_mask=mask, decoder_input_ids=other).logits[:, :-1], plain[:, :-1], atol=1e-3
    ):
        with pytest.raises(ValueError, match="must be a causal model"):  # UMT5 in transformers 5.17
            compose(model, FAMILIES["gpt2"].model(1), [(0, 0), (2, 2)])
        return
    composed = compose(model, FAMILIES["gpt2"].model(1), [(0, 0), (2, 2)])
    assert torch.equal(composed(source, attention_mask=mask, decoder_input_ids=target).logits, plain)
    randomize(composed)
    how = greedy | {"attention_mask": mask}
    cached = composed.generate(source, **how)
    assert torch.equal(cached, composed.generate(source, use_cache=False, **how))
    assert not torch.equal(cached, model.generate(source, **how))


def test_the_example_of_the_docs_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "composition.md"
    if not page.is_file():
        pytest.skip("the docs are not beside the tests")
    section = page.read_text(encoding="utf-8").split("\n## Encoder-decoders\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    exec(compile(block, str(page), "exec"), {})


@torch.no_grad()
def test_an_augmenter_may_read_the_source_ahead() -> None:
    family = FAMILIES["gemma3_text"]
    augmenter = replace(family, extra=family.extra | {"use_bidirectional_attention": True}).model(1)
    with pytest.raises(ValueError, match="`augmenters` must be models that read no future token"):
        compose(family.model(), augmenter, [(1, 1)])
    composed, (source, target) = randomize(compose(anchor("t5"), augmenter, [(1, 1)])), texts()
    source, mask = padded(source, slice(4, 7))
    both = composed(source, attention_mask=mask, decoder_input_ids=target).logits
    alone = composed(source[:1, :4], decoder_input_ids=target[:1]).logits
    torch.testing.assert_close(both[:1], alone, rtol=0, atol=rounding(alone))


def test_drafts_by_prompt_lookup_and_by_the_anchor_and_for_it() -> None:
    composed, (source, _) = shared("t5"), texts(batch=1)
    expected = composed.generate(source, **greedy | {"max_new_tokens": 12})
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": composed.anchor}):
        assert torch.equal(composed.generate(source, **greedy | {"max_new_tokens": 12} | how), expected)
    alone = composed.anchor.generate(source, **greedy)
    assert torch.equal(composed.anchor.generate(source, assistant_model=composed, **greedy), alone)


@torch.no_grad()
def test_the_forward_compiles_as_one_graph() -> None:
    composed, (source, target) = shared("t5"), texts()
    source, mask = padded(source, slice(5, 7))
    given = {"attention_mask": mask, "decoder_input_ids": target, "use_cache": False}
    compiled = torch.compile(composed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(source, **given).logits, composed(source, **given).logits)


def test_a_deep_copy_is_a_composition_of_its_own() -> None:
    composed, (source, target) = composed_model("t5"), texts()
    expected = composed(source, decoder_input_ids=target).logits
    twin = copy.deepcopy(composed)
    for parameter in composed.connections.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(source, decoder_input_ids=target).logits, expected)


def test_the_probe_refuses_a_decoder_that_reads_ahead() -> None:
    model = anchor("bart")
    model.model.decoder.layers[0].register_forward_hook(lambda _, args, output: output + output.flip(1))
    with pytest.raises(ValueError, match="compose: `anchor` must be a causal model, got BartF.*the last token changes"):
        compose(model, FAMILIES["llama"].model(1), "uniform:2")
    assert compose(model, FAMILIES["llama"].model(1), "uniform:2", probe=False)


@pytest.mark.seam(
    attach="an encoder-decoder as an augmenter",
    to="composition",
    result="refused",
    why="compose it as the anchor, or take a decoder-only model",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (FAMILIES["llama"].model(), anchor("bart")), "`augmenters` must be a decoder-only model, got BartFor"),
        (lambda: (T5EncoderModel(T5Config(num_layers=1)), FAMILIES["llama"].model()), "must be a causal .*got T5Enc"),
        (lambda: (shared("t5"), FAMILIES["llama"].model()), "`anchor` must be a model that is no composition"),
        (lambda: (causal_model("llama"), anchor("t5")), "`anchor` must be a model that is no composition"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_composed_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(*arguments(), "uniform:2")


SOURCE, TARGET = texts()
CALLS: list[tuple[dict[str, Any], str]] = [
    ({}, "`input_ids` must be given where the augmenters have not read the source, got None"),
    ({"input_ids": SOURCE, "inputs_embeds": torch.zeros(2, 7, 32)}, "`inputs_embeds` must be None"),
    ({"input_ids": SOURCE.float()}, "`input_ids` must be int64 or int32"),
    ({"input_ids": SOURCE + 90}, "`input_ids` must be token ids from 0 to 96"),
    ({"input_ids": SOURCE, "decoder_input_ids": TARGET - 90}, "`decoder_input_ids` must be token ids from 0 to 96"),
    ({"input_ids": SOURCE, "attention_mask": torch.ones(2, 6)}, r"`attention_mask` must be of shape \(2, 7\)"),
    ({"input_ids": SOURCE, "attention_mask": torch.full((2, 7), 2)}, "`attention_mask` must be 0 for padding"),
    ({"input_ids": SOURCE, "decoder_input_ids": TARGET[:1]}, "`decoder_input_ids` must be of 2 rows, as many"),
    ({"input_ids": SOURCE, "augmenter_input_ids": SOURCE[:1]}, "`augmenter_input_ids` must be of batch size 2"),
    ({"input_ids": SOURCE, "augmenter_attention_mask": SOURCE}, "`augmenter_input_ids` must be given with an"),
    ({"input_ids": SOURCE, "atention_mask": SOURCE}, "`atention_mask` must be an argument of T5For"),
    ({"input_ids": SOURCE, "cache": DynamicCache()}, "`cache` must be .* an empty EncoderDecoderCache, got another"),
    ({"input_ids": SOURCE, "cache": DynamicCache(), "past_key_values": DynamicCache()}, "the cache must be given"),
    ({"encoder_outputs": BaseModelOutput(last_hidden_state=torch.zeros(2, 7, 32))}, "`input_ids` must be given where"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CALLS)
def test_calls_that_would_go_wrong_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ComposedForSeq2SeqLM: {message}"):
        shared("t5")(**{"decoder_input_ids": TARGET} | arguments)


@torch.no_grad()
def test_a_cache_belongs_to_one_composition_and_one_source() -> None:
    composed = shared("t5")
    filled = composed(SOURCE, decoder_input_ids=TARGET).cache
    plain = cache_of(composed.anchor(SOURCE, decoder_input_ids=TARGET))
    for cache in (plain, shared("bart")(SOURCE, decoder_input_ids=TARGET).cache):
        with pytest.raises(ValueError, match="ComposedForSeq2SeqLM: `cache` must be"):
            composed(SOURCE, decoder_input_ids=TARGET, cache=cache)
    with pytest.raises(ValueError, match="`encoder_outputs` must be the source of 7 tokens in the cache, got one of 6"):
        composed(SOURCE[:, :6], decoder_input_ids=TARGET, cache=filled)
    with pytest.raises(ValueError, match="generate: `cache` must be an empty cache"):
        composed.generate(SOURCE, cache=filled, **greedy)
    empty = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert torch.equal(composed.generate(SOURCE, cache=empty, **greedy), composed.generate(SOURCE, **greedy))


@pytest.mark.seam(
    attach="classifier-free guidance over an encoder-decoder anchor",
    to="composition",
    result="refused",
    why="transformers guides decoder-only models only; leave `guidance_scale` out",
)
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"guidance_scale": 2.0}, "generate: `guidance_scale` must be None or 1 over an encoder-decoder"),
        ({"assistant_early_exit": 1}, "generate: `assistant_early_exit` must be None"),
    ],
)
def test_ways_to_generate_that_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared("t5").generate(SOURCE[:1], **greedy, **how)
