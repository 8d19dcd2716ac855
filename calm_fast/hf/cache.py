"""The cache of a composed model: the anchor's, every augmenter's, and the keys and values of every connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer


def cache_of_first_layers(config: PreTrainedConfig, depth: int) -> DynamicCache:
    """Return an empty cache for a decoder that runs only its first `depth` layers.

    A layer that never runs stays empty, and a hybrid of attention and recurrent layers may ask it how many tokens it
    has seen, so those layers are dropped. If the first `depth` layers hold no attention layer, the next one is kept,
    because transformers asks an attention layer for the length.
    """
    cache = DynamicCache(config=config)
    rest, cache.layers = cache.layers[depth:], cache.layers[:depth]
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers += [layer for layer in rest if isinstance(layer, CacheLayerMixin)][:1]
    return cache


class ComposedCache(Cache):
    """One transformers Cache around the caches of all parts.

    ``layers`` is computed on every access: the anchor's layers, each augmenter's layers, and one DynamicLayer per
    connection with its keys and values (B, Hkv, N, D). The inherited reorder_cache, crop, reset and batch operations
    iterate over ``layers``, so beam search and num_return_sequences reorder all parts together. Lengths and mask
    sizes are the anchor's. The cache reports that it cannot be compiled, which makes transformers pass
    two-dimensional attention masks on to the parts.
    """

    def __init__(self, anchor: Cache, augmenters: Sequence[Cache], connections: int) -> None:
        # Cache.__init__ would assign `layers`, which is a property here
        self.anchor = anchor
        self.augmenters = list(augmenters)
        self.cross = [DynamicLayer() for _ in range(connections)]
        # what later calls must say again: that rows have padding, and which augmenters read tokens of their own
        self.padded = False
        self.own_tokens: set[int] = set()
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]  # transformers has an attribute; nothing assigns ours
        """Every layer of every part, in a fixed order."""
        parts = [*self.anchor.layers]
        for cache in self.augmenters:
            parts.extend(cache.layers)
        return [*parts, *self.cross]

    def __repr__(self) -> str:
        return f"ComposedCache(anchor={self.anchor!r}, augmenters={self.augmenters!r}, cross={len(self.cross)})"

    def _anchor_length(self) -> Any:
        own = next((layer for layer in self.anchor.layers if isinstance(layer, CacheLayerMixin)), None)
        return None if own is None else own.get_seq_length()

    def counts_tokens(self) -> bool:
        """Return True if the anchor's cache itself knows the number of its tokens, as an int."""
        return isinstance(self._anchor_length(), int)

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("ComposedCache.update: each part updates its own cache; call the composed model")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of anchor tokens seen so far: an int even if the anchor's cache is static or recurrent."""
        if layer_idx != 0:
            return self.anchor.get_seq_length(layer_idx)
        length = self._anchor_length()
        # A static layer counts in a tensor and a recurrent one does not count. Without augmenter tokens of its own
        # the first connection has cached one key per anchor token.
        return length if isinstance(length, int) else self.cross[0].get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.anchor.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.anchor.get_mask_sizes(query_length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        return False
