"""Endpoint: asks a server of the OpenAI protocol for samples, and gets as many as it asked for or an error."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from calm_fast.consistency.sampling.prompt import Prompt, PromptForm, prompt_form
from calm_fast.consistency.sampling.sampler import Sampling
from calm_fast.core.checks import bad_type, bad_value, check_finite_number

_WHERE = "Endpoint"
_CALLER = "SelfConsistency"
_LONGEST_WAIT = 8.0  # seconds between two tries after a malformed reply


@dataclass(frozen=True)
class Drawn:
    """A sample. logprob: mean log-probability of its tokens as the server tells it, None if it was not asked for."""

    text: str
    logprob: float | None


class Endpoint:
    """A model behind the OpenAI protocol, for `SelfConsistency(Endpoint(url, name))`.

    The form of the prompt decides what is called: a chat (the default) `/chat/completions`, a text `/completions`. The
    n samples of a round are asked for in one request. If the server returns fewer, as one that does not know `n` does,
    the missing ones are asked for one by one, with seeds of their own. A reply without samples, with more than asked
    for, or without the log-probabilities that the vote needs, is tried again, and then an error.

    Args:
        url: base URL, up to and including /v1. model: the name that the server knows it by.
        api_key: default, the environment variable OPENAI_API_KEY, or none.
        parallel: questions that are asked at the same time. retries: further tries after a connection that fails, a
            timeout, 408, 409, 429 or 5xx (the `openai` client waits in between, as long as the server says), and after
            a malformed reply. timeout: seconds for one request. seeded: send a seed with each request, made from the
            seed of the run, the question and the number of the sample; False for servers that refuse `seed`.
        extra: further fields of every request.
    Raises:
        ImportError: the package openai is missing. TypeError, ValueError: an argument is wrong.
    """

    chat_template = "the server's"  # for prompt_form, which asks a tokenizer whether it has one

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        parallel: int = 8,
        retries: int = 5,
        timeout: float = 600.0,
        seeded: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("url", url), ("model", model)):
            if not isinstance(value, str) or not value:
                raise bad_type(_WHERE, name, "a string that is not empty", value)
        if not url.startswith(("http://", "https://")):
            raise bad_value(_WHERE, "url", "a URL like http://127.0.0.1:8000/v1", repr(url))
        for name, number, least in (("parallel", parallel, 1), ("retries", retries, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise bad_value(_WHERE, name, f"an integer of at least {least}", repr(number))
        check_finite_number(_WHERE, "timeout", timeout)
        if timeout <= 0:
            raise bad_value(_WHERE, "timeout", "above 0", repr(timeout))
        try:
            import openai
        except ImportError as problem:
            raise ImportError(f"{_WHERE}: needs the package openai; pip install 'calm-fast[endpoint]'") from problem
        self.url, self.model, self.parallel, self.retries, self.seeded = url, model, parallel, retries, seeded
        self.extra = json.loads(json.dumps(dict(extra or {})))  # as a journal records it
        self._openai = openai
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout)

    def form(self, prompt: Prompt, system: str | None, options: Mapping[str, Any] | None) -> PromptForm:
        """Return the form of the prompts; see the argument `prompt` of SelfConsistency."""
        form = prompt_form(prompt, self, _CALLER, system=system)
        if options and form.text is not None:
            raise bad_value(
                _CALLER, "chat_template_kwargs", "None unless a chat template makes the prompts", repr(dict(options))
            )
        return replace(form, options=json.loads(json.dumps(dict(options or {}))))

    def settings(self) -> dict[str, Any]:
        """Return what the samples depend on, as JSON. The URL is not in it: a server may move."""
        return {"endpoint_model": self.model, "seeded": self.seeded, "extra": self.extra}

    def draw(
        self, form: PromptForm, question: str, numbers: range, seed: int, sampling: Sampling, scored: bool
    ) -> list[Drawn]:
        """Return the samples of a question with these numbers.

        scored: with log-probabilities. Raises RuntimeError if the server did not give the samples after all tries,
        ValueError for a request that it refuses.
        """
        asked = self._prompt(form, question)
        drawn: list[Drawn] = []
        while len(drawn) < len(numbers):
            # all of them at first; one by one once the server has given fewer
            count = len(numbers) if not drawn else 1
            number = numbers[len(drawn)]
            drawn += self._try(asked, count, self._seed(seed, question, number), sampling, scored, question)
        return drawn

    @staticmethod
    def _seed(seed: int, question: str, number: int) -> int:
        digest = hashlib.sha256(f"{seed}/{number}/{question}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    def _prompt(self, form: PromptForm, question: str) -> dict[str, Any]:
        if form.chat is None and form.function is None:
            return {"prompt": str(form.text).replace("{question}", question)}
        system = [] if form.system is None else [{"role": "system", "content": form.system}]
        turns = [*system, {"role": "user", "content": question}]
        made: Any = turns if form.function is None else form.function(question)
        if isinstance(made, str):
            return {"prompt": made}
        if not isinstance(made, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in made):
            raise bad_type(_CALLER, "prompt", "a function that returns a text or the turns of a chat", made)
        return {"messages": [dict(turn) for turn in made], "options": dict(form.options)}

    def _try(
        self, asked: dict[str, Any], count: int, seed: int, sampling: Sampling, scored: bool, question: str
    ) -> list[Drawn]:
        wrong = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(_LONGEST_WAIT, 0.5 * 2 ** (attempt - 1)))
            try:
                return self._read(self._send(asked, count, seed, sampling, scored), count, "messages" in asked, scored)
            except _Malformed as problem:
                wrong = str(problem)
            except self._openai.APIResponseValidationError as problem:
                wrong = f"a reply that is no JSON of the protocol ({problem})"
            except json.JSONDecodeError as problem:
                wrong = f"a reply that is no JSON ({problem})"
            except self._openai.APIStatusError as problem:
                if problem.status_code in (408, 409, 429) or problem.status_code >= 500:
                    raise self._gave_up(question, f"status {problem.status_code}: {_short(problem)}") from problem
                got = f"status {problem.status_code} for {question[:60]!r}: {_short(problem)}"
                raise bad_value(_CALLER, "model", f"an endpoint at {self.url} that takes the request", got) from problem
            except self._openai.APIConnectionError as problem:  # a timeout is one of them
                raise self._gave_up(question, f"{type(problem).__name__}: {_short(problem)}") from problem
        raise self._gave_up(question, wrong)

    def _gave_up(self, question: str, wrong: str) -> RuntimeError:
        return RuntimeError(
            f"{_CALLER}: the endpoint {self.url} must give the samples of every question, got {wrong}, after "
            f"{self.retries + 1} tries, for {question[:60]!r}; finished questions are in `out`, from which the next "
            "call goes on"
        )

    def _send(self, asked: dict[str, Any], count: int, seed: int, sampling: Sampling, scored: bool) -> Any:
        chat = "messages" in asked
        fields: dict[str, Any] = {"model": self.model, "temperature": sampling.temperature}
        extra = dict(self.extra)
        if count > 1:
            fields["n"] = count
        if self.seeded:
            fields["seed"] = seed
        if sampling.top_p is not None:
            fields["top_p"] = sampling.top_p
        if sampling.top_k is not None:
            extra["top_k"] = sampling.top_k  # of vLLM and SGLang; a server that does not know it should say so
        if sampling.stop:
            fields["stop"] = list(sampling.stop)
        if scored:
            fields["logprobs"] = True if chat else 1
        fields["max_tokens"] = sampling.max_new_tokens
        if not chat:
            return self._client.completions.create(prompt=asked["prompt"], extra_body=extra, **fields)
        if asked["options"]:
            extra["chat_template_kwargs"] = asked["options"]
        return self._client.chat.completions.create(messages=asked["messages"], extra_body=extra, **fields)

    @staticmethod
    def _read(reply: Any, count: int, chat: bool, scored: bool) -> list[Drawn]:
        """Return the samples of a reply; raises _Malformed for one that lacks a text or a number asked for."""
        content = reply.model_dump(warnings=False) if hasattr(reply, "model_dump") else reply
        choices = content.get("choices") if isinstance(content, dict) else None
        if not isinstance(choices, list) or not 1 <= len(choices) <= count:
            got = f"{len(choices)} choices" if isinstance(choices, list) else f"{str(content)[:80]!r}"
            raise _Malformed(f"{got} where {count} were asked for")
        return [_drawn(choice, chat, scored) for choice in choices]


class _Malformed(Exception):
    """A reply that does not hold what the protocol says."""


def _short(problem: Any) -> str:
    return " ".join(str(problem).split())[:300]


def _drawn(choice: Any, chat: bool, scored: bool) -> Drawn:
    if not isinstance(choice, dict):
        raise _Malformed(f"a choice that is {type(choice).__name__}")
    holder = (choice.get("message") or {}) if chat else choice
    text = holder.get("content" if chat else "text") if isinstance(holder, dict) else None
    if text is None and chat and choice.get("finish_reason") == "length":
        text = ""  # cut while it was still reasoning
    if not isinstance(text, str):
        raise _Malformed(f"a choice without a text (finish_reason {choice.get('finish_reason')!r})")
    return Drawn(text, _mean_logprob(choice.get("logprobs"), chat) if scored else None)


def _mean_logprob(told: Any, chat: bool) -> float:
    told = told if isinstance(told, dict) else {}
    numbers = told.get("content") if chat else told.get("token_logprobs")
    if not isinstance(numbers, list) or not numbers:
        raise _Malformed("a choice without log-probabilities; rule='count' or a ranker needs none")
    values: list[Any] = numbers
    if chat:
        values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in numbers]
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and not math.isnan(x) for x in values):
        raise _Malformed("log-probabilities that are no numbers")
    return math.fsum(values) / len(values)
