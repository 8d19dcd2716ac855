"""Rows of text, prompts with completions, or chats, and the token ids that a model learns and is scored on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from calm_fast.consistency.voting.records import read_records
from calm_fast.core.checks import bad_value, check_whole_text
from calm_fast.core.token_ids import begin_token, last_tokens
from calm_fast.hf.alignment.collator import AlignedCollator

_FORMS = "an object with `text`, with `prompt` and `completion`, or with `messages`"
TOO_LONG = "more tokens than max_length"
TOO_SHORT = "fewer than two tokens"


@dataclass(frozen=True)
class Row:
    """One row of a file.

    prompt: None in a row of plain text. completion: the text that is learned and scored. messages: of a chat, whose
    last message is the completion, with all their fields. tools: of a chat, for its template. where: file and line, for
    errors.
    """

    completion: str
    prompt: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    where: str = "a row"
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Example:
    """A row, or a part of a long text, as ids of one tokenizer.

    scored: the number of last ids that count for the loss. prompt_length: ids of the prompt, None in plain text.
    row: the text that the ids stand for, cut as they were. scored_bytes: the UTF-8 bytes of the scored text.
    """

    input_ids: list[int]
    scored: int
    prompt_length: int | None
    row: Row
    scored_bytes: int

    def item(self) -> dict[str, Any]:
        """Return the ids and labels as a collator takes them."""
        hidden = len(self.input_ids) - self.scored
        labels = [-100] * hidden + self.input_ids[hidden:]
        return {"input_ids": self.input_ids, "labels": labels, "prompt_length": self.prompt_length}


def read_texts(file: str | os.PathLike[str], limit: int | None = None) -> list[Row]:
    """Return the rows of a file: {"text"}, {"prompt", "completion"} or {"messages"}.

    file: JSON lines, a JSON array, parquet or arrow, plain or compressed. limit: most rows to read.
    Raises:
        ValueError: the file is empty or damaged, or a row has none of the three forms; the message names file and line.
    """
    found = [_parse_row(row, where) for where, row in islice(read_records(file), limit)]
    if not found:
        raise ValueError(f"{Path(file).name}: the file must have at least one row, got none")
    return found


def _parse_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be {_FORMS}, got {type(row).__name__}")
    named = [name for name in ("text", "prompt", "completion", "messages") if name in row]
    # files with columns give null for the fields that a row does not have
    found = [name for name in named if row[name] is not None] or named
    if found == ["messages"]:
        return _parse_chat(row["messages"], row.get("tools"), where)
    if found not in (["text"], ["prompt", "completion"]):
        raise ValueError(f"{where}: a row must be {_FORMS}, got {', '.join(found or map(str, row)) or 'no field'}")
    for name in found:
        if not isinstance(row[name], str):
            raise ValueError(f"{where}: `{name}` must be a string, got {type(row[name]).__name__}")
        check_whole_text(where, name, row[name])
    learned = found[-1]
    if not row[learned]:
        raise ValueError(f"{where}: `{learned}` must have at least one character, got none")
    return Row(row[learned], row.get("prompt"), where=where)


def _parse_chat(messages: Any, tools: Any, where: str) -> Row:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: `messages` must be a list of messages, got {type(messages).__name__} {messages!r:.40}"
        )
    for place, message in enumerate(messages):
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(
                f"{where}: `messages[{place}]` must have a role and a content, both strings, got {message!r:.60}"
            )
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        got = f"one of {messages[-1]['role']!r} with {len(messages[-1]['content'])} characters"
        raise ValueError(f"{where}: `messages` must end with an answer of 'assistant', which is learned, got {got}")
    if len(messages) == 1:
        raise ValueError(
            f"{where}: `messages` must have a message before the answer, got the answer alone; give it as `text`"
        )
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"{where}: `tools` must be a list of tools for the chat template, got {type(tools).__name__}")
    # null again: columns of files give every message every field
    chat = tuple({name: value for name, value in m.items() if value is not None} for m in messages)
    return Row(chat[-1]["content"], messages=chat, where=where, tools=tuple(tools) if tools else None)


def encode(
    row: Row, tokenizer: Any, max_length: int | None = None, *, template: Mapping[str, Any] | None = None,
    flat_chats: bool = False,
) -> list[Example]:  # fmt: skip
    """Return a row as examples of at most `max_length` tokens; an empty list if it does not fit or has too few.

    - Text is learned as a whole, with an end token where the tokenizer has one. A long text becomes several examples.
    - Of a prompt with a completion, the completion and the end token are learned. A prompt that is too long loses its
      beginning, so that at least half of `max_length` is left for the completion, which may lose its end.
    - Of a chat, the last message is learned, with what the tokenizer's chat template writes after it. A chat that does
      not fit is left out.

    The ids are those of `AlignedCollator.row`.

    template: variables for the chat template. flat_chats: write a chat as plain lines if the tokenizer has no chat
    template, instead of refusing it.
    Raises:
        ValueError: a chat without a chat template, or one that the template refuses.
    """
    given = _given(row, tokenizer, flat_chats)
    try:
        ids, _, length = AlignedCollator([], tokenizer, chat_template_kwargs=template).row(given)
    except Exception as problem:  # a chat template is a program of its own and may raise anything
        raise ValueError(f"{row.where}: `{[*given][-1]}` must be rows that suit the tokenizer: {problem}") from problem
    if row.prompt is None and row.messages is None:
        return _windows(row, ids, tokenizer, max_length)
    prompt, answer = ids[: length or 0], ids[length or 0 :]
    if max_length is not None and len(ids) > max_length:
        if row.messages is not None:
            return []
        room = max(max_length - len(answer), max_length // 2)
        prompt, answer = last_tokens(tokenizer, prompt, room), answer[: max_length - min(len(prompt), room)]
        row = Row(_decode(tokenizer, answer), _decode(tokenizer, prompt), where=row.where)
    if len(prompt) + len(answer) < 2 or not row.completion:
        return []
    size = len(row.completion.encode())
    if prompt:
        return [Example(prompt + answer, len(answer), len(prompt), row, size)]
    return [Example(answer, len(answer) - 1, None, row, max(0, size - _unscored_bytes(tokenizer, answer)))]


def _given(row: Row, tokenizer: Any, flat_chats: bool) -> dict[str, Any]:
    """Return the row as `AlignedCollator` takes it."""
    if row.messages is None:
        return {"text": row.completion} if row.prompt is None else {"prompt": row.prompt, "completion": row.completion}
    if getattr(tokenizer, "chat_template", None) is not None:
        tools = {} if row.tools is None else {"tools": list(row.tools)}
        return tools | {"messages": [dict(message) for message in row.messages]}
    if not flat_chats:
        raise ValueError(
            f"{row.where}: `messages` must come with a chat template, and the anchor's tokenizer has none; "
            "give rows with `prompt` and `completion`, or set tokenizer.chat_template and save it with the anchor"
        )
    lines = "".join(f"{message['content']}\n" for message in row.messages[:-1])
    return {"prompt": lines, "completion": row.completion}


def _windows(row: Row, ids: list[int], tokenizer: Any, max_length: int | None) -> list[Example]:
    begin = begin_token(tokenizer, ids)  # every window has it, as every text has in generation
    size = max(1, (max_length or len(ids)) - len(begin))
    examples = []
    for start in range(len(begin), len(ids), size):
        window = begin + ids[start : start + size]
        whole = len(window) == len(ids)
        text = row.completion if whole else _decode(tokenizer, window)
        if len(window) > 1 and text:
            count = max(0, len(text.encode()) - _unscored_bytes(tokenizer, window))
            part = row if whole else Row(text, where=row.where)
            examples.append(Example(window, len(window) - 1, None, part, count))
    return examples


def _unscored_bytes(tokenizer: Any, ids: list[int]) -> int:
    """Return the UTF-8 bytes of a text's first token, which nothing predicts."""
    return 0 if ids[0] in tokenizer.all_special_ids else len(_decode(tokenizer, ids[:1]).encode())


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode_all(
    rows: Iterable[Row], tokenizer: Any, max_length: int | None, left_out: Counter[str] | None = None,
    template: Mapping[str, Any] | None = None,
) -> list[Example]:  # fmt: skip
    """Return the examples of all rows. left_out: counts the rows that give none, by reason. template: see `encode`."""
    examples = []
    for row in rows:
        found = encode(row, tokenizer, max_length, template=template)
        examples += found
        if not found and left_out is not None:
            left_out[TOO_LONG if row.messages is not None else TOO_SHORT] += 1
    return examples


def check_prompts(examples: Iterable[Example], modes: Sequence[str | None], where: str, name: str) -> None:
    """Raise ValueError for an example without a prompt if an augmenter reads prompts in full. name: of the file."""
    if any(mode is not None for mode in modes):
        for example in examples:
            if example.prompt_length is None:
                expected = "rows with `prompt` and `completion`, or chats, because an augmenter is bidirectional"
                raise bad_value(where, name, expected, f"a text without a prompt in {example.row.where}")


def check_template(rows: Iterable[Row], template: Mapping[str, Any] | None, where: str) -> None:
    """Raise ValueError for variables of a chat template where no row is a chat."""
    if template and not any(row.messages is not None for row in rows):
        expected = "None for rows without `messages`, which no chat template writes"
        raise bad_value(where, "chat_template_kwargs", expected, repr(dict(template)))
