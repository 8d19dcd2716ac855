"""Augmenters with tokens of their own and a cache: rows that grow at different rates equal every row by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, prompts, randomize
from ragged import Ragged
from transformers import StaticCache
from unread import FakeCuda, NoReading, values_unread

from calm_fast.hf import ComposedForCausalLM, compose, reading
from calm_fast.hf.reading import run_augmenter

ALL = FAMILIES | OTHERS
PAIRS = [(-1, -1), (0, 1), (2, 2)]


def composition(*augmenters: str, anchor: str = "llama") -> ComposedForCausalLM:
    """Return a composition of tiny models of these families with random weights."""
    parts = [ALL[name].model(1 + seed) for seed, name in enumerate(augmenters)]
    pairs: Any = PAIRS if len(parts) == 1 else [PAIRS] * len(parts)
    return randomize(compose(ALL[anchor].model(0), parts, pairs))


def run(model: ComposedForCausalLM, texts: Ragged, steps: range, cache: Any = None) -> tuple[torch.Tensor, Any]:
    """Return (the logits of these steps side by side, the cache)."""
    logits = []
    for step in steps:
        outputs = model(**texts.arguments(step), cache=cache, use_cache=True)
        cache = outputs.cache
        logits.append(outputs.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.seam(
    attach="rows with different numbers of new `augmenter_input_ids` in a step",
    to="composition",
    result="works",
    why="the mask says which are real; rows with fewer read their last tokens again",
)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(
    "family", ["llama", "gemma3_text", "mistral", "gpt2", "bloom", "mixtral", "falcon", "opt", "mpt"]
)
@torch.no_grad()
def test_rows_that_grow_at_different_rates_equal_rows_alone(family: str, padded: bool) -> None:
    model = composition(family)
    for seed in range(2):
        texts = Ragged.of(seed, padded=padded)
        logits, cache = run(model, texts, range(7))
        texts.check(model, logits, 6)
        longest = max(row[-1] for row in texts.readers[0].seen)
        assert cache.get_seq_length() == 10
        assert {layer.get_seq_length() for layer in cache.cross} == {longest}  # padding of all rows is dropped


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
@torch.no_grad()
def test_a_recurrent_augmenter_reads_rows_that_grow_together(family: str) -> None:
    model = composition(family)
    for rows, even in ((1, False), (2, True)):
        texts = Ragged.of(5, rows=rows, padded=False, even=even)
        # the scan of a prompt and the steps after it add in another order
        texts.check(model, run(model, texts, range(7))[0], 6, atol=2e-4)
    texts = Ragged.of(0)
    with pytest.raises(ValueError, match=r"`augmenter_attention_mask` must be 1 for the same number of new tokens .* "
                       r"because the .* state of augmenter 0 cannot take a token back, got \["):  # fmt: skip
        run(model, texts, range(7))


@torch.no_grad()
def test_unread_masks_move_rows_as_read_ones_do() -> None:
    model = composition("llama")
    for part in (model.anchor, model.augmenters[0]):
        part.set_attn_implementation("eager")  # transformers' SDPA reads masks
    for seed in range(3):
        texts, cache = Ragged.of(seed, padded=False), None
        for step in range(7):
            arguments = texts.arguments(step)
            with values_unread(), NoReading():
                outputs = model(**arguments, cache=cache, use_cache=True)
            cache = outputs.cache
            texts.check(model, outputs.logits, step)


@torch.no_grad()
def test_ragged_steps_of_a_fake_gpu_read_no_value() -> None:
    with FakeCuda():
        sizes = (32, 16)
        model = compose(*(FAMILIES["llama"].model(0, width, depth=2) for width in sizes), [(0, 1)], probe=False)
        ids, cache, slots = torch.ones(2, 9, dtype=torch.int64), None, 0
        for new in (4, 1, 0, 2):
            slots += new
            mask, hi = torch.ones(2, slots, dtype=torch.int64), torch.ones(2, 9 if cache is None else 1).int()
            own = {"augmenter_input_ids": ids[:, :new], "augmenter_attention_mask": mask, "hi": hi}
            outputs = model(ids[:, : hi.shape[1]], cache=cache, use_cache=True, **own)
            cache = outputs.cache
        assert outputs.logits.is_cuda and cache.cross[0].get_seq_length() == 7


@pytest.mark.gpu
@torch.no_grad()
def test_ragged_steps_do_not_synchronise_a_gpu() -> None:
    model = composition("llama")
    for part in (model.anchor, model.augmenters[0]):
        part.set_attn_implementation("eager")
    model.cuda()

    def steps() -> list[dict[str, Any]]:
        texts = Ragged.of(1, padded=False)
        moved = []
        for step in range(7):
            given = texts.arguments(step)
            lists = {name: [t.cuda() for t in value] for name, value in given.items() if isinstance(value, list)}
            moved.append({**given, **lists, "input_ids": given["input_ids"].cuda()})
        return moved

    for mode in ("default", "error"):  # the first run compiles kernels, and copies constants to the device
        arguments, cache = steps(), None
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for given in arguments:
                outputs = model(**given, cache=cache, use_cache=True)
                cache = outputs.cache
        finally:
            torch.cuda.set_sync_debug_mode("default")
    Ragged.of(1, padded=False).check(model.cpu(), outputs.logits.cpu(), 6, atol=1e-3)


@torch.no_grad()
def test_rows_of_a_ragged_cache_are_reordered_repeated_and_chosen() -> None:
    model = composition("gemma3_text")
    texts = Ragged.of(2)
    _, cache = run(model, texts, range(3))
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    texts.select([2, 0, 0])
    logits, cache = run(model, texts, range(3, 4), cache)
    texts.check(model, logits, 3)
    cache.batch_repeat_interleave(2)
    texts.select([0, 0, 1, 1, 2, 2])
    logits, cache = run(model, texts, range(4, 5), cache)
    texts.check(model, logits, 4)
    cache.batch_select_indices(torch.tensor([1, 4]))
    texts.select([1, 4])
    twin, other = copy.deepcopy(cache), copy.deepcopy(texts)
    for cache_of, texts_of in ((cache, texts), (twin, other)):
        logits, _ = run(model, texts_of, range(5, 7), cache_of)
        texts_of.check(model, logits, 6)
    cache.reset()
    texts = Ragged.of(3)
    texts.check(model, run(model, texts, range(4), cache)[0], 3)


class Aligned:
    """How many own tokens every row has after each token of the anchor, as a layer of the cache."""

    def __init__(self, seen: list[list[int]], tokens: int) -> None:
        self.seen, self.tokens = seen, tokens

    def counts(self, tokens: int | None = None) -> list[int]:
        tokens = self.tokens if tokens is None else tokens
        return [row[tokens - 1] for row in self.seen]

    def crop(self, tokens_to_remove: int) -> None:
        self.tokens += tokens_to_remove


@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_tokens_that_are_cropped_take_their_own_tokens_with_them(rows: int) -> None:
    model, texts = composition("gemma3_text"), Ragged.of(6, rows=rows, padded=False)
    again = copy.deepcopy(texts)
    _, cache = run(model, texts, range(6))
    reader = again.readers[0]
    assert reader is not None
    cache.texts[0] = Aligned(reader.seen, 9)
    cache.crop(-3)
    assert cache.get_seq_length() == 6 and cache.in_step()
    _, reference = run(model, again, range(3))
    # the caller counts slots, and shorter rows have their padding on the left now
    counts = [row[5] for row in reader.seen]
    slots = cache.own[0].slots
    reader.slots = [list(range(slots - n, slots)) for n in counts]
    reader.masks = [torch.tensor([[int(slot >= slots - n) for slot in range(slots)] for n in counts])]
    cache.texts[0] = None
    logits, cache = run(model, again, range(3, 7), cache)
    again.check(model, logits, 6)


@torch.no_grad()
def test_a_recurrent_augmenters_own_tokens_are_not_cropped() -> None:
    model, texts = composition("mamba"), Ragged.of(6, rows=1, padded=False)
    _, cache = run(model, texts, range(6))
    cache.texts[0] = Aligned([[*range(9)]], 9)
    with pytest.raises(ValueError, match="crop: every part must be able to go back, got .* recurrent state of"):
        cache.crop(-2)


@torch.no_grad()
def test_several_augmenters_grow_each_at_its_own_rate() -> None:
    model = composition("gpt2", "llama", "mistral")
    texts = Ragged.of(4, readers=3)
    texts.readers[1] = None  # reads the anchor's tokens
    logits, cache = run(model, texts, range(7))
    texts.check(model, logits, 6)
    assert len({layer.get_seq_length() for layer in cache.cross}) == 3 and sorted(cache.own) == [0, 2]


@pytest.mark.parametrize("anchor", ["llama", "mamba"])
@torch.no_grad()
def test_own_tokens_do_not_need_an_anchor_that_counts(anchor: str) -> None:
    model = composition("llama", anchor=anchor) if anchor == "llama" else compose(
        ALL[anchor].model(0), ALL["llama"].model(1), [(0, 0)], num_heads=4
    )  # fmt: skip
    cache: Any = None
    if anchor == "llama":
        cache = StaticCache(config=model.anchor.config, max_cache_len=16)
    texts = Ragged.of(1, padded=False)
    logits, cache = run(model, texts, range(7), cache)
    assert cache.get_seq_length() == 10
    texts.check(model, logits, 6)


@torch.no_grad()
def test_an_augmenter_without_a_new_token_in_any_row_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = composition("llama"), prompts(2, 3)
    calls: list[Any] = []
    monkeypatch.setattr(reading, "run_augmenter", lambda *args: (calls.append(args), run_augmenter(*args)))
    hi = torch.tensor([[1, 2, 2], [1, 1, 1]], dtype=torch.int32)
    mask = torch.tensor([[1, 1], [1, 0]])
    cache = model(ids, augmenter_input_ids=ids[:, :2], augmenter_attention_mask=mask, hi=hi, use_cache=True).cache
    for width in (0, 1):
        mask = torch.cat([mask, torch.zeros(2, width, dtype=torch.int64)], 1)
        own = {"augmenter_input_ids": ids[:, :width], "augmenter_attention_mask": mask, "hi": hi[:, -1:]}
        model(ids[:, :1], cache=cache, **own)
    assert len(calls) == 1 and cache.get_seq_length() == 5


def two_rows() -> tuple[ComposedForCausalLM, Any, torch.Tensor]:
    """Return a composition and a cache in which row 1 has one own token less."""
    model, ids = composition("llama"), prompts(2, 3)
    own = {"augmenter_input_ids": ids[:, :2], "augmenter_attention_mask": torch.tensor([[1, 1], [1, 0]])}
    return model, model(ids, **own, hi=torch.ones(2, 3).int(), use_cache=True).cache, ids[:, :1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "`augmenter_attention_mask` must be given in every call with this cache, because its rows have padding"),
        ([[1, 1, 1], [1, 1, 1]], r"`augmenter_attention_mask` must be 1 for as many of the first 2 slots .*, "
         r"got \[2, 2\] where the cache holds \[2, 1\]"),
        ([[1, 1, 2], [1, 0, 1]], "`augmenter_attention_mask` must be 0 for padding and 1"),
        ([[1, 1], [1, 0]], r"`augmenter_attention_mask` must be of shape \(2, 3\)"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_ragged_step_that_does_not_fit_the_cache_is_refused(mask: Any, message: str) -> None:
    model, cache, new = two_rows()
    own = {"augmenter_input_ids": new, "augmenter_attention_mask": None if mask is None else torch.tensor(mask)}
    with pytest.raises(ValueError, match=f"ComposedForCausalLM: {message}"):
        model(new, cache=cache, **own, hi=torch.ones(2, 1).int())


@torch.no_grad()
def test_an_augmenter_that_read_the_anchors_tokens_gets_no_own_ones() -> None:
    model, ids = composition("llama"), prompts(1, 3)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="`augmenter_input_ids` must be None with this cache, because augmenter 0"):
        model(ids[:, :1], cache=cache, augmenter_input_ids=ids[:, :1], hi=torch.ones(1, 1).int())


@pytest.mark.parametrize(("own", "name"), [(True, "augmenter_input_ids"), (False, "input_ids")])
@torch.no_grad()
def test_a_token_of_a_step_that_is_beyond_the_vocabulary_is_refused(own: bool, name: str) -> None:
    model, ids = composition("llama"), prompts(1, 3)
    given = {"augmenter_input_ids": ids[:, :2], "hi": torch.ones(1, 3).int()} if own else {}
    cache = model(ids, **given, use_cache=True).cache
    beyond = torch.tensor([[97]])
    step = {"augmenter_input_ids": beyond, "hi": torch.ones(1, 1).int()} if own else {}
    with pytest.raises(ValueError, match=f"`{name}` must be token ids from 0 to 96 .*, got 97"):
        model(ids[:, :1] if own else beyond, **step, cache=cache)
