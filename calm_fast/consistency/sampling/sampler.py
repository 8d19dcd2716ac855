"""Draw samples from prompts that are read once; a sample does not depend on the others of its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache

from calm_fast.consistency.sampling.prefix import PrefixReader, branch
from calm_fast.core.checks import bad_type, bad_value, check_finite_number
from calm_fast.core.token_ids import padding_id

_CALLER = "SelfConsistency"
_RANGES = {
    "max_new_tokens": "a positive integer",
    "temperature": "at least 0",
    "top_k": "a positive integer or None",
    "top_p": "above 0 and at most 1, or None",
}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: from softmax(logits / temperature) cut to top_k and top_p, greedily at temperature 0.

    A sample ends after an end token of the model, after one of the strings `stop`, or after max_new_tokens.
    """

    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, expected in _RANGES.items():
            value = getattr(self, name)
            if value is None and name.startswith("top"):
                continue
            check_finite_number(_CALLER, name, value)
            whole = name in ("max_new_tokens", "top_k")
            right = {"temperature": value >= 0, "top_p": 0 < value <= 1}.get(name, value >= 1)
            if not right or (whole and not isinstance(value, int)):
                raise bad_value(_CALLER, name, expected, repr(value))
        # a string is a sequence of strings too, and every letter of it would end a sample
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise bad_type(_CALLER, "stop", "a sequence of strings, none of them empty", self.stop)
        object.__setattr__(self, "stop", tuple(self.stop))


@dataclass(frozen=True)
class Sample:
    """One continuation of a prompt.

    tokens: ids, the end token included. logprob: log-probability of the tokens under the model at temperature 1,
    without cuts. finished: False if it was cut at max_new_tokens.
    """

    tokens: list[int]
    logprob: float
    finished: bool


