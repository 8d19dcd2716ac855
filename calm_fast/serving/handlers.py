"""transformers' handlers of chat and text completions for one model; every field of a request is honoured or refused.

transformers' server reads and ignores `n`, `logprobs` and penalties, samples greedily at any temperature where the
model's own generation config says so, cuts to the 50 likeliest tokens, leaves stop strings in the text, and seeds its
random numbers when a request arrives instead of when it is answered. What it does with HTTP, templates, streams and the
model's thread is used as it is.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager

from calm_fast.consistency.sampling.sampler import end_tokens
from calm_fast.core.token_ids import padding_id
from calm_fast.hf.positions import most_positions
from calm_fast.serving.asked import ASKED, check_request
from calm_fast.serving.choices import Written, begin, by_text, utf8, write
from calm_fast.serving.disconnects import GONE

_DEFAULT_MOST = 1024  # new tokens, as transformers' server
_ERROR = re.compile(r'(^|\n)data: \{"error": (".*")\}\n\n$')
_LOGITS_BYTES = 2**31  # most memory of the logits that log-probabilities are read from


class OneModel(ModelManager):
    """The one model of the server, loaded before it starts and never unloaded."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        # not transformers' own, which loads models by name and drops them after a time
        self.model, self.tokenizer, self.force_model = model, tokenizer, name
        self.loaded_models = {}

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "local"}]

    get_gen_models = list_models  # its name in transformers 5.17

    def shutdown(self) -> None:
        return


class _Seeded:
    """The model of a stream: seeds on the model's thread, and has errors that fit between the quotes of JSON."""

    def __init__(self, model: Any, seed: int | None) -> None:
        self._model, self._seed = model, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *, tokenizer: Any = None, **kwargs: Any) -> Any:
        begin(self._seed)  # the tokenizer is for stop strings, which a stream does not have
        try:
            return self._model.generate(**kwargs)
        except (ValueError, TypeError, RuntimeError, LookupError) as problem:
            raise RuntimeError(json.dumps(str(problem))[1:-1]) from problem


async def _as_the_protocol_has_it(chunks: Any) -> AsyncIterator[str]:
    """Pass a stream on, and end it. An error that is a text becomes an object, of which clients show the message."""
    try:
        async for chunk in chunks:
            yield _ERROR.sub(r'\1data: {"error": {"message": \2, "type": "server_error"}}\n\n', chunk)
        yield "data: [DONE]\n\n"
    finally:
        await chunks.aclose()


