"""Keyword arguments of forward that change what the anchor reads: right for the augmenters too, or refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import OTHERS, composed_model, prompts, randomize
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from calm_fast.hf import compose

PACKED = "return_flash_attn_kwargs" in inspect.signature(DataCollatorWithFlattening).parameters


def test_what_is_returned_and_the_loss_may_be_chosen() -> None:
    model, ids = composed_model("llama"), prompts()
    outputs = model(ids, labels=ids, output_hidden_states=True, output_attentions=True, num_items_in_batch=4)
    assert len(outputs.hidden_states) == 4
    torch.testing.assert_close(outputs.loss * 4, model(ids, labels=ids).loss * 16)


TOKENS = torch.zeros(2, 9, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(
            "token_type_ids",
            TOKENS,
            marks=pytest.mark.seam(
                attach="`token_type_ids`",
                to="composition",
                result="refused",
                why="the augmenters would not read them; make the tokenizer leave them out",
            ),
        ),
        pytest.param(
            "pixel_values",
            torch.zeros(1, 3, 4, 4),
            marks=pytest.mark.seam(
                attach="`pixel_values`, `encoder_hidden_states` and other inputs that are not tokens",
                to="composition",
                result="refused",
                why="the augmenters would not read them; compose models that read tokens only",
            ),
        ),
        ("encoder_hidden_states", torch.zeros(2, 3, 32)),
        ("is_causal", False),
        pytest.param(
            "any_other_name",
            1,
            marks=pytest.mark.seam(
                attach="a keyword argument that `forward` does not know, such as `is_causal`",
                to="composition",
                result="refused",
                why="it would reach the anchor only; leave it out",
            ),
        ),
    ],
)
def test_what_the_augmenters_would_not_read_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"ComposedForCausalLM: `{name}` must be None, got "):
        composed_model("llama")(prompts(), **{name: value})


@pytest.mark.seam(
    attach="three-dimensional `position_ids`",
    to="composition",
    result="refused",
    why="every part reads positions (batch, tokens); compose models that read tokens only",
)
def test_positions_of_images_are_refused() -> None:
    model, positions = composed_model("llama"), torch.arange(9).expand(3, 2, 9)
    for call in (model, lambda ids, **kwargs: model.generate(ids, max_new_tokens=1, **kwargs)):
        with pytest.raises(ValueError, match=r"`position_ids` must be 2-dimensional .* got shape \(3, 2, 9\)"):
            call(prompts(), position_ids=positions)


def test_cache_positions_may_only_repeat_what_the_cache_counts() -> None:
    model, ids = composed_model("llama"), prompts()
    model(ids, cache_position=torch.arange(9))
    with pytest.raises(ValueError, match="`cache_position` must be 0 to 8, as the cache counts"):
        model(ids, cache_position=torch.arange(9) + 1)


@pytest.mark.skipif(not PACKED, reason="this release of transformers writes no document limits")
@pytest.mark.seam(
    attach="`DataCollatorWithFlattening`, with `return_flash_attn_kwargs` and `return_seq_idx` too",
    to="composition",
    result="works",
    why="every part keeps the documents apart",
)
def test_packed_rows_equal_separate_rows() -> None:
    model, rows = composed_model("llama").train(), [row.tolist() for row in (*prompts(1, 5), *prompts(1, 8, seed=4))]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": row} for row in rows])
    together = model(**batch, output_hidden_states=True)
    apart = [model(torch.tensor([row]), labels=torch.tensor([row]), output_hidden_states=True) for row in rows]
    expected = torch.cat([outputs.hidden_states[-1] for outputs in apart], dim=1)
    torch.testing.assert_close(together.hidden_states[-1], expected, rtol=1e-4, atol=1e-4)
    total = sum(outputs.loss * (len(row) - 1) for outputs, row in zip(apart, rows, strict=True))
    torch.testing.assert_close(together.loss, total / sum(len(row) - 1 for row in rows), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not PACKED, reason="this release of transformers writes no document limits")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(
            {"position_ids": None},
            r"`seq_idx` must be given with `position_ids` that restart",
            marks=pytest.mark.seam(
                attach="`cu_seq_lens_q`, `seq_idx` without `position_ids` that restart",
                to="composition",
                result="refused",
                why="connections know documents by their positions; pass both",
            ),
        ),
        (
            {"position_ids": torch.arange(13)[None]},
            "must be the document limits that `position_ids` say",
        ),
        ({"seq_idx": torch.zeros(1, 13, dtype=torch.int32)}, "`seq_idx` must be the document limits"),
        ({"attention_mask": torch.ones(1, 13, dtype=torch.long)}, "`seq_idx` must be given with .* no mask"),
        ({"use_cache": True}, "`seq_idx` must be given with .* no mask, cache"),
        ({"hi": torch.full((1, 13), 3, dtype=torch.int32), "lo": torch.zeros(1, 13, dtype=torch.int32)}, "own tokens"),
    ],
)
def test_document_limits_that_connections_would_not_see_are_refused(change: dict[str, Any], problem: str) -> None:
    rows = [row.tolist() for row in (*prompts(1, 5), *prompts(1, 8, seed=4))]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = dict(collator([{"input_ids": row} for row in rows])) | change
    with pytest.raises(ValueError, match=problem):
        composed_model("llama")(**batch)


@pytest.mark.skipif(not PACKED, reason="this release of transformers writes no document limits")
def test_an_augmenter_that_takes_no_document_limits_is_named() -> None:
    model = randomize(compose(composed_model("llama").anchor, OTHERS["mpt"].model(1), [(0, 1)]))
    called = model.augmenters[0].transformer
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(called.forward).parameters.values()):
        called.forward = lambda input_ids, attention_mask=None, use_cache=None, past_key_values=None: None
    model.separates = True  # MPT does not, and would be refused for that
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": row.tolist()} for row in prompts(2, 5)])
    with pytest.raises(ValueError, match="`cu_seq_lens_q` must be None, got a value, which MptModel of `augmenters`"):
        model(**batch)


@pytest.mark.seam(
    attach="`DataCollatorForLanguageModeling(mlm=False)`",
    to="composition",
    result="works",
    why="padding is masked in every part",
)
def test_the_collator_for_language_models_pads_rows() -> None:
    from test_generation import words

    model, rows = composed_model("llama").train(), [row.tolist() for row in (*prompts(1, 5), *prompts(1, 8, seed=4))]
    tokenizer = words()
    tokenizer.padding_side = "right"
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in rows])
    together = model(**batch)
    losses = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    torch.testing.assert_close(together.loss, sum(losses) / 11, rtol=1e-5, atol=1e-5)
