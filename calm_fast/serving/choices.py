"""The samples of one request, drawn in one batch on the thread that runs the model."""

from __future__ import annotations

import functools
import secrets
import threading
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from calm_fast.consistency.sampling.sampler import RowEnds
from calm_fast.serving.asked import Asked


@dataclass(frozen=True)
class Token:
    """A token of a sample: its text, its log-probability at temperature 1, and the likeliest tokens in its place."""

    text: str
    logprob: float
    likeliest: list[tuple[str, float]]


def utf8(text: str) -> list[int] | None:
    """Return the bytes of a token's text, None if the token is a part of a character, whose bytes the text lacks."""
    return None if "\ufffd" in text else list(text.encode())


def by_text(likeliest: list[tuple[str, float]]) -> dict[str, float]:
    """Return text -> log-probability. Of tokens with one text (parts of characters) the likeliest one counts."""
    return dict(reversed(likeliest))


@dataclass(frozen=True)
class Written:
    """A sample. tokens: how many, the end token included. finished: False if it was cut at the most new tokens."""

    text: str
    tokens: int
    finished: bool
    logprobs: list[Token] | None


class Stopped(StoppingCriteria):
    """Ends all rows once `event` is set: the client has gone."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        ended = torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
        return cast(torch.BoolTensor, ended)


def begin(seed: int | None) -> None:
    """Seed the random numbers of a request. Runs on the model's thread, so that no other request draws from them."""
    torch.manual_seed(secrets.randbits(63) if seed is None else seed)


def write(model: Any, tokenizer: Any, inputs: Any, config: Any, asked: Asked, gone: threading.Event) -> list[Written]:
    """Draw asked.n samples of one prompt. Returns [] if the client has gone."""
    if gone.is_set():
        return []
    begin(asked.seed)
    config.return_dict_in_generate, config.output_logits = True, asked.logprobs is not None
    length = inputs["input_ids"].shape[1]
    stop = StopStringCriteria(tokenizer, list(asked.stop)) if asked.stop else None
    ends = RowEnds(config.eos_token_id or [], stop, asked.n, length, model.device)
    made = model.generate(
        **inputs,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([ends, Stopped(gone)]),
    )
    if gone.is_set():
        return []
    found = []
    for row, end in enumerate(ends.lengths.tolist()):
        ids = made.sequences[row, length:].tolist()
        ids = ids if end < 0 else ids[:end]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        for word in asked.stop:
            text = text.partition(word)[0]
        told = None if asked.logprobs is None else _logprobs(made.logits, row, ids, asked.logprobs, tokenizer)
        found.append(Written(text, len(ids), end >= 0, told))
    return found


def _logprobs(logits: Any, row: int, ids: list[int], count: int, tokenizer: Any) -> list[Token]:
    text_of = functools.lru_cache(maxsize=None)(TokenTexts(tokenizer))
    told = []
    for token, step in zip(ids, logits, strict=False):  # later steps are of longer samples
        logprobs = step[row].float().log_softmax(-1)
        top = logprobs.topk(min(count, len(logprobs)))
        likeliest = [(text_of(i), p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        told.append(Token(text_of(token), float(logprobs[token]), likeliest))
    return told


class TokenTexts:
    """The text of a token inside a text: alone, many tokenizers drop the space before a word."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer.encode("a", add_special_tokens=False)
        self.begin = tokenizer.decode(self.before)

    def __call__(self, token: int) -> str:
        text = str(self.tokenizer.decode([*self.before, token]))
        return text[len(self.begin) :] if text.startswith(self.begin) else str(self.tokenizer.decode([token]))