class _Handler:
    """What both handlers do otherwise than transformers."""

    chat: bool
    model_manager: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Raises HTTPException 400 for one that asks for what this server cannot do."""
        ASKED.set(check_request(body, self.chat))
        if self.chat and not self.model_manager.tokenizer.chat_template:
            raise HTTPException(400, "the model's tokenizer has no chat template: use /v1/completions")
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (ValueError, TypeError, TemplateError) as problem:  # the last one of the model's chat template
            raise HTTPException(400, str(problem)) from problem
        except (RuntimeError, LookupError) as problem:  # torch's own, out of memory too
            raise HTTPException(500, str(problem)) from problem

    def _build_generation_config(self, body: Any, model_generation_config: Any, use_cb: bool = False) -> Any:
        asked, config = ASKED.get(), copy.deepcopy(model_generation_config)
        if asked.temperature is not None:
            config.do_sample = asked.temperature > 0
            config.temperature = asked.temperature or None
        if asked.temperature == 0:
            config.top_p = config.top_k = None
        else:
            config.top_p = config.top_p if asked.top_p is None else asked.top_p
            config.top_k = 0 if config.do_sample and config.top_k is None else config.top_k
        config.num_return_sequences, config.max_length, config.max_new_tokens = asked.n, None, asked.most
        config.pad_token_id = padding_id(self.model_manager.tokenizer, self.model_manager.model)
        config.eos_token_id = end_tokens(self.model_manager.model, self.model_manager.tokenizer)
        config.num_beams = 1
        if asked.n > 1 and not config.do_sample:
            raise HTTPException(400, "`n` must be 1 unless tokens are sampled: set `temperature` above 0")
        return config

    def _fit(self, inputs: Any, config: Any) -> dict[str, Any]:
        """Return the inputs that the model takes, and set the most new tokens. Raises HTTPException for too many."""
        asked, length = ASKED.get(), inputs["input_ids"].shape[-1]
        if not length:
            raise HTTPException(400, "the prompt must have at least one token, got none")
        model = self.model_manager.model
        text, limit = model.config.get_text_config(decoder=True), most_positions(model)
        room = None if limit is None else limit - length
        if room is not None and room < (asked.most or 1):
            got = f"{length} and {asked.most or 1} new ones"
            raise HTTPException(400, f"the tokens of prompt and answer must be at most {limit}, the model's, got {got}")
        if config.max_new_tokens is None:
            config.max_new_tokens = _DEFAULT_MOST if room is None else min(_DEFAULT_MOST, room)
        size = 4 * asked.n * config.max_new_tokens * text.vocab_size
        if asked.logprobs is not None and size > _LOGITS_BYTES:
            got = f"n * max_tokens * vocabulary * 4 = {size}"
            raise HTTPException(400, f"`logprobs` may need at most {_LOGITS_BYTES} bytes of logits, got {got}")
        return {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}

    def _streaming(self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any, gen_config: Any,
                   *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        inputs = self._fit(inputs, gen_config)
        seeded = _Seeded(model, ASKED.get().seed)
        response = super()._streaming(  # type: ignore[misc]
            request_id, seeded, processor, model_id, inputs, gen_config, *args, **kwargs
        )
        response.body_iterator = _as_the_protocol_has_it(response.body_iterator)
        return response

    async def _non_streaming(self, request_id: str, model: Any, processor: Any, model_id: str, inputs: Any,
                             gen_config: Any, gen_manager: Any, *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        inputs = self._fit(inputs, gen_config)
        written = await gen_manager.async_submit(write, model, processor, inputs, gen_config, ASKED.get(), GONE.get())
        length, new = inputs["input_ids"].shape[-1], sum(sample.tokens for sample in written)
        return JSONResponse(
            {
                "id": request_id, "object": "chat.completion" if self.chat else "text_completion",
                "created": int(time.time()), "model": model_id,
                "choices": [self._choice(i, sample) for i, sample in enumerate(written)],
                "usage": {"prompt_tokens": length, "completion_tokens": new, "total_tokens": length + new},
            }
        )  # fmt: skip

    def _choice(self, index: int, sample: Written) -> dict[str, Any]:
        reason = "stop" if sample.finished else "length"
        if self.chat:
            body: dict[str, Any] = {"message": {"role": "assistant", "content": sample.text}}
        else:
            body = {"text": sample.text}
        return {"index": index, "finish_reason": reason, "logprobs": self._told(sample), **body}

    def _told(self, sample: Written) -> dict[str, Any] | None:
        tokens = sample.logprobs
        if tokens is None:
            return None
        if self.chat:
            entries = [
                {"token": token.text, "logprob": token.logprob, "bytes": utf8(token.text),
                 "top_logprobs": [{"token": t, "logprob": p, "bytes": utf8(t)} for t, p in token.likeliest]}
                for token in tokens
            ]  # fmt: skip
            return {"content": entries, "refusal": None}
        starts = [sum(len(token.text) for token in tokens[:i]) for i in range(len(tokens))]
        return {
            "tokens": [token.text for token in tokens], "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [by_text(token.likeliest) for token in tokens], "text_offset": starts,
        }  # fmt: skip


class Chat(_Handler, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    chat = True


class Text(_Handler, CompletionHandler):
    """`/v1/completions`."""

    chat = False
