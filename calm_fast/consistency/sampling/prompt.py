"""The prompt of a question, in one place for training, sampling and scoring: a model is asked as it was taught."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calm_fast.core.chat_template import ARGUMENTS
from calm_fast.core.checks import bad_type, bad_value
from calm_fast.core.prompt_record import PROMPT_FILE, get_prompt_record, read_prompt_record
from calm_fast.core.token_ids import prompt_ids

PLAIN = "{question}\n"
Prompt = str | os.PathLike[str] | Callable[[str], Any] | None
# variables that transformers gives every template
_KNOWN = ("tools", "documents")


@dataclass(frozen=True)
class PromptForm:
    """How a question becomes the ids of a prompt.

    chat: the tokenizer's chat template, with the question as the user's turn and the prompt of the assistant's turn.
    text: a string with {question} in it. function: question -> text, token ids or the turns of a chat. Exactly one of
    the three is given. system: a system turn before the user's. options: other variables of the chat template, such as
    enable_thinking.
    """

    chat: str | None = None
    text: str | None = None
    function: Callable[[str], Any] | None = None
    system: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="SelfConsistency", compare=False)

    def ids(self, tokenizer: Any, question: str) -> list[int]:
        """Return the prompt's ids. A beginning-of-sequence token occurs once, and no end token follows the prompt."""
        if self.chat is not None:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            return self._chat_ids(tokenizer, [*system, {"role": "user", "content": question}])
        made = self.function(question) if self.function else str(self.text).replace("{question}", question)
        if not isinstance(made, str) and _is_chat(made):
            return self._chat_ids(tokenizer, made)
        if self.options:
            got = f"{dict(self.options)!r}, and `prompt` returned {type(made).__name__}"
            raise bad_value(self.where, "chat_template_kwargs", "None unless a chat template makes the prompts", got)
        return prompt_ids(tokenizer, made) if isinstance(made, str) else _own_ids(made, self.where)

    def _chat_ids(self, tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of the filled chat template, which writes the special tokens itself."""
        import jinja2  # which transformers needs for templates

        try:
            text = tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=True, **self.options
            )
        except jinja2.TemplateError as problem:
            got = f"one that fails: {problem}"
            roles = ", ".join(str(turn.get("role")) for turn in turns)
            raise bad_value(
                self.where, "tokenizer", f"one whose chat template takes turns of {roles}", got
            ) from problem
        system = self.system or ""
        if system.strip() not in text:
            got = "one that leaves it out; write it into the user's turn by a function as `prompt`"
            raise bad_value(self.where, "tokenizer", "one whose chat template writes the system turn", got)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def record(self) -> dict[str, Any]:
        """Return the form as JSON; of a function the name."""
        function = self.function
        name = None if function is None else f"{function.__module__}.{getattr(function, '__qualname__', function)}"
        return {"chat_template": self.chat, "text": self.text, "function": name, **self.extras()}

    def extras(self) -> dict[str, Any]:
        """Return the part of the record that most forms do not have."""
        system = {} if self.system is None else {"system": self.system}
        return {**system, "chat_template_kwargs": dict(self.options)} if self.options else system


def prompt_form(
    prompt: Prompt,
    tokenizer: Any,
    where: str,
    *,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptForm:
    """Return the form that `prompt` names.

    prompt: None = the tokenizer's chat template if it has one, else the question and a newline. "chat" or "plain" = one
    of the two. A string with {question} in it, or a function, makes the prompt. A pathlib.Path = the folder of an
    adapter: the form it was trained with. where: the function that errors name. system: a system turn before the
    question. chat_template_kwargs: variables for the chat template, as JSON.

    Raises:
        TypeError, ValueError: it is none of these, the tokenizer has no or another chat template, or a form without a
            chat template comes with a system turn or variables.
    """
    options = _checked_options(chat_template_kwargs, where)
    if system is not None and not isinstance(system, str):
        raise bad_type(where, "system", "a string or None", system)
    form = _named_form(prompt, tokenizer, where)
    if isinstance(prompt, os.PathLike) or form.text is not None or (form.function is not None and system is not None):
        for name, value in (("system", system), ("chat_template_kwargs", options or None)):
            if value is not None:
                raise bad_value(where, name, "None unless a chat template makes the prompts", repr(value))
    if isinstance(prompt, os.PathLike):
        return form
    read = None if form.chat is None else {*_KNOWN, *re.findall(r"\w+", form.chat)}
    if unknown := [name for name in options if read is not None and name not in read]:
        warnings.warn(
            f"{where}: `chat_template_kwargs` has {', '.join(unknown)}, which the chat template does not read",
            stacklevel=4,
        )
    return PromptForm(form.chat, form.text, form.function, system, options, where)


def _named_form(prompt: Prompt, tokenizer: Any, where: str) -> PromptForm:
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
        return PromptForm(text=record["text"], where=where)
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
    return PromptForm(
        chat=form.chat, system=record.get("system"), options=record.get("chat_template_kwargs") or {}, where=where
    )


def chosen_form(
    prompt: Prompt,
    model: Any,
    tokenizer: Any,
    where: str,
    *,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptForm:
    """Return the form of the prompts: the one asked for, or the one that the model was trained with."""
    trained = get_prompt_record(model)
    if prompt is None and trained is not None and system is None and chat_template_kwargs is None:
        return recorded_form(trained, tokenizer, where)
    form = prompt_form(prompt, tokenizer, where, system=system, chat_template_kwargs=chat_template_kwargs)
    if trained is not None and form.record() != trained:
        warnings.warn(
            f"{where}: `prompt` differs from the form that `model` was trained with; leave it out to ask as it was "
            "taught",
            stacklevel=3,
        )
    return form


def _checked_options(options: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Return variables for a chat template as a dict, unless they are others' arguments or no JSON."""
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise bad_type(where, "chat_template_kwargs", "a dict of variables for the chat template, or None", options)
    if taken := [name for name in options if name in ARGUMENTS]:
        raise bad_value(where, "chat_template_kwargs", f"without {', '.join(taken)}, which is set here", repr(options))
    try:
        return dict(json.loads(json.dumps(dict(options))))  # a record of the form holds them
    except (TypeError, ValueError) as problem:
        raise bad_value(where, "chat_template_kwargs", "values that JSON can hold", f"{options!r}: {problem}") from None


def _is_chat(made: Any) -> bool:
    return isinstance(made, (list, tuple)) and bool(made) and all(isinstance(turn, Mapping) for turn in made)


def _own_ids(made: Any, where: str) -> list[int]:
    ids = made.get("input_ids", made) if hasattr(made, "get") else made
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = list(ids) if isinstance(ids, (list, tuple)) else [None]
    if len(ids) == 1 and isinstance(ids[0], (list, tuple)):  # a batch of one text
        ids = list(ids[0])
    if not all(type(token) is int for token in ids):
        expected = "a function that returns a text, the ids of one text, or the turns of a chat"
        raise bad_type(where, "prompt", expected, made)
    return ids
