"""Padding never reaches a visible token: masks with holes, masks of an augmenter's own tokens, intervals, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, PAD, composed_model, prompts, randomize

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.hooks import running
from calm_fast.hf.masks import CAUSAL, aligned_visibility, given_visibility

LEFT, RIGHT, HOLE = [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0, 1]
CLOSE = {"rtol": 0, "atol": 2e-5}


def row(mask: list[int], fill: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return one row whose padding holds `fill`, with positions that count its real tokens."""
    mask = torch.tensor([mask])
    ids = prompts(1, mask.shape[1], seed)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids.masked_fill(mask == 0, fill), "attention_mask": mask, "position_ids": positions}


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("mask", "how"),
    [(mask, how) for mask in (LEFT, RIGHT, HOLE) for how in ("eager", "default cache")] + [(HOLE, "compiled")],
)
@torch.no_grad()
def test_a_padded_row_gives_what_the_row_without_padding_gives(mask: list[int], how: str) -> None:
    composed = composed_model("llama")
    torch.compiler.reset()
    call = torch.compile(composed, backend="eager", fullgraph=True) if how == "compiled" else composed
    use_cache = None if how == "default cache" else False
    given = row(mask, 0)
    real = given["attention_mask"][0].bool()
    want = composed(given["input_ids"][:, real]).logits
    for fill in (0, 55):
        outputs = call(**row(mask, fill), use_cache=use_cache)
        torch.testing.assert_close(outputs.logits[:, real], want, **CLOSE)
    assert how != "default cache" or (outputs.cache is None) == (mask is HOLE)


@torch.no_grad()
def test_the_padding_queries_of_a_row_with_a_hole_get_no_residual() -> None:
    given = row(HOLE, 7)
    visible = aligned_visibility(given["attention_mask"], None, 1, 0, 9, False)
    assert visible.order.tolist() == [[0, 1, 2, 5, 6, 8, 3, 4, 7]] and visible.lo is None and not visible.causal
    assert visible.hi.tolist() == [[1, 2, 3, 0, 0, 4, 5, 0, 6]] and visible.hi.dtype == torch.int32


@pytest.mark.seam(
    attach="an attention mask with a hole (padding between turns), without a cache",
    to="composition",
    result="works",
    why="the real tokens are sorted to the front before they are read",
)
def test_training_skips_a_hole_in_the_mask() -> None:
    composed = composed_model("llama", [(1, 1)]).train()
    gradients = []
    for given in (row(HOLE, 0), row(HOLE, 55)):
        composed.zero_grad()
        # a token after padding is not trained: the padding before it would predict it
        padding = given["attention_mask"] == 0
        labels = given["input_ids"].masked_fill(padding | padding.roll(1, 1), -100)
        composed(**given, labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in composed.connections.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two) and one.abs().sum() > 0


@pytest.mark.seam(
    attach="an attention mask with a hole, with a cache",
    to="composition",
    result="refused",
    why="move the padding to one end of the row, or pass `use_cache=False`",
)
@pytest.mark.parametrize("mask", [HOLE, [*RIGHT, 1]], ids=["prompt", "step after right padding"])
@torch.no_grad()
def test_a_hole_with_a_cache_is_refused(mask: list[int]) -> None:
    composed, given = composed_model("llama"), row(mask, 0)
    del given["position_ids"]
    with pytest.raises(ValueError, match="`attention_mask` must be one block .* got a row with zeros between ones"):
        first = {name: t[:, :9] for name, t in given.items()}
        cache = composed(**first, use_cache=True).cache
        composed(given["input_ids"][:, 9:], attention_mask=given["attention_mask"], cache=cache)
    assert running() is None


@pytest.mark.parametrize(("past", "new"), [(0, 5), (2, 3), (4, 1)])
def test_a_traced_graph_with_a_cache_asserts_that_there_is_no_hole(past: int, new: int) -> None:
    torch.compiler.reset()
    call = torch.compile(aligned_visibility, backend="aot_eager", fullgraph=True)  # its passes must keep the assertion
    lo, hi, *_ = call(torch.tensor([[0, 1, 1, 1, 1]]), None, 1, past, new, True)
    assert lo.tolist() == [[1] * new] and hi.tolist() == [list(range(past + 1, 6))]
    with pytest.raises(RuntimeError, match="`attention_mask` must be one block of ones per row"):
        call(torch.tensor([[1, 0, 1, 1, 1]]), None, 1, past, new, True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_masks_of_every_dtype_say_the_same(dtype: torch.dtype) -> None:
    composed, given = composed_model("llama"), row(LEFT, 0)
    want = composed(**given).logits
    given["attention_mask"] = given["attention_mask"].to(dtype)
    assert torch.equal(composed(**given).logits, want)


@pytest.mark.seam(
    attach="an attention mask with other values than 0 and 1 (document numbers, additive masks)",
    to="composition",
    result="refused",
    why="mark documents by `position_ids` that restart",
)
@pytest.mark.parametrize("values", [[1, 1, 2, 2, 3], [0.0, 0.0, -1e9, 0.0, 0.0], [1, 1, -1, 1, 1]])
@torch.no_grad()
def test_a_mask_of_other_values_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="`attention_mask` must be 0 for padding and 1 .* got other values"):
        composed_model("llama")(prompts(1, 5), attention_mask=torch.tensor([values]))


