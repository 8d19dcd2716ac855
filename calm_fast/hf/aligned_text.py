"""The anchor's text in a cache, per row, and the state of an aligner after each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from typing_extensions import Self


class Aligner(Protocol):
    """What a call needs of a `StreamAligner`. States are immutable: rows and copies share them."""

    def start(self) -> Any: ...

    def step(self, state: Any, b_id: int) -> tuple[Any, list[int]]: ...

    def finish(self, state: Any) -> tuple[Any, list[int]]: ...

    def align_batch(
        self, rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int | None]
    ) -> list[tuple[list[int], list[int]]]: ...


class Point(NamedTuple):
    """A row after one token of the anchor.

    state: of the aligner, None before the first real token. count: number of the augmenter's ids so far. ended: True
    after an end token that generate chose; what follows is padding.
    """

    state: Any = None
    count: int = 0  # type: ignore[assignment]  # hides tuple.count
    ended: bool = False


class RowText:
    """What is known of the anchor's text in a ComposedCache, per row, with the operations of a cache layer.

    rows: an entry for every token of the anchor, padding included. prompt: the numbers of the anchor's tokens at which
    prompts end, a tuple for all rows or a list with one for each; None if no call has said. slots: the number of ids
    per row that the augmenter's connections hold. stops: end tokens of the generation that runs.
    """

    # transformers asks every layer of a cache
    is_croppable, is_initialized = True, True
    is_compileable, is_sliding, supports_early_init = False, False, False

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.prompt: tuple[int, ...] | list[tuple[int, ...]] | None = None
        self.slots = 0
        self.stops: frozenset[int] = frozenset()

    @classmethod
    def of(cls, known: Any, past: int) -> Self | None:
        """Return the text to go on with, `known` of a cache with `past` tokens, or None if it does not hold them.

        Before the first token: a new text, with what generate has said of its prompt and end tokens.
        """
        if past == 0:
            fresh = cls()
            if known is not None:
                fresh.prompt, fresh.stops = known.prompt, known.stops
            return fresh
        return known if isinstance(known, cls) and known.get_seq_length() == past else None

    def get_seq_length(self) -> int:
        """Return the number of the anchor's tokens so far."""
        return len(self.rows[0]) if self.rows else 0

    def prompt_of(self, row: int) -> tuple[int, ...]:
        """Return where the prompts of a row end."""
        return (self.prompt[row] if isinstance(self.prompt, list) else self.prompt) or ()

    def reset(self) -> None:
        """Forget the text."""
        self.rows, self.prompt, self.slots = [], None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; a positive number says how many stay, as in older releases."""
        length = self.get_seq_length()
        keep = max(0, min(length, tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove))
        if keep < length:
            self.keep_first(keep)

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens."""
        self.rows = [row[:tokens] for row in self.rows]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.select([index for index in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, (B',) int64 or a mask (B,)."""
        chosen = indices.tolist()
        if indices.dtype == torch.bool:
            chosen = [index for index, keep in enumerate(chosen) if keep]
        self.select(chosen)

    def select(self, indices: list[int]) -> None:
        """Make the rows those of `indices`."""
        if not self.rows:
            return
        self.rows = [self.rows[index].copy() for index in indices]
        if isinstance(self.prompt, list):
            self.prompt = [self.prompt[index] for index in indices]

    def __copy__(self) -> Self:
        """Return a text that goes on by itself; the entries are shared."""
        twin = type(self)()
        twin.__dict__.update(self.__dict__)
        twin.rows = [row.copy() for row in self.rows]
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()


class AlignedText(RowText):
    """What an augmenter with another tokenizer has read. rows hold a Point for every token of the anchor.

    `slots` are those of the augmenter's cache, where shorter rows are padded on the left.
    """

    def counts(self, tokens: int | None = None) -> list[int]:
        """Return for each row the number of the augmenter's ids after `tokens` tokens of the anchor (default, all)."""
        tokens = self.get_seq_length() if tokens is None else tokens
        return [row[tokens - 1].count if tokens > 0 else 0 for row in self.rows]

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of the anchor.

        `slots` shrinks by the ids that the row with the fewest of them loses: shorter rows have more padding then.
        """
        lost = [now - then for now, then in zip(self.counts(), self.counts(tokens), strict=True)]
        super().keep_first(tokens)
        self.slots -= min(lost)
