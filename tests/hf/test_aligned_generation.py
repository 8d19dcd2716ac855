"""Generation with an augmenter that has another tokenizer: cached equals recomputed, in every mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES
from texts import aligned_model, rows, tokenizer
from transformers import DynamicCache, TextIteratorStreamer, pipeline

from calm_fast.hf import ComposedForCausalLM
from calm_fast.hf.cache_names import generate_argument

NAME = generate_argument()
PROMPT, OTHER = "the cat sat on", "der Hund und eine Katze"


def how(kind: str = "bytes", new: int = 10, **more: Any) -> dict[str, Any]:
    """Arguments of generate for texts of words: no single bytes, no end."""
    vocab = tokenizer(kind).get_vocab()
    letters = [i for token, i in vocab.items() if len(token) < 2 or token.startswith("<")]
    return {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "suppress_tokens": letters} | more


def generated(model: ComposedForCausalLM, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(ids, **more)


def steps(model: ComposedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record how many ids the first augmenter gets per row in every call."""
    seen, inner = [], model._read_augmenters

    def read(frame: Any, calls: Any, cache: Any, *more: Any) -> None:
        seen.append(list(cache.texts[0].counts()))
        inner(frame, calls, cache, *more)

    monkeypatch.setattr(model, "_read_augmenters", read)
    return seen


def test_steps_bring_no_one_and_several_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    model = aligned_model()
    seen = steps(model, monkeypatch)
    generated(model, rows(PROMPT)[0], **how(new=24))
    counts = [row[0] for row in seen]
    new = {after - before for before, after in zip(counts, counts[1:], strict=False)}
    assert counts[0] > 0 and {0, 1} <= new and max(new) > 1


MODES = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "its anchor drafts": {"assistant_model": "anchor"},
}
BOTH = {
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "guidance": {"guidance_scale": 1.5},
    "guidance by a negative prompt": {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[90, 91, 92]])},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_way_to_keep_the_cache_changes_no_token(mode: str) -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    more = {name: model.anchor if value == "anchor" else value for name, value in MODES[mode].items()}
    assert torch.equal(generated(model, ids, **how(), **more), generated(model, ids, **how(), use_cache=False))


@pytest.mark.parametrize("mode", BOTH)
def test_a_way_to_choose_tokens_does_not_mind_the_cache(mode: str) -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    more = how(**BOTH[mode])
    assert torch.equal(generated(model, ids, **more), generated(model, ids, **more, use_cache=False))


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_of_a_left_padded_batch_are_those_of_a_row_alone(beams: int, chunk: int | None) -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT, OTHER, "a small model reads what")
    together = generated(model, ids, attention_mask=mask, **how(num_beams=beams, prefill_chunk_size=chunk))
    for row, real, got in zip(ids, mask.bool(), together, strict=True):
        alone = generated(model, row[real][None], **how(num_beams=beams), use_cache=False)
        assert torch.equal(got[ids.shape[1] :], alone[0, int(real.sum()) :])


