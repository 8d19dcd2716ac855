"""The text of an augmenter that reads tokens of its own, in a ComposedCache whose rows grow at different rates.

A call brings (B, N) new ids with a mask, and a row may get fewer than N real ones. No part ever sees a hole: every row
is kept as one block at the right end of the cached slots. A row that gets fewer new tokens than the others has its
cached keys and values moved to the right, and its last tokens are read once more in front of the new ones, with the
same result. So every row reads the same number of tokens, at contiguous slots and positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from calm_fast.core.checks import values_checked
from calm_fast.hf.cross_cache import CrossLayer


class OwnText:
    """The tokens that one augmenter has read, per row, with the operations of a cache layer.

    ids: (B, T) int64, the T slots of the augmenter's cache; a row with fewer tokens is padded on the left.
    real: (B, T) bool, or None if no slot is padding. positions: (B, T) int64, or None if they count the real tokens.
    slots: how many slots per row the caller has given, padding included: what a caller's mask and intervals count.
    counts: the number of real tokens of every row, None where no mask was read on the host.
    """

    # transformers asks every layer of a cache
    is_croppable, is_initialized = True, True
    is_compileable, is_sliding, supports_early_init = False, False, False

    def __init__(
        self,
        ids: torch.Tensor,
        slots: int,
        real: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        counts: list[int] | None = None,
    ) -> None:
        self.ids, self.slots, self.real, self.positions, self.counts = ids, slots, real, positions, counts

    @property
    def width(self) -> int:
        """The number of slots in the augmenter's cache."""
        return self.ids.shape[1]

    def whole(self) -> bool:
        """Return True if every slot that the caller gave holds a real token."""
        return self.real is None and self.slots == self.width

    def reset(self) -> None:
        """Forget the text."""
        self.ids, self.slots, self.real, self.positions, self.counts = self.ids[:, :0], 0, None, None, None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.batch_select_indices(torch.arange(len(self.ids)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, (B',) int64 or a mask (B,)."""
        if self.counts is not None:
            rows = torch.tensor(self.counts)[indices].tolist() if values_checked(indices) else None
            self.counts = rows
        self.ids = self.ids[indices.to(self.ids.device)]
        if self.real is not None:
            self.real = self.real[indices.to(self.real.device)]
        if self.positions is not None:
            self.positions = self.positions[indices.to(self.positions.device)]

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: `ComposedCache.crop` knows how many tokens of this text an anchor token stands for."""

    def without_last(self, lost: list[int]) -> tuple[OwnText, Move]:
        """Return the text without the last `lost[r]` real tokens of row r, and the move of the cached ones."""
        least, width = min(lost), self.width - min(lost)
        counts = None if self.counts is None else [n - k for n, k in zip(self.counts, lost, strict=True)]
        if max(lost) == least:
            move = Move(0, width)
        else:
            # row r keeps its block at the right end
            shift = torch.tensor([[least - k] for k in lost], device=self.ids.device)
            move = Move(0, width, sources(shift, width, self.ids.device))
        real = self.real
        if real is None and move.source is not None:
            real = torch.ones_like(self.ids, dtype=torch.bool)
        if real is not None:
            real = move.of_rows(real)
            if move.source is not None:
                index = torch.arange(width, device=real.device)
                real = real & (index >= torch.tensor([[k - least] for k in lost], device=real.device))
        positions = None if self.positions is None else move.of_rows(self.positions)
        return OwnText(move.of_rows(self.ids), self.slots - least, real, positions, counts), move


class Move(NamedTuple):
    """Where the cached tokens go: slot j becomes what slot start + j was, or in row r what slot source[r, j] was.

    width: the number of slots afterwards. source: (B, width) int64 or None.
    """

    start: int
    width: int
    source: torch.Tensor | None = None

    def of_rows(self, t: torch.Tensor) -> torch.Tensor:
        """Return the moved columns of t (B, T)."""
        if self.source is None:
            return t[:, self.start : self.start + self.width]
        return t.gather(1, on_device(self.source, t.device))

    def of_heads(self, t: torch.Tensor) -> torch.Tensor:
        """Return the moved tokens of keys or values (B, H, T, D)."""
        if self.source is None:
            return t[:, :, self.start : self.start + self.width]
        return t.take_along_dim(on_device(self.source, t.device)[:, None, :, None], 2)


def on_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `t` on `device`, without waiting for a GPU."""
    return t.to(device, non_blocking=True)


def sources(shift: torch.Tensor, width: int, device: torch.device) -> torch.Tensor:
    """Return j + shift[r] for every slot j, (B, width) int64. A slot before the text gets any column: it is padding."""
    return (torch.arange(width, device=device) + on_device(shift, device)).clamp(min=0)


def keep_whole_text(layers: list[Any]) -> None:
    """Replace empty sliding-window layers by growing ones: rows that move need all their tokens."""
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            layers[index] = DynamicLayer()


def cannot_move(layers: Iterable[Any], name: str) -> str:
    """Return why the tokens in these layers cannot move, or ""."""
    for layer in layers:
        if isinstance(layer, CrossLayer) or type(layer) is DynamicLayer or getattr(layer, "keys", 0) is None:
            continue
        kind = "attention state" if isinstance(layer, CacheLayerMixin) else "recurrent state"
        return f"the {kind} of {name} cannot take a token back"
    return ""


def move_layers(layers: Iterable[Any], move: Move) -> None:
    """Move the cached tokens of every layer that holds some."""
    for layer in layers:
        if isinstance(layer, CrossLayer):
            layer.move(move.of_heads, copied=move.source is not None)
        elif getattr(layer, "keys", None) is not None and layer.get_seq_length() > 0:
            layer.keys, layer.values = move.of_heads(layer.keys), move.of_heads(layer.values)
