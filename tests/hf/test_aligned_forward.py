"""forward of a composition whose augmenter has another tokenizer: the model aligns the ids itself."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from texts import aligned_model, rows
from unread import NoReading, values_unread

from calm_fast.hf import ComposedForCausalLM

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
PROMPT, OTHER = "the cat sat on the mat", "der Hund und eine Katze läuft"


def explicit(
    model: ComposedForCausalLM, ids: torch.Tensor, mask: torch.Tensor, ends: list[int | None]
) -> dict[str, Any]:
    """Return the arguments that a user would make by hand: every row aligned alone, padded on the right."""
    made = []
    for row, real, end in zip(ids.tolist(), mask.bool().tolist(), ends, strict=True):
        kept = [token for token, keep in zip(row, real, strict=True) if keep]
        a_ids, bounds = model.aligners[0].align(kept, end)
        hi = [0] * len(row)
        for place, bound in zip([i for i, keep in enumerate(real) if keep], bounds, strict=True):
            hi[place] = bound
        made.append((a_ids, hi))
    longest = max(len(a_ids) for a_ids, _ in made)
    own = torch.tensor([a_ids + [7] * (longest - len(a_ids)) for a_ids, _ in made])
    read = torch.tensor([[1] * len(a_ids) + [0] * (longest - len(a_ids)) for a_ids, _ in made])
    hi = torch.tensor([hi for _, hi in made], dtype=torch.int32)
    return {"augmenter_input_ids": own, "augmenter_attention_mask": read, "hi": hi}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_call_without_ids_is_the_call_with_aligned_ids(side: str, use_cache: bool) -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT, OTHER, side=side)
    lengths = mask.sum(1)
    first = ids.shape[1] - lengths if side == "left" else torch.zeros_like(lengths)
    for prompt_length, ends in (
        (None, lengths.tolist()),
        (ids.shape[1] - 1, [int(min(n, ids.shape[1] - 1 - f)) for n, f in zip(lengths, first, strict=True)]),
        (first + torch.tensor([3, 5]), [3, 5]),
        (0, [None, None]),
        (100, [None, None]),
    ):
        want = model(ids, attention_mask=mask, **explicit(model, ids, mask, ends), use_cache=False).logits
        got = model(ids, attention_mask=mask, prompt_length=prompt_length, use_cache=use_cache).logits
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


def test_training_without_a_collator_has_the_same_loss_and_gradients() -> None:
    model, (ids, mask) = aligned_model().train(), rows(PROMPT, OTHER, side="right")
    labels, ends = ids.masked_fill(mask == 0, -100), torch.tensor([4, 6])
    labels[0, :4] = labels[1, :6] = -100
    gradients = []
    for given in ({"prompt_length": ends}, explicit(model, ids, mask, ends.tolist())):
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels, **given).loss
        loss.backward()
        gradients.append([loss, *(p.grad.clone() for p in model.connections.parameters())])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("sizes", [[6, 1, 1, 1, 1], [4, 3, 3], [1] * 10])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_calls_with_a_cache_are_one_call(batch: int, sizes: list[int]) -> None:
    model, (ids, mask) = aligned_model(), rows(*(PROMPT, OTHER)[:batch])
    ids, mask = ids[:, -10:], mask[:, -10:]
    want = model(ids, attention_mask=mask, prompt_length=sizes[0], use_cache=False).logits
    cache, done, got = None, 0, []
    for size in sizes:
        done += size
        new = ids[:, done - size : done]
        outputs = model(new, attention_mask=mask[:, :done], cache=cache, use_cache=True)
        cache = copy.deepcopy(outputs.cache) if done < 6 else outputs.cache
        got.append(outputs.logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], **CLOSE)


@torch.no_grad()
def test_the_prompts_end_may_be_said_in_advance_and_several_times() -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    want = model(ids, prompt_length=torch.tensor([[5, 8]]), use_cache=False).logits
    first = model(ids[:, :3], prompt_length=5)
    second = model(ids[:, 3:6], cache=first.cache)
    third = model(ids[:, 6:], cache=second.cache, prompt_length=8)
    got = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_rows_that_are_moved_and_tokens_that_are_cropped_take_their_text_along() -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT, OTHER)
    cut = ids.shape[1] - 4
    cache = model(ids[:, :cut], attention_mask=mask[:, :cut], use_cache=True).cache
    more = torch.cat([ids, ids[:, -2:]], 1)[:, cut:]
    seen = torch.cat([mask, mask[:, -2:]], 1)

    def goes_on(cache: Any, order: list[int]) -> torch.Tensor:
        return model(more[order], attention_mask=seen[order], cache=cache).logits

    want = goes_on(copy.deepcopy(cache), [0, 1])
    reordered, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
    reordered.reorder_cache(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(goes_on(reordered, [1, 0, 1]), want[[1, 0, 1]], **CLOSE)
    repeated.batch_repeat_interleave(2)
    repeated.batch_select_indices(torch.tensor([True, False, True, True]))
    torch.testing.assert_close(goes_on(repeated, [0, 1, 1]), want[[0, 1, 1]], **CLOSE)
    torch.testing.assert_close(goes_on(pickle.loads(pickle.dumps(cache)), [0, 1]), want, **CLOSE)
    cache.reset()
    again = model(ids[:, :cut], attention_mask=mask[:, :cut], cache=cache).cache
    torch.testing.assert_close(goes_on(again, [0, 1]), want, **CLOSE)


@pytest.mark.parametrize("lost", [1, 3, 6])
@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_nothing_had_come(lost: int) -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    want = model(ids, prompt_length=4, use_cache=False).logits
    cache = model(ids[:, :4]).cache
    cache = model(torch.cat([ids[:, 4:-lost], ids[:, :lost]], 1), cache=cache).cache
    cache.crop(-lost)
    got = model(ids[:, -lost:], cache=cache).logits
    torch.testing.assert_close(got, want[:, -lost:], **CLOSE)


@torch.no_grad()
def test_given_ids_win_and_a_cache_keeps_to_them() -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT)
    own = explicit(model, ids, mask, [None])
    other = own | {"augmenter_input_ids": own["augmenter_input_ids"] * 0 + 9}
    assert not torch.allclose(model(ids, **own, use_cache=False).logits, model(ids, **other, use_cache=False).logits)
    del own["augmenter_attention_mask"]
    cache = model(ids, **own).cache
    with pytest.raises(ValueError, match="`augmenter_input_ids` must be given in every call with this cache"):
        model(ids[:, :1], cache=cache)


def test_what_cannot_be_aligned_is_refused_by_name() -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT)
    with pytest.raises(
        ValueError, match=r"`augmenter_input_ids` must be given for rows of several documents .*AlignedCollator"
    ):
        model(ids, position_ids=torch.arange(ids.shape[1])[None] % 4, use_cache=False)
    with pytest.raises(
        ValueError, match="`hi` must be None for an augmenter with another tokenizer whose ids are not given"
    ):
        model(ids, hi=torch.zeros_like(ids, dtype=torch.int32))
    for wrong in (True, -1, 2.5, torch.ones(3, dtype=torch.int64), torch.ones(1)):
        with pytest.raises(ValueError, match="`prompt_length` must be"):
            model(ids, prompt_length=wrong)
    with pytest.raises(ValueError, match="`attention_mask` must be of shape"):
        model(ids, attention_mask=mask[:, 1:])
    with pytest.raises(ValueError, match="`aligners` must be a list with a StreamAligner or None for each of 1"):
        model.aligners = []
    with pytest.raises(ValueError, match="cannot be read here"):
        model(ids.to("meta"))


def test_a_compiled_forward_breaks_its_graph_and_one_graph_wants_given_ids() -> None:
    model, (ids, mask) = aligned_model(connections=[(0, 0)], depth=1), rows(PROMPT, OTHER, side="right")
    given = {"attention_mask": mask, "use_cache": False}
    torch.compiler.reset()
    with torch.no_grad():
        want = model(ids, **given).logits
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids, **given).logits, want, **CLOSE)
        torch.compiler.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        own = explicit(model, ids, mask, mask.sum(1).tolist())
        torch.testing.assert_close(whole(ids, **given, **own).logits[mask.bool()], want[mask.bool()], **CLOSE)
        with pytest.raises(Exception, match="needs the ids on the host; pass `augmenter_input_ids`"):
            whole(ids, **given)
        with pytest.raises(Exception, match="torch.export cannot trace this call"):
            torch.export.export(model, (ids,), given)
    torch.compiler.reset()


@torch.no_grad()
def test_only_aligned_ids_are_read_from_a_gpu() -> None:
    model, (ids, mask) = aligned_model(), rows(PROMPT)
    for part in (model.anchor, *model.augmenters):
        part.set_attn_implementation("eager")  # transformers' SDPA reads masks and positions
    own = explicit(model, ids, mask, [None])
    del own["augmenter_attention_mask"]
    with values_unread(), NoReading():
        model(ids, **own)
        with pytest.raises(AssertionError, match="a value is read by tolist"):
            model(ids)


def test_augmenters_that_read_the_anchors_ids_still_do() -> None:
    parts = (("llama", "bytes"), ("llama", "bytes"), ("gpt2", "metaspace"))
    model, (ids, mask) = aligned_model(*parts, connections=[(0, 1)]), rows(PROMPT, OTHER)
    own = {name: [None, value] for name, value in explicit_of(model, ids, mask).items()}
    with torch.no_grad():
        want = model(ids, attention_mask=mask, **own, use_cache=False).logits
        got = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


def explicit_of(model: ComposedForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    twin = copy.copy(model)
    twin.aligners = model.aligners[::-1]
    return explicit(twin, ids, mask, mask.sum(1).tolist())


def test_deep_copies_and_pickled_compositions_align(tmp_path: Any) -> None:
    model, (ids, _) = aligned_model(), rows(PROMPT)
    want = model(ids, use_cache=False).logits
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(ids, use_cache=False).logits, want)
