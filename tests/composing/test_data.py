"""Rows of the three forms become ids and labels; errors name file and line."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from tiny import byte_level, sentencepiece, write_rows

from calm_fast.composing.data import TOO_LONG, TOO_SHORT, Row, encode, encode_all, read_texts

CHAT = [{"role": "user", "content": "key 1 2?"}, {"role": "assistant", "content": "door 3."}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("no object", "a row must be an object with `text`, .* got str"),
        ({"question": "x"}, "got question"),
        ({}, "got no field"),
        ({"text": "x", "prompt": "y", "completion": "z"}, "got text, prompt, completion"),
        ({"prompt": "y"}, "got prompt"),
        ({"text": 3}, "`text` must be a string, got int"),
        ({"text": ""}, "`text` must have at least one character"),
        ({"prompt": "y", "completion": ""}, "`completion` must have at least one character"),
        ({"messages": []}, "`messages` must be a list of messages"),
        ({"messages": [{"role": "user"}]}, r"`messages\[0\]` must have a role and a content"),
        ({"messages": CHAT[:1]}, "`messages` must end with an answer of 'assistant'"),
    ],
)
def test_a_wrong_row_is_refused_by_its_line(row: object, message: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "right"}, row])
    with pytest.raises(ValueError, match=f"rows.jsonl, line 2: .*{message}"):
        read_texts(file)


def test_rows_are_read_from_gzip_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    lines = [json.dumps({"text": "a"}), "", json.dumps({"prompt": "b", "completion": "c", "id": 3})]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    first, second = read_texts(file)
    assert (first.completion, first.prompt, first.where) == ("a", None, "rows.jsonl.gz, line 1")
    assert (second.completion, second.prompt, second.where) == ("c", "b", "rows.jsonl.gz, line 3")
    assert len(read_texts(file, limit=1)) == 1
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="must be complete gzip"):
        read_texts(file)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(make) -> None:
    tokenizer = make()
    (example,) = encode(Row(" opens door 1.", "key 1 0"), tokenizer)
    begins = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert example.input_ids[: len(begins)] == begins and example.input_ids[-1] == tokenizer.eos_token_id
    prompt, answer = example.input_ids[: example.prompt_length], example.input_ids[example.prompt_length :]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "key 1 0" and example.scored == len(answer)
    assert "opens door 1." in tokenizer.decode(answer, skip_special_tokens=True)
    assert example.scored_bytes == len(" opens door 1.")
    item = example.item()
    assert item["labels"] == [-100] * len(prompt) + answer and item["prompt_length"] == len(prompt)


def test_what_is_cut_keeps_the_token_that_begins_every_text() -> None:
    tokenizer = sentencepiece()
    text = "opens door 1. " * 6
    bos, ids = tokenizer.bos_token_id, tokenizer(text)["input_ids"]
    assert ids[0] == bos and len(ids) > 16
    windows = [example.input_ids for example in encode(Row(text), tokenizer, 8)]
    assert all(window[0] == bos and bos not in window[1:] and len(window) <= 8 for window in windows)
    assert [token for window in windows for token in window[1:]] == [*ids[1:], tokenizer.eos_token_id]
    (example,) = encode(Row(" key 1", text), tokenizer, 12)
    assert example.input_ids[0] == bos and len(example.input_ids) == 12
    assert (
        bos not in example.input_ids[1:]
        and example.input_ids[1 : example.prompt_length] == ids[1 - example.prompt_length :]
    )


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_end() -> None:
    tokenizer = byte_level(258)  # one token a byte
    (example,) = encode(Row("0123456789", "abcdefghij"), tokenizer, 10)
    assert tokenizer.decode(example.input_ids) == "fghij01234" and example.scored == example.scored_bytes == 5
    assert (example.row.prompt, example.row.completion) == ("fghij", "01234")
    (example,) = encode(Row("01", "abcdefghij"), tokenizer, 10)
    assert tokenizer.decode(example.input_ids) == "defghij01<eos>" and example.scored == 3


def test_a_long_text_becomes_several_examples_and_no_byte_is_counted_twice() -> None:
    tokenizer = byte_level(258)
    examples = encode(Row("abcdefgh\u00e9j"), tokenizer, 4)
    assert [tokenizer.decode(e.input_ids) for e in examples] == ["abcd", "efgh", "\u00e9j<eos>"]
    assert [e.scored for e in examples] == [3, 3, 3] and [e.prompt_length for e in examples] == [None] * 3
    assert [e.scored_bytes for e in examples[:2]] == [3, 3]  # nothing predicts the first token
    assert examples[0].item()["labels"] == [-100, *examples[0].input_ids[1:]]
    with_beginning = encode(Row("key 1"), sentencepiece())[0]
    assert with_beginning.scored_bytes == len("key 1") and with_beginning.scored == len(with_beginning.input_ids) - 1
    assert encode(Row("a"), byte_level(258), 1) == []


def test_of_a_chat_the_last_message_is_learned_with_the_templates_end() -> None:
    tokenizer = byte_level(chat=True)
    row = Row("door 3.", messages=tuple(CHAT))
    (example,) = encode(row, tokenizer)
    prompt = tokenizer.decode(example.input_ids[: example.prompt_length])
    assert prompt == "<|user|>key 1 2?<eos><|assistant|>"
    assert tokenizer.decode(example.input_ids[-example.scored :]) == "door 3.<eos>"
    assert example.scored_bytes == len("door 3.")
    left_out: Counter[str] = Counter()
    assert encode_all([row, Row("a")], byte_level(258, chat=True), 4, left_out) == encode(Row("a"), tokenizer, 4)
    assert left_out == {TOO_LONG: 1}
    with pytest.raises(ValueError, match="a row: `messages` must come with a chat template"):
        encode(row, byte_level())
    flat = encode(row, byte_level(), flat_chats=True)[0]
    assert byte_level().decode(flat.input_ids) == "key 1 2?\ndoor 3.<eos>"


def test_a_template_that_refuses_a_chat_is_named_with_the_row() -> None:
    tokenizer = byte_level(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="x, line 7: `messages` must be rows that suit .*: roles must alternate"):
        encode(Row("door 3.", messages=tuple(CHAT), where="x, line 7"), tokenizer)


def test_a_text_of_one_token_is_counted_as_left_out() -> None:
    tokenizer = byte_level(258)
    tokenizer.eos_token = None
    left_out: Counter[str] = Counter()
    assert encode_all([Row("a")], tokenizer, 8, left_out) == [] and left_out == {TOO_SHORT: 1}
