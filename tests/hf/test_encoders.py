"""Bidirectional augmenters: who reads what, in training and in every way to generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import ENCODERS, KINDS, encoder, with_encoder
from families import FAMILIES, PAD, VOCAB, left_padded, prompts, randomize
from ragged import rounding
from transformers import BertConfig, BertForMaskedLM, BertModel, FNetModel, NystromformerModel

import calm_fast
from calm_fast.hf import ComposedForCausalLM, compose

PAGE = Path(calm_fast.__file__).parents[1] / "docs" / "composition.md"
MODES = ("prompt", "reencode")
P = 5  # of the 9 tokens of a row, the prompt
GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def logits(model: ComposedForCausalLM, ids: torch.Tensor, length: Any = P, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, prompt_length=length, **more).logits


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_composition_is_the_anchor(kind: str, mode: str) -> None:
    anchor, ids = FAMILIES["llama"].model(0), prompts()
    with torch.no_grad():
        plain = anchor(ids, use_cache=False).logits
    model = compose(anchor, encoder(kind), "uniform:3", bidirectional=mode)
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.seam(
    attach='an encoder as augmenter (BERT, RoBERTa, ModernBERT, DeBERTa, of T5 or BART), `bidirectional="prompt"`',
    to="composition",
    result="works",
    why="it reads the prompt in full; tokens before the prompt's last one read nothing",
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_token_changes_no_logit_before_it(kind: str, mode: str) -> None:
    model, ids = with_encoder(kind, mode), prompts()
    before = logits(model, ids)
    for place in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, place] = 2 + (changed[:, place] - 1) % 90
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=rounding(before))
        assert not torch.allclose(after[:, place:], before[:, place:], atol=1e-3)


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_before_the_end_of_the_prompt_read_nothing_and_the_others_all_of_it(kind: str) -> None:
    model, ids = with_encoder(kind), prompts(1)
    composed = logits(model, ids)
    with torch.no_grad():
        plain = model.anchor(ids, use_cache=False).logits
    torch.testing.assert_close(composed[:, : P - 1], plain[:, : P - 1], rtol=0, atol=rounding(plain))
    # the encoder reads the prompt in full and once: all tokens behind it see the same states as the encoder alone gives
    with torch.no_grad():
        states = model.augmenters[0](ids[:, :P], output_hidden_states=True).hidden_states
    seen: list[torch.Tensor] = []
    for index, (_, a, _) in enumerate(model.pairs):
        hook = model.connections[index].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        logits(model, ids)
        hook.remove()
        if a < 2:  # the last hidden state is behind the last norm
            torch.testing.assert_close(seen[-1], states[a + 1], rtol=0, atol=rounding(states[a + 1]))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("mode", MODES)
def test_every_token_reads_the_encoding_of_its_own_text(kind: str, mode: str) -> None:
    """Logits at a token are those of the row that ends there, whose prompt is the same (or all of it, to reencode)."""
    model, ids = with_encoder(kind, mode), prompts()
    whole = logits(model, ids)
    for length in range(P, ids.shape[1] + 1):
        last = logits(model, ids[:, :length])[:, -1]
        torch.testing.assert_close(last, whole[:, length - 1], rtol=0, atol=rounding(whole))
    assert not torch.allclose(logits(model, ids, ids.shape[1])[:, -1], whole[:, -1], atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ENCODERS)
def test_rows_of_a_padded_batch_are_those_of_a_row_alone(kind: str, mode: str) -> None:
    model, (ids, mask) = with_encoder(kind, mode), left_padded(prompts())
    together = logits(model, ids, torch.tensor([7, 5]), attention_mask=mask)
    near = {"rtol": 0, "atol": rounding(together)}
    torch.testing.assert_close(logits(model, ids[:1, 4:], 3)[0], together[0, 4:], **near)
    torch.testing.assert_close(logits(model, ids[1:], 5)[0], together[1], **near)
    assert model.encoders[0] is not None and model.encoders[0].padded
    right, right_mask = torch.roll(ids, -4, 1), torch.roll(mask, -4, 1)
    right[1], right_mask[1] = ids[1], mask[1]
    moved = logits(model, right, torch.tensor([3, 5]), attention_mask=right_mask)
    torch.testing.assert_close(moved[0, :5], together[0, 4:], **near)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "static cache": {"cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
}


def generated(model: ComposedForCausalLM, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(ids, **GENERATE | more)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_a_cache_changes_no_token(kind: str, mode: str, way: str) -> None:
    model, (ids, mask) = with_encoder(kind, mode), left_padded(prompts())
    more = WAYS[way] | {"attention_mask": mask}
    cached = generated(model, ids, **more)
    assert torch.equal(cached, generated(model, ids, **more, use_cache=False))
    if way == "greedy":
        assert torch.equal(cached[:1, 4:], generated(model, ids[:1, 4:]))
        assert torch.equal(cached[1:], generated(model, ids[1:]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("greedy", "beams")])
def test_no_way_to_generate_minds_the_cache(way: str, mode: str) -> None:
    model, ids = with_encoder("bert", mode), prompts()
    more = {name: value for name, value in WAYS[way].items() if name != "cache_implementation"}
    assert torch.equal(generated(model, ids, **WAYS[way]), generated(model, ids, **more, use_cache=False))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "more",
    [
        {"prefill_chunk_size": 2},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "anchor"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_steps_of_several_tokens_read_what_single_ones_do(more: dict[str, Any], mode: str) -> None:
    model, ids = with_encoder("bert", mode), prompts(1)
    given = {name: model.anchor if value == "anchor" else value for name, value in more.items()}
    assert torch.equal(generated(model, ids, **given), generated(model, ids, use_cache=False))


@pytest.mark.parametrize("mode", MODES)
def test_a_second_prompt_of_a_cache_is_read_with_all_text_before_it(mode: str) -> None:
    model, ids = with_encoder("bert", mode), prompts(2)
    first = generated(model, ids, return_dict_in_generate=True)
    text = torch.cat([first.sequences, prompts(2, 3, seed=8)], dim=1)
    second = generated(model, text, cache=first.cache)
    ends = torch.tensor([[ids.shape[1], text.shape[1]]]).expand(2, -1)
    assert torch.equal(second, generated(model, text, use_cache=False, prompt_length=ends))
    alone = generated(model, text, use_cache=False)
    assert alone.shape == second.shape


@pytest.mark.parametrize("mode", MODES)
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_come(mode: str) -> None:
    model, ids = with_encoder("bert", mode), prompts()
    with torch.no_grad():
        cache = model(ids[:, :P], use_cache=True).cache
        for past, number in ((5, 4), (7, 2)):
            model(ids[:, past : past + number], cache=cache)
            cache.crop(past + 2 - (past + number)) if past + 2 < past + number else None
        assert cache.get_seq_length() == 9
        # into the prompt, and out of it again
        cache.crop(3 - 9)
        rest = model(ids[:, 3:], cache=cache).logits
    expected = logits(model, ids)[:, 3:]
    torch.testing.assert_close(rest, expected, rtol=0, atol=rounding(expected))


def test_only_connections_train_and_the_loss_falls() -> None:
    for mode in MODES:
        model, ids = with_encoder("bert", mode), prompts()
        labels = ids.clone()
        labels[:, :P] = -100
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(8):
            loss = model(ids, labels=labels, prompt_length=P).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert {n.partition(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"connections"}


def test_an_encoder_with_a_causal_augmenter_beside_it() -> None:
    parts = [encoder("bert"), FAMILIES["llama"].model(2)]
    model = randomize(compose(FAMILIES["llama"].model(0), parts, "uniform:2", bidirectional=["reencode", None]))
    ids, mask = left_padded(prompts())
    assert torch.equal(
        generated(model, ids, attention_mask=mask), generated(model, ids, attention_mask=mask, use_cache=False)
    )
    changed = ids.clone()
    changed[:, -1] = 4
    torch.testing.assert_close(
        logits(model, changed, attention_mask=mask)[:, :-1], logits(model, ids, attention_mask=mask)[:, :-1]
    )


@pytest.mark.seam(
    attach="an encoder as augmenter without `bidirectional`",
    to="composition",
    result="refused",
    why='it would tell earlier tokens about later ones; pass bidirectional="prompt"',
)
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_without_the_option_is_refused_with_its_name(kind: str) -> None:
    with pytest.raises(
        ValueError, match='`augmenters` must be .*pass bidirectional="prompt" for an augmenter that'
    ) as found:
        compose(FAMILIES["llama"].model(0), encoder(kind), "uniform:2")
    assert type(encoder(kind)).__name__ in str(found.value)


def test_a_masked_language_model_gives_its_base_model_and_the_given_one_keeps_its_parts() -> None:
    config = BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    whole, pooled = BertForMaskedLM(config), encoder("bert")
    model = compose(FAMILIES["llama"].model(0), [whole, pooled], "uniform:2", bidirectional="prompt")
    assert [type(part).__name__ for part in model.augmenters] == ["BertModel", "BertModel"]
    assert model.augmenters[1].pooler is None and pooled.pooler is not None and whole.cls is not None
    assert model.augmenters[0].encoder.layer[0] is whole.bert.encoder.layer[0]


def test_a_causal_model_may_read_the_prompt_only() -> None:
    model = randomize(
        compose(FAMILIES["llama"].model(0), FAMILIES["gpt2"].model(1), "uniform:2", bidirectional="prompt")
    )
    ids, mask = left_padded(prompts())
    assert torch.equal(
        generated(model, ids, attention_mask=mask), generated(model, ids, attention_mask=mask, use_cache=False)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"use_cache": False}, "`prompt_length` must be given, because a bidirectional augmenter reads the prompt"),
        ({"labels": prompts()}, "`prompt_length` must be given"),
        ({"prompt_length": 5, "hi": torch.ones(2, 9, dtype=torch.int32)}, "`hi` must be None for a bidirectional"),
        ({"prompt_length": 5, "augmenter_input_ids": prompts()}, "`augmenter_input_ids` must be None for a bidirect"),
        ({"prompt_length": torch.ones(3, dtype=torch.int64)}, r"`prompt_length` must be None, a number of tokens, or"),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False, "prompt_length": 5},
            "`position_ids` must be positions that do not restart",
        ),
    ],
)
def test_calls_that_cannot_be_right_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_encoder()(prompts(), **call)


def test_training_mode_needs_the_prompts_length() -> None:
    with pytest.raises(ValueError, match="`prompt_length` must be given"):
        with_encoder().train()(prompts())


@pytest.mark.parametrize(
    ("value", "message"),
    [("both", "got str 'both'"), (["prompt", None], "got list"), (True, "got bool True")],
)
def test_another_value_of_bidirectional_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f'`bidirectional` must be None, "prompt" or "reencode", .*{message}'):
        compose(FAMILIES["llama"].model(0), encoder("bert"), "uniform:2", bidirectional=value)


@pytest.mark.parametrize("kind", ["bert", "roberta", "bart"])
def test_a_prompt_that_is_too_long_for_the_encoder_is_refused(kind: str) -> None:
    model = with_encoder(kind)
    fits = {"bert": 64, "roberta": 63, "bart": 64}[kind]
    ids = prompts(1, fits)
    assert model(ids).logits.shape[1] == fits
    message = f"`input_ids` must be of at most {fits} tokens for augmenter 0 .*got {fits + 1}"
    with pytest.raises(ValueError, match=message):
        model(prompts(1, fits + 1))


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_forward_breaks_its_graph_where_texts_are_read(mode: str) -> None:
    model, ids = with_encoder("bert", mode), prompts()
    expected = logits(model, ids)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, ids), expected)
    torch._dynamo.reset()
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a bidirectional augmenter needs the prompt's length and the ids on the host"):
        logits(whole, ids)
    torch._dynamo.reset()


def test_a_fixed_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="`max_length` must be 0 with it, got 64 and .* a bidirectional one"):
        with_encoder().new_cache(max_length=64)


def test_an_empty_row_of_padding_reads_nothing() -> None:
    model, ids = with_encoder(), prompts()
    mask = torch.ones_like(ids)
    mask[0] = 0
    with torch.no_grad():
        alone = logits(model, ids[1:], 9)
        both = logits(model, ids.masked_fill(mask == 0, PAD), 9, attention_mask=mask)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=rounding(alone))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [FNetModel, NystromformerModel, BertModel])
def test_an_encoder_reads_no_padding(kind: Any, mode: str) -> None:
    # FNet takes no mask; a convolution of Nystromformer reads what the mask hides
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    sizes |= {"num_attention_heads": 4}
    torch.manual_seed(2)
    encoder = kind(kind.config_class(vocab_size=VOCAB, pad_token_id=PAD, initializer_range=0.3, **sizes))
    model = randomize(compose(FAMILIES["llama"].model(0), encoder, "uniform:2", bidirectional=mode))
    ids, mask = left_padded(prompts())
    together = logits(model, ids, torch.tensor([7, 5]), attention_mask=mask)
    near = {"rtol": 0, "atol": rounding(together)}
    torch.testing.assert_close(logits(model, ids[:1, 4:], 3)[0], together[0, 4:], **near)
    torch.testing.assert_close(logits(model, ids[1:], 5)[0], together[1], **near)
    assert model.encoders[0] is not None and model.encoders[0].padded == (kind is BertModel)


@pytest.mark.skipif(not PAGE.is_file(), reason="the docs are not beside the tests")
def test_the_example_of_the_page_runs() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Encoders as augmenters\n")[1].split("\n## ")[0]
    exec(section.split("```python\n")[1].split("```")[0], {})


def test_a_prefix_of_the_anchor_leaves_an_encoders_readers_as_they_are() -> None:
    for mode in MODES:
        model, ids = with_encoder("bert", mode), prompts()
        before = logits(model, ids, prefix_lengths=P)
        changed = ids.clone()
        changed[:, P] = 2 + (changed[:, P] - 1) % 90
        after = logits(model, changed, prefix_lengths=P)
        torch.testing.assert_close(after[:, :P], before[:, :P], rtol=0, atol=rounding(before))
        assert not torch.allclose(before[:, P - 1], logits(model, ids)[:, P - 1], atol=1e-3)
