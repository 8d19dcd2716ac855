"""Which prompts are sampled together: of one length, unless a trial run shows that padding changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from transformers import LogitsProcessor, PreTrainedModel

from calm_fast.consistency.sampling.prefix import PrefixReader
from calm_fast.consistency.sampling.sampler import PromptBatch, Sampling, end_tokens
from calm_fast.core.eval_mode import eval_mode
from calm_fast.hf.causality import aside, usable_ids
from calm_fast.hf.prefixes import attention_of
from calm_fast.hf.trials import close

# odd, so that no family that takes tokens by twos or fours finds them where they were
_PADDING, _PROMPT, _STEPS = 3, 5, 2
# Padding that is read as text moves logits as text does. Rounding alone, in 16 bits, stays far below an eighth of that.
_SHARE = 8
_outcomes: WeakKeyDictionary[PreTrainedModel, dict[str, bool]] = WeakKeyDictionary()

_Item = TypeVar("_Item")
_Pair = tuple[_Item, list[int]]


def prompt_batches(pairs: Iterable[_Pair[_Item]], most: int, pads: Callable[[], bool]) -> Iterator[list[_Pair[_Item]]]:
    """Yield at most `most` items with their prompts at a time, in order, or with prompts of one length each.

    pads: asked when a batch needs padding; False puts the items that are left together by the length of their prompts.
    """
    source = iter(pairs)
    while batch := list(islice(source, most)):
        if len({len(prompt) for _, prompt in batch}) > 1 and not pads():
            break
        yield batch
    of_length: dict[int, list[_Pair[_Item]]] = {}
    for pair in chain(batch, source):
        of_length.setdefault(len(pair[1]), []).append(pair)
    for equal in of_length.values():
        for start in range(0, len(equal), most):
            yield equal[start : start + most]


def leaves_padding_out(reader: PrefixReader, tokenizer: Any) -> bool:
    """Return True if prompts of different lengths can be sampled together: left padding moves no logits of a prompt.

    The model is run as `PromptBatch` runs it: the prompt, then two steps of generate. A prompt beside one that is
    longer by three tokens must have the logits of the prompt alone, up to rounding. Their difference must also be at
    most an eighth of what three tokens of text before the prompt make. So families are found that count padding (the
    decoders of BART and Whisper), or whose own preparation of a step drops the positions it is given (GIT).

    The outcome is kept, weakly, for the model and its attention implementation. Without a Cache no mask is passed:
    False, and nothing runs.
    """
    if reader.signature is None:
        return False
    known = _outcomes.setdefault(reader.model, {})
    kind = attention_of(reader.model)
    if kind not in known:
        known[kind] = _measure(reader, tokenizer)
    return known[kind]


@torch.no_grad()
def _measure(reader: PrefixReader, tokenizer: Any) -> bool:
    ends = end_tokens(reader.model, tokenizer)
    usable = [token for token in usable_ids(reader.model) if token not in ends]
    row = [usable[i % len(usable)] for i in range(_PADDING + _PROMPT + _STEPS)]
    prompt, said = row[_PADDING : _PADDING + _PROMPT], row[-_STEPS:]
    with eval_mode(reader.model), aside(reader.model.device):
        padded, after_text = _logits(reader, tokenizer, [prompt, row[: _PADDING + _PROMPT]], said)
        (alone,) = _logits(reader, tokenizer, [prompt], said)
    moved, by_text = (padded - alone).abs().max(), (after_text - alone).abs().max()
    depth = getattr(reader.model.config.get_text_config(decoder=True), "num_hidden_layers", 32)
    return close(padded, alone, depth) and bool(_SHARE * moved <= by_text)


def _logits(reader: PrefixReader, tokenizer: Any, prompts: list[list[int]], said: list[int]) -> torch.Tensor:
    """Return the logits (rows, steps, V) of the prompts' next tokens, which are `said` whatever they are."""
    record = _Record(said)
    source = PromptBatch(reader, tokenizer, prompts, Sampling(max_new_tokens=len(said), temperature=0))
    source.generate(torch.arange(len(prompts)), record)
    # generate widens the logits of models in 16 bits; `close` needs the dtype in which they were rounded
    return torch.stack(record.logits, dim=1).to(reader.model.dtype)


class _Record(LogitsProcessor):
    """Keeps the logits of every step and chooses the tokens `said`."""

    def __init__(self, said: list[int]) -> None:
        self.said, self.logits = said, list[torch.Tensor]()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        token = self.said[len(self.logits)]
        self.logits.append(scores.clone())
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, token] = 0.0
        return cast(torch.FloatTensor, chosen)
