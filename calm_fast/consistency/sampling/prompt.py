"""The prompt of a question, in one place for training, sampling and scoring: a model is asked as it was taught."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.core.prompt_record import PROMPT_FILE, read_prompt_record

PLAIN = "{question}\n"
Prompt = str | os.PathLike[str] | Callable[[str], Any] | None


@dataclass(frozen=True)
class PromptForm:
    """How a question becomes the ids of a prompt.

    chat: the tokenizer's chat template, with the question as the user's turn and the prompt of the assistant's turn.
    text: a string with {question} in it. function: question -> text or token ids. Exactly one of the three is given.
    """

    chat: str | None = None
    text: str | None = None
    function: Callable[[str], Any] | None = None

    def ids(self, tokenizer: Any, question: str) -> list[int]:
        """Return the prompt's ids. A beginning-of-sequence token occurs once, and no end token follows the prompt."""
        if self.chat is not None:
            turns = [{"role": "user", "content": question}]
            # the template writes the special tokens
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        made = self.function(question) if self.function else str(self.text).replace("{question}", question)
        if not isinstance(made, str):
            return _own_ids(made)
        ids = list(tokenizer(made)["input_ids"])
        end, begin = getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None)
        if len(ids) > 1 and ids[-1] == end and not made.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # T5's and BART's tokenizers end every text
        if begin is not None and ids[:2] == [begin, begin] and made.startswith(tokenizer.bos_token):
            ids = ids[1:]  # a function that fills the chat template itself has written it already
        return ids

    def record(self) -> dict[str, Any]:
        """Return the form as JSON; of a function the name."""
        function = self.function
        name = None if function is None else f"{function.__module__}.{getattr(function, '__qualname__', function)}"
        return {"chat_template": self.chat, "text": self.text, "function": name}


def prompt_form(prompt: Prompt, tokenizer: Any, where: str) -> PromptForm:
    """Return the form that `prompt` names.

    prompt: None = the tokenizer's chat template if it has one, else the question and a newline. "chat" or "plain" = one
    of the two. A string with {question} in it, or a function, makes the prompt. A pathlib.Path = the folder of an
    adapter: the form it was trained with. where: the function that errors name.

    Raises:
        TypeError, ValueError: it is none of these, or the tokenizer has no or another chat template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # named templates, of which apply_chat_template takes this one
        template = template.get("default")
    if isinstance(prompt, os.PathLike):
        record = read_prompt_record(prompt, where, "prompt")
        if record is None:
            got = f"{Path(prompt)}, which has none; name the form"
            raise bad_value(where, "prompt", f"the folder of an adapter with a {PROMPT_FILE}", got)
        return recorded_form(record, tokenizer, where)
    if prompt == "plain" or (prompt is None and template is None):
        return PromptForm(text=PLAIN)
    if prompt is None or prompt == "chat":
        if template is None:
            got = "'chat', and the tokenizer has no chat template; set tokenizer.chat_template"
            raise bad_value(where, "prompt", "'plain' or a string with {question} in it", got)
        return PromptForm(chat=template)
    if isinstance(prompt, str):
        if "{question}" not in prompt:
            raise ValueError(f"{where}: `prompt` must have {{question}} in it, or be 'chat' or 'plain', got {prompt!r}")
        return PromptForm(text=prompt)
    if not callable(prompt):
        raise bad_type(where, "prompt", "a string, a callable, the path of an adapter or None", prompt)
    return PromptForm(function=prompt)


def recorded_form(record: dict[str, Any], tokenizer: Any, where: str) -> PromptForm:
    """Return the form of a record.

    Raises:
        ValueError: it is a function, of which only the name is known, or the tokenizer's chat template is another one.
    """
    if record.get("text") is not None:
        return PromptForm(text=record["text"])
    if record.get("chat_template") is None:
        got = f"none, and the adapter was trained on prompts of {record.get('function')}"
        raise bad_value(where, "prompt", "the function that made the prompts of the training", got)
    if getattr(tokenizer, "chat_template", None) is None:
        got = "one without; load the tokenizer of the training"
        raise bad_value(where, "tokenizer", "one with the chat template that the model was trained with", got)
    form = prompt_form("chat", tokenizer, where)
    if form.chat != record["chat_template"]:
        got = "one with another; load the tokenizer of the training, or name `prompt`"
        raise bad_value(where, "tokenizer", "one with the chat template that the model was trained with", got)
    return form


def _own_ids(made: Any) -> list[int]:
    ids = made.get("input_ids", made) if hasattr(made, "get") else made
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not all(type(token) is int for token in ids):
        raise bad_type("SelfConsistency", "prompt", "a function that returns a text, or the ids of one text", made)
    return ids
