"""Rows become the ids that generation has: one beginning, no end after a prompt, special tokens as in a prompt."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from many_tokenizers import KINDS, tokenizer
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from calm_fast.core.token_ids import prompt_ids
from calm_fast.hf import AlignedCollator

AROUND = {
    "nothing": "$A",
    "beginning": "<s> $A",
    "end": "$A </s>",
    "both": "<s> $A </s>",
    "two": "<s> <|user|> $A </s>",
}


def fast(kind: str, around: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(tokenizer(kind).to_str())  # a copy: the other tests share that one
    ids = [(name, inner.token_to_id(name)) for name in ("<s>", "</s>", "<|user|>")]
    inner.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=ids)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", AROUND)
def test_a_prompt_is_what_generation_reads_and_the_end_comes_once(kind: str, around: str) -> None:
    """Tokenizers in the manner of T5 and BERT end every text; some add both ends."""
    own = fast(kind, around)
    collate, end = AlignedCollator([], own), own.eos_token_id
    row = collate.row({"prompt": "The cat", "completion": " sat."})
    assert row.ids[: row.prompt_length] == prompt_ids(own, "The cat")
    assert row.ids.count(end) == 1 and row.ids[-1] == end
    text = collate.row({"text": "The cat sat."})
    assert text.ids == [*prompt_ids(own, "The cat sat."), end]
    bare = AlignedCollator([], own, add_eos=False)
    assert end not in bare.row({"text": "The cat sat."}).ids


@pytest.mark.parametrize("around", ["beginning", "both"])
def test_a_beginning_that_the_prompt_writes_is_not_written_twice(around: str) -> None:
    own = fast("gpt2", around)
    row = AlignedCollator([], own).row({"prompt": "<s>The cat", "completion": " sat."})
    assert row.ids.count(own.bos_token_id) == 1
    assert row == AlignedCollator([], own).row({"prompt": "The cat", "completion": " sat."})


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_special_tokens_stand_for_them_in_completions_as_in_prompts_and_texts(kind: str) -> None:
    own = fast(kind, "beginning")
    collate, marker, end = AlignedCollator([], own), own.convert_tokens_to_ids("<|user|>"), own.eos_token_id
    rows = [{"text": "<|user|>cat</s>"}, {"prompt": "cat", "completion": "<|user|>cat</s>"},
            {"prompt": "<|user|>cat", "completion": " cat</s>"}]  # fmt: skip
    for row in rows:
        found = collate.row(row)
        assert found.ids.count(marker) == 1 and found.ids.count(end) == 1 and found.ids[-1] == end, row
    answer = collate.row(rows[1]).ids[collate.row(rows[1]).prompt_length :]
    assert answer[0] == marker


def test_tools_reach_the_chat_template_and_fields_of_messages_too() -> None:
    own = fast("gpt2", "nothing")
    own.chat_template = (
        "{% if tools %}{{ tools | length }} tools: {{ tools[0]['name'] }};{% endif %}{% for m in messages %}"
        "{{ m.content }}{% if m.tool_calls %}calls {{ m.tool_calls[0].name }}{% endif %};{% endfor %}"
    )
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]},
        {"role": "tool", "content": "3"}, {"role": "assistant", "content": "cat"},
    ]  # fmt: skip
    row = AlignedCollator([], own).row({"messages": chat, "tools": [{"name": "add"}]})
    assert own.decode(row.ids) == "1 tools: add;Hi;calls add;3;cat;"
    assert own.decode(row.ids[row.prompt_length :]) == "cat;"


def test_a_row_whose_completion_is_cut_off_is_told() -> None:
    own = fast("gpt2", "nothing")
    row = {"prompt": "The cat sat on the mat", "completion": " and the dog"}
    length = AlignedCollator([], own).row(row).prompt_length or 0
    with pytest.warns(UserWarning, match=rf"`max_length` \({length}\) cuts off all that is learned in a row"):
        AlignedCollator([None], own, max_length=length)([row])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = AlignedCollator([None], own, max_length=length + 1)([row])
        AlignedCollator([None], own, max_length=3)([{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}])
    assert (batch["labels"] != -100).sum() == 1


def test_tokens_that_a_rows_mask_hides_are_left_out() -> None:
    """Data sets that were tokenised with padding="max_length" have them."""
    collate = AlignedCollator([None], fast("gpt2", "nothing"))
    plain = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "prompt_length": 1}
    padded = {"input_ids": [0, 5, 6, 0, 7, 0], "labels": [9, -100, 6, 9, 7, 9], "prompt_length": 2,
              "attention_mask": [0, 1, 1, 0, 1, 0]}  # fmt: skip
    assert collate.row(padded) == collate.row(plain)
    del padded["labels"], plain["labels"]
    assert collate.row(padded) == collate.row(plain)
    padded["attention_mask"] = torch.tensor([1, 0])
    with pytest.raises(ValueError, match="`attention_mask` must be one per token of the row .6., got 2"):
        collate.row(padded)


@pytest.mark.parametrize("name", ["input_ids", "labels", "attention_mask"])
@pytest.mark.parametrize("value", [[[5, 6, 7]], [5.5, 6.0, 7.0], "5 6", 5])
def test_fields_of_a_row_must_be_integers(name: str, value: Any) -> None:
    row = {"input_ids": [5, 6, 7], name: value}
    with pytest.raises(TypeError, match=f"AlignedCollator: `{name}` must be a list of integers for each row"):
        AlignedCollator([None], fast("gpt2", "nothing"))([row])


def test_a_batch_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="AlignedCollator: `rows` must be at least one row, got none"):
        AlignedCollator([None], fast("gpt2", "nothing"))([])
