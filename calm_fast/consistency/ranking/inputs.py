"""Encode a question and a rationale as one token sequence, and average the states of the rationale's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Encoded:
    """One token sequence; the rationale is ids[start:stop]."""

    ids: list[int]
    start: int
    stop: int


class PairEncoder:
    """Joins question and rationale for a backbone: [first] question [between] rationale [last].

    first: the tokenizer's cls token, else its bos token, else nothing. between: its sep token, else a newline's tokens,
    else its eos token. last: its sep token, else its eos token, else nothing. For BERT this is the usual pair.

    A pair that is too long loses the beginning of the question first (its end says what is asked), down to a quarter of
    the window, then the beginning of the rationale (its end has the answer).

    Args:
        tokenizer: a transformers tokenizer. max_length: most tokens of a sequence, special ones included.
    Raises:
        ValueError: `max_length` leaves no room for a question and a rationale.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        def single(*names: str) -> list[int]:
            found = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
            return [i for i in found if i is not None][:1]

        self.tokenizer, self.max_length = tokenizer, max_length
        self.first = single("cls", "bos")
        self.between = single("sep") or self._tokens(["\n"])[0] or single("eos")
        self.last = single("sep", "eos")
        self.window = max_length - len(self.first) - len(self.between) - len(self.last)
        if self.window < 8:
            raise ValueError(
                f"Ranker: `max_length` must be at least {max_length + 8 - self.window}, to leave room for a question "
                f"and a rationale, got {max_length}"
            )

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        # verbose=False: no warning about sequences longer than the model, they are cut below
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def __call__(self, questions: Sequence[str], rationales: Sequence[Sequence[str]]) -> list[list[Encoded]]:
        """Encode every rationale of every question; an empty rationale is represented by the separator before it."""
        asked = self._tokens(questions)
        flat = iter(self._tokens([r for group in rationales for r in group]))
        return [[self._join(q, next(flat)) for _ in group] for q, group in zip(asked, rationales, strict=True)]

    def _join(self, question: list[int], rationale: list[int]) -> Encoded:
        room = max(self.window - len(rationale), self.window // 4)
        question = question[-room:]
        rationale = rationale[-(self.window - len(question)) :]
        before = self.first + question + self.between
        # mean pooling needs a token: for an empty rationale, the separator before it
        start = len(before) - (0 if rationale else 1)
        return Encoded(before + rationale + self.last, start, len(before) + len(rationale))


def batches_by_length(items: Sequence[Encoded], tokens: int) -> Iterator[list[int]]:
    """Yield indices of `items` in batches of at most `tokens` tokens, padding included.

    The longest come first, so that memory peaks first. A sequence longer than `tokens` is a batch of its own.
    """
    order = sorted(range(len(items)), key=lambda i: (-len(items[i].ids), i))
    start = 0
    while start < len(order):
        count = max(1, tokens // len(items[order[start]].ids))
        yield order[start : start + count]
        start += count


def pad(items: Sequence[Encoded], pad_id: int, with_types: bool, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return input_ids and attention_mask (B, longest) int64, padded on the right.

    with_types adds token_type_ids, which are 1 from the rationale on.
    """
    longest = max(len(item.ids) for item in items)
    ids = torch.tensor([item.ids + [pad_id] * (longest - len(item.ids)) for item in items])
    place = torch.arange(longest)
    lengths = torch.tensor([len(item.ids) for item in items])
    batch = {"input_ids": ids, "attention_mask": (place < lengths[:, None]).long()}
    if with_types:
        starts = torch.tensor([item.start for item in items])
        batch["token_type_ids"] = ((place >= starts[:, None]) & (place < lengths[:, None])).long()
    return {name: tensor.to(device) for name, tensor in batch.items()}


def mean_states(backbone: nn.Module, items: Sequence[Encoded], pad_id: int) -> torch.Tensor:
    """Return for one batch (B, d) float32, the backbone's last hidden state averaged over the rationale's tokens."""
    device = next(backbone.parameters()).device
    with_types = getattr(backbone.config, "type_vocab_size", 0) > 1
    batch = pad(items, pad_id, with_types, device)
    cache = {"use_cache": False} if hasattr(backbone.config, "use_cache") else {}
    hidden = backbone(**batch, **cache).last_hidden_state.float()
    place = torch.arange(hidden.shape[1], device=device)
    starts, stops = (torch.tensor([getattr(i, end) for i in items], device=device) for end in ("start", "stop"))
    inside = (place >= starts[:, None]) & (place < stops[:, None])
    # `where` and no product: a padded position may hold anything, NaN included
    total = torch.where(inside[..., None], hidden, 0.0).sum(1)
    return total / (stops - starts)[:, None]
