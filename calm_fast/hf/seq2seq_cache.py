"""The cache of a composition whose anchor is an encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache

from calm_fast.hf.cache import OneThread, is_empty
from calm_fast.hf.cross_cache import CrossLayer


class ComposedSeq2SeqCache(OneThread, EncoderDecoderCache):
    """The anchor's EncoderDecoderCache, with the keys and values that every connection has made of the source.

    The anchor itself runs on this object. ``connections`` holds one CrossLayer per connection, (B, Hkv, N, D), filled
    by the first call and read by all others, as the anchor's own cross-attention is. So crop, which removes tokens of
    the decoder, leaves them alone. The cache reports that it cannot be compiled. One thread uses it at a time.

    self_attention, cross_attention: empty caches of transformers. owner: name of the composition that fills it.
    """

    where = "ComposedForSeq2SeqLM"

    def __init__(self, self_attention: Cache, cross_attention: Cache, connections: int, owner: str = "") -> None:
        super().__init__(self_attention, cross_attention)
        self.connections = [CrossLayer() for _ in range(connections)]
        self.owner = owner
        self.user = {}

    def __repr__(self) -> str:
        return f"ComposedSeq2SeqCache({super().__repr__()}, connections={len(self.connections)})"

    def reset(self) -> None:
        """Empty the caches of the anchor and of the connections."""
        super().reset()
        for layer in self.connections:
            layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make row i row beam_idx[i]."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # transformers says LongTensor
        for layer in self.connections:
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        for layer in self.connections:
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only the rows `indices`, (B',) int64 or a mask (B,)."""
        super().batch_select_indices(indices)
        for layer in self.connections:
            layer.batch_select_indices(indices)

    @property
    def is_compileable(self) -> bool:
        return False


def is_unused(cache: Any) -> bool:
    """Return True if `cache` is an EncoderDecoderCache that holds no token."""
    if not isinstance(cache, EncoderDecoderCache):
        return False
    return is_empty(cache.self_attention_cache) and is_empty(cache.cross_attention_cache)
