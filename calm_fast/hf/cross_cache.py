"""The keys and values of one connection in a cache: buffers with room for the tokens to come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

_ROOM = 256  # tokens of room beyond the first ones; a buffer that fills up grows by a quarter, or by this if it is more


class CrossLayer(DynamicLayer):
    """A growing layer that appends in place: keys and values (B, Hkv, N, D) are views of larger buffers.

    transformers' own growing layer copies everything in every step, twice the bytes that attention reads. Here a step
    writes its own token. A full buffer is replaced by one that is a quarter larger, so over a text every key is copied
    about four times, and at most a quarter of the memory (or 256 tokens) is unused.

    Views that `update` returned are overwritten once the layer was cropped and goes on. Under autograd, whose graph may
    hold such views, and while torch.compile traces, the layer concatenates instead.

    most: the number of tokens after which no more come, if it is known, else 0: no buffer is larger.
    """

    def __init__(self, most: int = 0) -> None:
        # the buffers, the number of tokens in them, and the number up to which this layer may write
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self.length, self.room, self.most = 0, 0, most
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys so far, (B, Hkv, N, D), or None. A tensor that is set here is never written to."""
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys, self.room, self.length = keys, 0, 0 if keys is None else keys.shape[2]

    @property
    def values(self) -> torch.Tensor | None:
        """The values so far, (B, Hkv, N, D), or None."""
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._values, self.room = values, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.device, self.is_initialized = key_states.device, True

    def get_seq_length(self) -> int:
        return self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values (B, Hkv, n, D); return all of them, (B, Hkv, N, D)."""
        start, keys, values = self.length, self._keys, self._values
        end = start + key_states.shape[2]
        if (
            keys is None
            or values is None
            or end > self.room
            # copy_ would cast and broadcast; the graph of autograd may hold what it would overwrite
            or keys.dtype != key_states.dtype
            or keys.shape[0] != key_states.shape[0]
            or torch.is_grad_enabled()
        ):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if torch.is_grad_enabled() or not self._fits(key_states):
                return self._concatenate(key_states, value_states)
            keys, values = self._make_room(end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def _fits(self, new: torch.Tensor) -> bool:
        """Return True if `new` may be copied into the buffers as it is."""
        keys = self._keys
        assert keys is not None
        return keys.dtype == new.dtype and keys.shape[0] == new.shape[0] and keys.device == new.device

    def _concatenate(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        # torch.cat refuses what does not fit, and promotes dtypes
        keys, values = torch.cat((keys, key_states), 2), torch.cat((values, value_states), 2)
        self.keys, self.values = keys, values
        return keys, values

    def _make_room(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace the buffers by larger ones, with room for `end` tokens and more; return them."""
        assert self._keys is not None and self._values is not None
        room = end + (max(_ROOM, end // 4) if self.length else _ROOM)
        if self.most >= end:
            room = min(room, self.most)
        keys, values = (_copy(t[:, :, : self.length], room) for t in (self._keys, self._values))
        self._keys, self._values, self.room = keys, values, room
        return keys, values

    def move(self, moved: Callable[[torch.Tensor], torch.Tensor], copied: bool) -> None:
        """Replace keys and values (B, Hkv, N, D) by what `moved` makes of them: new tensors if `copied`, else views.

        New tensors go into the same buffers if they fit.
        """
        keys, values = self.keys, self.values
        if keys is None or values is None:
            return
        keys, values = moved(keys), moved(values)
        self.length = keys.shape[2]
        if not copied or self.length > self.room or torch.is_grad_enabled():
            self.keys, self.values = keys, values
            return
        assert self._keys is not None and self._values is not None
        self._keys[:, :, : self.length] = keys
        self._values[:, :, : self.length] = values

    def reset(self) -> None:
        """Drop the tokens and the buffers. (Releases of transformers before 5.24 write zeros instead.)"""
        self.keys, self.values, self.is_initialized = None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; what a positive number does depends on transformers' release."""
        if tokens_to_remove > 0 or self._keys is None:
            super().crop(tokens_to_remove)
        else:
            self.length = max(0, self.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.length:
            assert self._keys is not None
            rows = torch.arange(self._keys.shape[0], device=self._keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, (B',) int64 or a mask (B,)."""
        if not self.length:
            return
        assert self._keys is not None and self._values is not None
        if torch.is_grad_enabled() or indices.dtype == torch.bool:
            self.keys, self.values = (t[:, :, : self.length][indices.to(t.device)] for t in (self._keys, self._values))
            return
        self._keys, self._values = (
            _select(t, indices.to(t.device), self.length, self.room) for t in (self._keys, self._values)
        )
        self.room = self._keys.shape[2]

    def __copy__(self) -> CrossLayer:
        """Return a layer that shares the tokens so far; each of the two copies them before it writes."""
        twin = type(self)(self.most)
        self.room = 0
        twin.__dict__.update(self.__dict__)
        return twin


class FixedCrossLayer(StaticLayer):
    """Keys and values of one connection in buffers of a fixed size, whose length is a tensor on their device.

    Every step has the same shapes, so a graph of it can be compiled or captured once. `update` returns the whole
    buffers, (B, Hkv, max_cache_len, D), and attention gets the bounds of `ends`.
    """

    def ends(self, new: int, queries: int) -> torch.Tensor:
        """Return hi, (queries,) int32, for the last `queries` of `new` tokens that the next `update` appends."""
        last = torch.arange(new - queries + 1, new + 1, dtype=torch.int32, device=self.cumulative_length.device)
        return last + self.cumulative_length.to(torch.int32)


def _copy(t: torch.Tensor, room: int) -> torch.Tensor:
    """Return a buffer that begins with `t` (B, Hkv, n, D)."""
    batch, heads, n, d = t.shape
    with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be written outside of the mode
        buffer = t.new_empty((batch, heads, room, d))
        buffer[:, :, :n] = t
    return buffer


def _select(t: torch.Tensor, rows: torch.Tensor, length: int, room: int) -> torch.Tensor:
    """Return rows of a buffer in a new one with at least `room`: one copy of the `length` tokens."""
    _, heads, _, d = t.shape
    with torch.inference_mode(False), torch.no_grad():
        buffer = t.new_empty((len(rows), heads, max(length, room), d))
        torch.index_select(t[:, :, :length], 0, rows, out=buffer[:, :, :length])
    return buffer