@pytest.mark.seam(
    attach="padding on the right of a prompt, in `generate`",
    to="composition",
    result="refused",
    why='pad on the left (`tokenizer.padding_side = "left"`)',
)
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_generate_refuses_a_prompt_that_is_padded_on_the_right(masked: bool) -> None:
    given = row(RIGHT, PAD)  # without a mask, transformers makes one from the padding tokens
    mask = given["attention_mask"] if masked else None
    with pytest.raises(ValueError, match="generate: `attention_mask` must be 1 for the last token .* Pad on the left"):
        composed_model("llama").generate(given["input_ids"], attention_mask=mask, max_new_tokens=1)


@torch.no_grad()
def test_a_cache_of_padded_rows_does_not_go_on_without_a_mask() -> None:
    composed, given = composed_model("llama"), row(LEFT, 0)
    cache = composed(given["input_ids"], attention_mask=given["attention_mask"]).cache
    with pytest.raises(ValueError, match="`attention_mask` must be given in every call with this cache"):
        composed(given["input_ids"][:, :1], cache=cache)
    cache.reset()
    if cache.get_seq_length() == 0:  # older releases keep the length
        assert composed(given["input_ids"], cache=cache).logits.shape[1] == 9


def with_own_tokens() -> tuple[ComposedForCausalLM, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a composition, a text for the anchor, another for the augmenter, and the intervals lo, hi."""
    anchor, augmenter = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1, width=16)
    composed = randomize(compose(anchor, augmenter, "uniform:2"))
    return composed, prompts(1, 6, 11), prompts(1, 4, 12), int32([0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 4])


@pytest.mark.seam(
    attach="`augmenter_attention_mask` with padding",
    to="composition",
    result="works",
    why="its padding is left out of every interval",
)
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
@torch.no_grad()
def test_an_augmenters_own_padding_is_not_read(mask: list[int]) -> None:
    composed, ids, own, (lo, hi) = with_own_tokens()
    want = composed(ids, augmenter_input_ids=own, lo=lo, hi=hi, use_cache=False).logits
    real = torch.tensor([mask])
    slots = real[0].nonzero()[:, 0]
    # the interval in slots: from the first token it reads, to just past the last one; the rest is padding
    start, stop = torch.cat([slots, slots.new_tensor([6])]).int(), torch.cat([slots.new_zeros(1), slots + 1]).int()
    for fill in (0, 55):
        padded = torch.full((1, 6), fill)
        padded[0, slots] = own[0]
        arguments = {
            "augmenter_input_ids": padded,
            "augmenter_attention_mask": real,
            "augmenter_position_ids": (real.cumsum(1) - 1).clamp(min=0),
        }
        bounds = {"lo": start[lo.long()][None], "hi": stop[hi.long()][None]}
        got = composed(ids, **arguments, **bounds, use_cache=False).logits
        torch.testing.assert_close(got, want, **CLOSE)
    whole = composed(ids, augmenter_input_ids=own, hi=int32(*[4] * 6), use_cache=False).logits
    got = composed(ids, **arguments, hi=int32(*[6] * 6), use_cache=False).logits  # beyond the real tokens
    torch.testing.assert_close(got, whole, **CLOSE)


@torch.no_grad()
def test_an_augmenters_own_padding_is_not_read_from_a_cache() -> None:
    composed, ids, own, _ = with_own_tokens()
    hi = int32([1, 2, 2, 3, 3, 4])
    want = composed(ids, augmenter_input_ids=own, hi=hi, use_cache=False).logits
    padded = torch.cat([torch.full((1, 2), 9), own], dim=1)  # two slots of padding on the left
    cache, logits, done = None, [], 0
    for i in range(6):
        stop = int(hi[0, i]) + 2
        mask = (torch.arange(stop) >= 2).long()[None]
        outputs = composed(
            ids[:, i : i + 1],
            cache=cache,
            use_cache=True,
            augmenter_input_ids=padded[:, done:stop],  # (1, 0) in some steps: no new token
            augmenter_attention_mask=mask,
            augmenter_position_ids=(torch.arange(done, stop) - 2).clamp(min=0)[None],
            hi=int32([stop]),
        )
        cache, done = outputs.cache, stop
        logits.append(outputs.logits)
    torch.testing.assert_close(torch.cat(logits, 1), want, **CLOSE)


@pytest.mark.seam(
    attach="`augmenter_input_ids` of shape (batch, 0) in a step",
    to="composition",
    result="works",
    why="the augmenter has no new token there",
)
@torch.no_grad()
def test_an_augmenter_may_start_without_a_token() -> None:
    composed, ids, own, _ = with_own_tokens()
    want = composed(ids[:, :2], augmenter_input_ids=own[:, :1], hi=int32([0, 1]), use_cache=False).logits
    first = composed(ids[:, :1], augmenter_input_ids=own[:, :0], hi=int32([0]), use_cache=True)
    second = composed(ids[:, 1:2], cache=first.cache, augmenter_input_ids=own[:, :1], hi=int32([1]))
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), want, **CLOSE)


@pytest.mark.seam(
    attach="a step without `augmenter_input_ids` after steps with them",
    to="composition",
    result="refused",
    why="pass (batch, 0) ids where the augmenter has no new token",
)
@pytest.mark.parametrize("kwargs", [{}, {"hi": int32([2])}])
@torch.no_grad()
def test_own_tokens_may_not_be_left_out_of_a_later_step(kwargs: dict[str, Any]) -> None:
    composed, ids, own, _ = with_own_tokens()
    cache = composed(ids[:, :2], augmenter_input_ids=own[:, :2], hi=int32([1, 2]), use_cache=True).cache
    with pytest.raises(ValueError, match="`augmenter_input_ids` must be given in every call with this cache"):
        composed(ids[:, 2:3], cache=cache, **kwargs)


@torch.no_grad()
def test_given_intervals_read_neither_padding_nor_the_row_before() -> None:
    composed, given = composed_model("llama"), row(LEFT, 0)
    want = composed(**given).logits
    got = composed(**given, hi=int32(*range(1, 10)))  # lo is 0: the padding on the left
    torch.testing.assert_close(got.logits[:, 2:], want[:, 2:], **CLOSE)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="`lo` must be given with `hi` for rows of several documents"):
        composed(given["input_ids"], position_ids=packed, hi=int32(*range(1, 10)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hi": int32(*[5] * 6)}, "`hi` must be from 0 to 4, the number of the augmenter's tokens .*, got 5"),
        ({"lo": int32(*[-1] * 6)}, "`lo` must be from 0 to 4, .*, got -1"),
        ({"hi": int32(*[4] * 5)}, r"`hi` must be of shape \(1, 6\) or \(6,\), .*, got shape \(5,\)"),
        ({"hi": torch.full((1, 6), 4)}, "`hi` must have dtype int32, got torch.int64"),
        ({"hi": [int32(*[5] * 6)]}, "`hi` must be from 0 to 4"),
        ({"augmenter_attention_mask": torch.ones(1, 6)}, r"`augmenter_attention_mask` must be of shape \(1, 4\)"),
        ({"augmenter_attention_mask": int32([1, 1, 3, 0])}, "`augmenter_attention_mask` must be 0 for padding"),
        ({"augmenter_position_ids": torch.ones(1, 6).long()}, r"`augmenter_position_ids` must be of shape \(1, 4\)"),
        ({"augmenter_input_ids": prompts(2, 4)}, r"`augmenter_input_ids` must be of batch size 1, got shape \(2, 4\)"),
    ],
)
def test_bad_arguments_of_an_augmenters_own_tokens_are_refused(kwargs: dict[str, Any], message: str) -> None:
    composed, ids, own, (lo, hi) = with_own_tokens()
    with pytest.raises((ValueError, TypeError), match=f"ComposedForCausalLM: {message}"):
        composed(ids, **({"augmenter_input_ids": own, "lo": lo, "hi": hi} | kwargs))


def test_a_bound_per_augmenter_is_checked_against_its_own_tokens() -> None:
    anchor, first = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1, width=16)
    composed = compose(anchor, [first, FAMILIES["gpt2"].model(2)], [(0, 0)])
    ids, four, five = prompts(1, 6), int32(*[4] * 6), int32(*[5] * 6)
    own = [prompts(1, 4), prompts(1, 5)]
    assert composed(ids, augmenter_input_ids=own, hi=[four, five]).logits.shape[1] == 6
    assert composed(ids, augmenter_input_ids=[None, own[1]], hi=[None, five]).logits.shape[1] == 6
    with pytest.raises(ValueError, match="`hi` must be from 0 to 4"):
        composed(ids, augmenter_input_ids=own, hi=five)


@pytest.mark.parametrize("mask", [[1, 0, 1, 1, 0], [0, 1, 1, 1, 0]])
def test_traced_intervals_skip_padding_as_others_do(mask: list[int]) -> None:
    torch.compiler.reset()
    call = torch.compile(given_visibility, backend="eager", fullgraph=True)
    arguments = int32([0, 1, 2]), int32([2, 3, 5]), "mask", torch.tensor([mask]), 1, 3, 0, 5, False
    keys = torch.arange(5)[None]
    for visible in (given_visibility(*arguments), call(*arguments)):
        lo, hi, _, order, _ = visible
        order = keys if order is None else order
        read = [order[0, a:b].tolist() for a, b in zip(lo[0].tolist(), hi[0].tolist(), strict=True)]
        assert read == [[j for j in range(a, b) if mask[j]] for a, b in ((0, 2), (1, 3), (2, 5))]


def test_an_interval_keeps_its_tensors_where_nothing_is_padded() -> None:
    lo, hi, mask = int32([0, 1]), int32([1, 2]), torch.ones(1, 2)
    visible = given_visibility(lo, hi, "augmenter_attention_mask", mask, 1, 2, 0, 2, None)
    assert visible.lo is lo and visible.hi is hi and not visible.causal
    assert aligned_visibility(mask, None, 1, 0, 2, True) is CAUSAL
