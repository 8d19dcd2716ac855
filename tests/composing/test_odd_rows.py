"""Rows that real files have: null fields, tools, empty prompts, byte order marks, other line ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level, save_model, sentencepiece, write_rows
from transformers import LlamaForCausalLM

from calm_fast.composing.batches import single_collator
from calm_fast.composing.data import Row, encode, read_texts
from calm_fast.composing.pipeline import _claim
from calm_fast.composing.scoring import row_losses

CHAT = [{"role": "user", "content": "key 1 2?"}, {"role": "assistant", "content": "door 3."}]


def test_null_stands_for_a_field_that_a_row_does_not_have(tmp_path: Path) -> None:
    """Parquet and arrow give every row every column."""
    empty = {"text": None, "prompt": None, "completion": None, "messages": None, "tools": None}
    given: list[dict[str, Any]] = [{"text": "a"}, {"prompt": "b", "completion": "c"}, {"messages": CHAT}]
    plain = read_texts(write_rows(tmp_path / "plain.jsonl", given))
    wide = read_texts(write_rows(tmp_path / "wide.jsonl", [empty | row for row in given]))
    parts = [[(r.completion, r.prompt, r.messages, r.tools) for r in rows] for rows in (plain, wide)]
    assert parts[0] == parts[1]
    with pytest.raises(ValueError, match="line 1: a row must be an object with `text`, .* got text, prompt"):
        read_texts(write_rows(tmp_path / "none.jsonl", [empty]))
    with pytest.raises(ValueError, match="line 1: `text` must be a string, got NoneType"):
        read_texts(write_rows(tmp_path / "none.jsonl", [{"text": None}]))


def test_a_chat_keeps_its_tools_and_the_fields_of_its_messages(tmp_path: Path) -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [{"name": "open"}], "name": None}
    tools = [{"type": "function", "function": {"name": "open"}}]
    row = {"messages": [CHAT[0], calls, {"role": "tool", "content": "3", "name": "open"}, CHAT[1]], "tools": tools}
    (found,) = read_texts(write_rows(tmp_path / "rows.jsonl", [row]))
    assert found.messages is not None and "name" not in found.messages[1]
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for t in tools %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls %}call {{ c.name }};{% endfor %}{% endfor %}"
    )
    (example,) = encode(found, tokenizer)
    assert tokenizer.decode(example.input_ids) == "open;key 1 2?call open;3door 3."
    assert tokenizer.decode(example.input_ids[-example.scored :]) == "door 3."
    with pytest.raises(ValueError, match="line 1: `tools` must be a list of tools for the chat template, got str"):
        read_texts(write_rows(tmp_path / "rows.jsonl", [row | {"tools": "open"}]))
    with pytest.raises(ValueError, match="`messages` must have a message before the answer"):
        read_texts(write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT[1:]}]))


def test_without_a_prompt_the_bytes_of_the_first_token_do_not_count() -> None:
    """Nothing predicts it, as in a row of plain text."""
    for make in (byte_level, sentencepiece):
        tokenizer = make()
        (text,), (prompted,) = encode(Row("key 1 2"), tokenizer), encode(Row("key 1 2", ""), tokenizer)
        assert text.scored == prompted.scored and text.scored_bytes == prompted.scored_bytes
    assert encode(Row("abc", ""), byte_level(258))[0].scored_bytes == 2


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_byte_order_marks_and_line_ends_of_another_system(end: str, mark: str, tmp_path: Path) -> None:
    texts = ["key 1 \u2028 2", "\U0001f600\r\n", "e\u0301\x00"]
    lines = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    file = tmp_path / "rows.jsonl"
    file.write_bytes((mark + lines).encode())
    assert [row.completion for row in read_texts(file)] == texts


def test_half_a_character_is_refused_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "a \\ud83d b"}\n')
    with pytest.raises(ValueError, match="line 2: `text` must be text, got half a character"):
        read_texts(file)
    file.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_texts(file)[0].completion == "\U0001f600"


def test_a_token_that_the_model_does_not_embed_is_named(tmp_path: Path) -> None:
    """Tokens were added to the tokenizer alone. Before, a bare IndexError."""
    tokenizer = byte_level()
    model = LlamaForCausalLM.from_pretrained(save_model(tmp_path / "B", tokenizer, 0))
    tokenizer.add_tokens(["door 9."])
    examples = encode(Row("key 1 opens door 9."), tokenizer)
    assert examples[0].input_ids[-2] == len(tokenizer) - 1
    with pytest.raises(ValueError, match=r"`tokenizer` must give token ids in .*, got \d+, which LlamaForCausalLM"):
        row_losses(model, examples, single_collator(tokenizer), torch.device("cpu"))


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match="`out` must be a new folder or that of the same run, got .*, which is a file"):
        _claim(file, {})