@torch.no_grad()
def test_generated_logits_are_those_of_one_forward_with_the_prompts_length() -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT, OTHER)
    names = dict.fromkeys(("return_dict_in_generate", "output_logits"), True)
    outputs = generated(model, ids, attention_mask=mask, **how(), **names)
    whole = torch.cat([mask, mask.new_ones(2, 10)], 1)
    again = model(outputs.sequences, attention_mask=whole, prompt_length=ids.shape[1], use_cache=False).logits
    got = torch.stack(outputs.logits, 1)
    torch.testing.assert_close(got, again[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-4)
    wrong = model(outputs.sequences, attention_mask=whole, use_cache=False).logits
    assert not torch.allclose(got, wrong[:, ids.shape[1] - 1 : -1], rtol=1e-2, atol=1e-2)  # the end counts


FAMILIES_TRIED = ["llama", "gemma3_text", "mistral", "gpt2", "bloom", "mixtral", "falcon", "opt"]


def parts_of(family: str, role: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return (family, tokenizer) of an anchor and of an augmenter, of which one is of this family."""
    kinds = ("bytes", "wordpiece", "metaspace")
    kind = kinds[FAMILIES_TRIED.index(family) % 3] if role == "augmenter" else "bytes"
    kind = "metaspace" if kind == "bytes" else kind
    return ((family, "bytes"), ("llama", kind)) if role == "anchor" else (("llama", "bytes"), (family, kind))


@pytest.mark.parametrize("role", ["anchor", "augmenter"])
@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_families_in_either_role(family: str, role: str) -> None:
    model, (ids, mask) = aligned_model(*parts_of(family, role)), rows(PROMPT, OTHER)
    more = how(new=8) | {"attention_mask": mask}
    assert torch.equal(generated(model, ids, **more), generated(model, ids, **more, use_cache=False))


@pytest.mark.parametrize(("anchor", "augmenter"), [("mamba", "llama"), ("llama", "mamba")])
def test_recurrent_parts_generate_row_by_row(anchor: str, augmenter: str) -> None:
    model, (ids, _) = aligned_model((anchor, "bytes"), (augmenter, "metaspace"), connections=[(0, 1)]), rows(PROMPT)
    assert torch.equal(generated(model, ids, **how()), generated(model, ids, **how(), use_cache=False))


@pytest.mark.parametrize(
    ("kind", "other"), [("metaspace", "bytes"), ("wordpiece", "bytes"), ("metaspace", "wordpiece")]
)
def test_tokenizers_in_other_roles(kind: str, other: str) -> None:
    model, (ids, mask) = aligned_model(("llama", kind), ("qwen3", other)), rows(PROMPT, OTHER, kind=kind)
    more = how(kind) | {"attention_mask": mask}
    assert torch.equal(generated(model, ids, **more), generated(model, ids, **more, use_cache=False))


def test_augmenters_with_other_tokenizers_and_with_the_anchors() -> None:
    parts = (("llama", "bytes"), ("gpt2", "metaspace"), ("llama", "bytes"), ("qwen3", "wordpiece"))
    model, (ids, mask) = aligned_model(*parts, connections=[(0, 1)]), rows(PROMPT, OTHER)
    assert [aligner is None for aligner in model.aligners] == [False, True, False]
    for more in (how(), how(num_beams=2), how(prefill_chunk_size=4)):
        more = more | {"attention_mask": mask}
        recomputed = {name: value for name, value in more.items() if name != "prefill_chunk_size"}
        want = generated(model, ids, **recomputed, use_cache=False)
        assert torch.equal(generated(model, ids, **more), want)


@pytest.mark.parametrize("kind", ["returned", "own object", "own static object"])
def test_a_chat_goes_on_with_its_cache(kind: str) -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    cache, ends, more = None, [], how(new=5)
    if kind != "returned":
        from transformers import StaticCache

        cache = (
            DynamicCache(config=model.config)
            if kind == "own object"
            else StaticCache(config=model.config, max_cache_len=64)
        )
    for turn in (OTHER, "one two", ""):
        ends.append(ids.shape[1])
        ends_of_prompts = torch.tensor([ends])
        want = generated(model, ids, **more, use_cache=False, prompt_length=ends_of_prompts)
        got = generated(model, ids, **more, **({} if cache is None else {NAME: cache}), return_dict_in_generate=True)
        assert torch.equal(got.sequences, want)
        cache = got.cache if kind == "returned" else cache
        ids = torch.cat([want, rows(turn)[0]], 1) if turn else want


def test_a_cache_with_other_rows_is_refused_by_name() -> None:
    model = aligned_model()
    ids = rows("the cat sat on")[0]
    cache = model(ids, use_cache=True).cache
    for count in (2, 3):
        with pytest.raises(ValueError, match=f"`input_ids` must be of 1 rows, .* got {count}. Repeat the cache's rows"):
            model(ids[:, :1].repeat(count, 1), cache=cache)


def test_a_composition_drafts_for_another_model() -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    target = FAMILIES["llama"].model(7, vocab=len(tokenizer("bytes")))
    assert torch.equal(target.generate(ids, **how(), assistant_model=model), target.generate(ids, **how()))
    # the draft is the composition itself: it must agree with itself on every token
    twin = aligned_model()
    outputs = generated(model, ids, **how(new=12), assistant_model=twin)
    assert torch.equal(outputs, generated(model, ids, **how(new=12)))


def test_a_row_that_has_ended_gives_its_augmenter_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT, OTHER)
    more = how(new=12) | {"attention_mask": mask}
    want = generated(model, ids, **more)
    # an end token that row 0 chooses early and row 1 never; padding that looks like words
    start, words = ids.shape[1], [i for token, i in tokenizer("bytes").get_vocab().items() if token == "Ġthe"]
    end = next(t for t in want[0, start + 1 :].tolist() if t not in want[1, start:])
    seen = steps(model, monkeypatch)
    got = generated(model, ids, **more | {"eos_token_id": end, "pad_token_id": words[0]})
    stop = want[0, start:].tolist().index(end)
    assert torch.equal(got[1], want[1]) and got[0, start + stop + 1 :].unique().tolist() == words
    assert len({counts[0] for counts in seen[stop + 2 :]}) == 1  # the padding was no text


def test_streams_and_pipelines() -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    streamer = TextIteratorStreamer(tokenizer("bytes"), skip_prompt=True)
    want = generated(model, ids, **how(), streamer=streamer)[0, ids.shape[1] :]
    assert "".join(streamer) == tokenizer("bytes").decode(want)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer("bytes"))
    got = pipe([PROMPT, OTHER], batch_size=2, return_full_text=False, **how())
    assert got[0][0]["generated_text"] == tokenizer("bytes").decode(want)


@pytest.mark.parametrize("role", ["anchor", "augmenter"])
@pytest.mark.parametrize("family", FAMILIES_TRIED)
@torch.no_grad()
def test_a_future_token_moves_no_earlier_logit(family: str, role: str) -> None:
    model = aligned_model(*parts_of(family, role))
    ids = rows("the cat sat on the mat and the dog")[0]
    length = ids.shape[1]
    for prompt, places in ((None, (5, length - 2)), (4, (5, 7, length - 1))):
        one = model(ids, use_cache=False, prompt_length=prompt).logits
        for place in places:
            other = ids.clone()
            other[0, place] = (ids[0, place] + 31) % 300 + 3
            two = model(other, use_cache=False, prompt_length=prompt).logits
            torch.testing.assert_close(one[:, :place], two[:, :place], rtol=1e-4, atol=1e-4)
            if place < length - 2:  # the test would pass on a model that reads nothing
                assert not torch.allclose(one[:, place:], two[:, place:], rtol=1e-2, atol=1e-2)
