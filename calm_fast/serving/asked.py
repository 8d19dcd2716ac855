"""What a request asks for: every field takes effect or is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from calm_fast.core.chat_template import ARGUMENTS

# fields that change nothing here, whatever they hold
_WITHOUT_EFFECT = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}
# fields that are refused unless they hold a value that asks for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "echo": (False,),
    "suffix": ("",),
    "service_tier": ("auto", "default"),
}
_MOST_LOGPROBS = 5
_COLDEST = 1e-6  # temperature above 0; logits divided by less may overflow float32
# fields of a message; others change nothing in the prompt, and are refused unless they are empty, as clients send them
# back from an answer
_OF_A_MESSAGE = {"role", "content"}


@dataclass(frozen=True)
class Asked:
    """A checked request.

    n: samples. logprobs: None, or how many of the likeliest tokens are told beside the chosen one. stop: texts that end
    a sample. seed: of its random numbers, None = fresh ones. most: most new tokens, None = not said.
    """

    n: int = 1
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    most: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False


# the request that the current task answers
ASKED: ContextVar[Asked] = ContextVar("asked")


def refuse(name: str, expected: str, got: Any) -> HTTPException:
    """Return the answer to a request whose field `name` is wrong."""
    return HTTPException(status_code=400, detail=f"`{name}` must be {expected}, got {got!r}")


def check_request(body: dict[str, Any], chat: bool) -> Asked:
    """Check the fields of a request and leave in `body` those that transformers' handler has to see.

    Raises HTTPException 400 for a field that is wrong or would not take effect.
    """
    for name in [name for name, value in body.items() if value is None or name in _WITHOUT_EFFECT]:
        del body[name]
    for name in _NEUTRAL.keys() & body.keys():
        value = body.pop(name)
        if value not in _NEUTRAL[name]:
            raise refuse(name, f"left out: this server does not support it (neutral: {_NEUTRAL[name][0]!r})", value)
    asked = _settings(body, chat)
    kept = {"model", "messages", "chat_template_kwargs"} if chat else {"model", "prompt"}
    read = {"n", "seed", "stop", "stream", "temperature", "top_p", "max_tokens", "logprobs", "stream_options"}
    read |= {"max_completion_tokens", "top_logprobs"} if chat else set()
    if unknown := sorted(body.keys() - kept - read):
        raise HTTPException(400, f"`{unknown[0]}` is not a field that this server supports")
    for name in read & body.keys():
        del body[name]
    if asked.stream:
        body["stream"] = True
    if not isinstance(body.get("model", ""), str):
        raise refuse("model", "a string", body["model"])
    if chat:
        _check_chat(body)
    else:
        _check_prompt(body)
    return asked


def _settings(body: dict[str, Any], chat: bool) -> Asked:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise refuse("stop", "a string or a list of strings, none of them empty", stop)
    for text in stop:
        _check_unicode("stop", text)
    limits = [_whole(body, name, 1) for name in ("max_completion_tokens", "max_tokens") if name in body]
    asked = Asked(
        n=_whole(body, "n", 1, 128) or 1,
        logprobs=_logprobs(body, chat),
        stop=tuple(stop),
        seed=_whole(body, "seed", -(2**63), 2**63 - 1),
        most=limits[0] if limits else None,
        temperature=_number(body, "temperature", "from 0 to 2", lambda x: 0 <= x <= 2),
        top_p=_number(body, "top_p", "above 0 and at most 1", lambda x: 0 < x <= 1),
        stream=body.get("stream", False),
    )
    if asked.temperature and asked.temperature < _COLDEST:
        raise refuse("temperature", f"0 or at least {_COLDEST:g}", asked.temperature)
    if not isinstance(asked.stream, bool):
        raise refuse("stream", "true or false", asked.stream)
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise refuse("stream_options", "{'include_usage': ...}; the last chunk always has the usage", options)
    for name, value in (("n", asked.n > 1), ("logprobs", asked.logprobs is not None), ("stop", bool(asked.stop))):
        if asked.stream and value:
            raise HTTPException(400, f"`{name}` is not supported with `stream`: leave one of them out")
    return asked


def _logprobs(body: dict[str, Any], chat: bool) -> int | None:
    if not chat:
        return _whole(body, "logprobs", 0, _MOST_LOGPROBS)
    wanted = body.get("logprobs", False)
    if not isinstance(wanted, bool):
        raise refuse("logprobs", "true or false", wanted)
    top = _whole(body, "top_logprobs", 0, _MOST_LOGPROBS)
    if top is not None and not wanted:
        raise refuse("logprobs", "true with `top_logprobs`", wanted)
    return (top or 0) if wanted else None


def _whole(body: dict[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise refuse(name, f"an integer of at least {low}" + ("" if high is None else f" and at most {high}"), value)
    return value


def _number(body: dict[str, Any], name: str, expected: str, right: Callable[[float], bool]) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not right(value):
        raise refuse(name, f"a number {expected}", value)
    return float(value)


def _check_unicode(name: str, text: str) -> None:
    """Raise HTTPException for half of a surrogate pair, which JSON can hold and a tokenizer cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        got = f"half of a surrogate pair at character {problem.start}"
        raise HTTPException(400, f"`{name}` must be valid Unicode, got {got}") from problem


def _check_prompt(body: dict[str, Any]) -> None:
    if not isinstance(body.get("prompt"), str):
        raise refuse("prompt", "a string", body.get("prompt"))
    _check_unicode("prompt", body["prompt"])


def _check_chat(body: dict[str, Any]) -> None:
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns:
        raise refuse("messages", "a list of at least one message", turns)
    for i, turn in enumerate(turns):
        where = f"messages[{i}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise refuse(where, "an object with a role and content", turn)
        if turn.get("tool_calls") or turn["role"] == "tool":
            raise refuse(where, "without calls of tools, which this server does not support", turn)
        if unknown := sorted(name for name, value in turn.items() if value and name not in _OF_A_MESSAGE):
            raise HTTPException(400, f"`{where}.{unknown[0]}` is not a field that this server supports")
        content = turn.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = isinstance(parts, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        )
        if not text:
            raise refuse(f"{where}.content", "a text, or a list of parts of the type 'text'", content)
        for part in parts or []:
            _check_unicode(f"{where}.content", part["text"])
    options = body.get("chat_template_kwargs", {})
    if not isinstance(options, dict):
        raise refuse("chat_template_kwargs", "an object of variables for the chat template", options)
    if taken := sorted(options.keys() & (ARGUMENTS | {"tools"})):
        expected = "variables of the chat template only"
        raise refuse("chat_template_kwargs", expected, f"{taken[0]}, an argument of the tokenizer's own")