def uniforms(seed: int, prompt: Sequence[int], sample: int, count: int) -> torch.Tensor:
    """Return the numbers in [0, 1) that choose the tokens of sample number `sample` of a prompt, (count,) float64."""
    text = f"{seed}/{sample}/" + " ".join(map(str, prompt))
    digest = hashlib.sha256(text.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class OwnSettings(GenerationConfig):
    """Settings of generate to which the model's own add nothing.

    generate fills what a given config leaves open from `model.generation_config` (min_p, suppress_tokens,
    forced_eos_token_id and so on), which would change the tokens that `_Draw` sees and their log-probabilities.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Take everything but the model's settings, which generate gives with `allow_custom_entries`."""
        if allow_custom_entries:
            return {}
        found: dict[str, Any] = super().update(defaults_only, allow_custom_entries, **kwargs)
        return found


class _Draw(LogitsProcessor):
    """Chooses every row's next token by the row's own uniform number, and keeps the token's log-probability."""

    def __init__(self, settings: Sampling, numbers: torch.Tensor, prompt_length: int) -> None:
        self.numbers, self.prompt_length = numbers, prompt_length
        self.temperature = settings.temperature
        self.warpers = LogitsProcessorList()
        if settings.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k is not None:
                self.warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p is not None and settings.top_p < 1:
                self.warpers.append(TopPLogitsWarper(settings.top_p))
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.temperature == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            cumulated = self.warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
            total = cumulated[:, -1:]
            number = self.numbers[:, input_ids.shape[1] - self.prompt_length, None].to(scores.device) * total
            # strictly below the total, so that the first token to exceed it has a positive probability
            number = torch.minimum(number, torch.nextafter(total, torch.zeros_like(total)))
            token = torch.searchsorted(cumulated, number, right=True)
        self.logprobs.append((scores.gather(1, token) - scores.logsumexp(-1, keepdim=True))[:, 0].double())
        return cast(torch.FloatTensor, torch.full_like(scores, float("-inf")).scatter(1, token, 0.0))


class RowEnds(StoppingCriteria):
    """Records the length of each row up to its end token or stop string; -1 while the row continues."""

    def __init__(self, ends: Sequence[int], stop: Any, rows: int, prompt_length: int, device: torch.device) -> None:
        self.ends = torch.tensor(list(ends), dtype=torch.int64, device=device)
        self.stop, self.prompt_length = stop, prompt_length
        self.lengths = torch.full((rows,), -1, dtype=torch.int64, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done = torch.isin(input_ids[:, -1], self.ends)
        length = input_ids.shape[1] - self.prompt_length
        if self.stop is not None:
            # of the sample alone: "\n\n" after a prompt that ends with "\n" would end every sample at once
            done |= self.stop(input_ids[:, self.prompt_length :], scores).to(done.device)
        self.lengths = torch.where(done & (self.lengths < 0), length, self.lengths)
        return cast(torch.BoolTensor, self.lengths >= 0)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the model's end tokens, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = getattr(tokenizer, "eos_token_id", None) if ends is None else ends
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


class PromptBatch:
    """Left-padded prompts, read once, from which any number of samples can be drawn.

    The cache here holds all tokens of a prompt but the last; `sample` continues copies of it, each of which reads the
    last token. If the family's cache cannot be copied (`reader.shares`), every sample reads its prompt again.
    """

    def __init__(self, reader: PrefixReader, tokenizer: Any, prompts: Sequence[list[int]], settings: Sampling) -> None:
        self.reader, self.tokenizer, self.prompts, self.settings = reader, tokenizer, list(prompts), settings
        self.ends = end_tokens(reader.model, tokenizer)
        self.pad = padding_id(tokenizer, reader.model, self.ends)
        longest = max(map(len, self.prompts))
        device = reader.model.device
        padded = [[self.pad] * (longest - len(p)) + p for p in self.prompts]
        self.ids = torch.tensor(padded, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(p) for p in self.prompts], device=device)
        self.mask = (torch.arange(longest, device=device)[None] >= longest - lengths[:, None]).long()
        self.cache: Cache | None = None
        if reader.shares and longest > 1:
            self.cache = reader.new_cache()
            mask = None if bool(self.mask.all()) else self.mask[:, :-1]
            reader(self.ids[:, :-1], mask, self.cache, 0, keep=1, prompt_length=longest)
            if not reader.check_filled(self.cache, longest - 1):
                self.cache = None

    def sample(self, rows: Sequence[int], numbers: Sequence[int], seed: int) -> list[Sample]:
        """Draw sample number numbers[i] of prompt rows[i] for every i, in one batch."""
        length = self.ids.shape[1]
        index = torch.tensor(list(rows), device=self.ids.device)
        count = self.settings.max_new_tokens
        chosen = torch.stack([uniforms(seed, self.prompts[q], j, count) for q, j in zip(rows, numbers, strict=True)])
        draw = _Draw(self.settings, chosen, length)
        stop = StopStringCriteria(self.tokenizer, list(self.settings.stop)) if self.settings.stop else None
        ends = RowEnds(self.ends, stop, len(rows), length, self.ids.device)
        sequences = self.generate(index, draw, ends)
        tokens, found = sequences[:, length:].tolist(), ends.lengths.tolist()
        logprobs = torch.stack(draw.logprobs, dim=1).cpu()
        samples = []
        for i, end in enumerate(found):
            stop_at = len(tokens[i]) if end < 0 else end
            samples.append(Sample(tokens[i][:stop_at], float(logprobs[i, :stop_at].sum()), end >= 0))
        return samples

    def generate(
        self, rows: torch.Tensor, processor: LogitsProcessor, stopping: StoppingCriteria | None = None
    ) -> torch.Tensor:
        """Continue prompts rows[i], (B,) int64, with the tokens that `processor` chooses; return prompts and tokens."""
        model, rows = self.reader.model, rows.to(self.ids.device)
        more: dict[str, Any] = {}
        if self.reader.signature is not None:
            more["attention_mask"] = self.mask[rows]
            if self.cache is not None:
                more[self.reader.signature.generated] = branch(self.cache, rows)
        return cast(
            torch.Tensor,
            cast(Any, model).generate(
                self.ids[rows],
                generation_config=self._config(),
                logits_processor=LogitsProcessorList([processor]),
                stopping_criteria=StoppingCriteriaList([] if stopping is None else [stopping]),
                **more,
            ),
        )

    def _config(self) -> OwnSettings:
        """Return a greedy configuration: `_Draw` chooses the tokens, and the model's own settings do not count."""
        return OwnSettings(
            do_sample=False, num_beams=1, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0,
            no_repeat_ngram_size=0, max_new_tokens=self.settings.max_new_tokens, pad_token_id=self.pad,
            eos_token_id=self.ends or None, num_return_sequences=1, return_dict_in_generate=False,
            use_cache=self.reader.signature is not None,  # RWKV's own state gives other results than recomputing
        )  # fmt: skip
