"""One cache for a composed model: the anchor's, every augmenter's, and the cross keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer


def cache_of_first_layers(config: PreTrainedConfig, depth: int) -> DynamicCache:
    """Return an empty cache for a decoder of which only the first `depth` layers run.

    Layers that never run would stay empty, and a hybrid of attention and recurrent layers may ask one of them how many
    tokens it has seen. An attention layer is kept even if none of the first ones is one: transformers asks it.
    """
    cache = DynamicCache(config=config)
    rest, cache.layers = cache.layers[depth:], cache.layers[:depth]
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers += [layer for layer in rest if isinstance(layer, CacheLayerMixin)][:1]
    return cache


class ComposedCache(Cache):
    """The caches of the parts behind one ``Cache``.

    ``layers`` is computed on every access: the anchor's layers, then each augmenter's, then one DynamicLayer
    per connection with cross keys and values (B, Hkv, N, D). The inherited reorder_cache, crop, reset and
    batch operations walk it, so beams and num_return_sequences reorder every part together. Lengths and mask
    sizes are the anchor's. Never compileable, which keeps attention masks two-dimensional up to the parts.
    """

    def __init__(self, anchor: Cache, augmenters: Sequence[Cache], connections: int) -> None:
        # Cache.__init__ would assign `layers`, which is computed here
        self.anchor = anchor
        self.augmenters = list(augmenters)
        self.cross = [DynamicLayer() for _ in range(connections)]
        self.layer_class_to_replicate = None
        self.offloading = False

    @property
    def layers(self) -> list[Any]:
        parts = [*self.anchor.layers]
        for cache in self.augmenters:
            parts.extend(cache.layers)
        return [*parts, *self.cross]

    def __repr__(self) -> str:
        return f"ComposedCache(anchor={self.anchor!r}, augmenters={self.augmenters!r}, cross={len(self.cross)})"

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ComposedCache: its parts are updated by their own models, not through it")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Anchor tokens seen so far; an int also where the anchor's own cache is static or recurrent."""
        if layer_idx != 0:
            return self.anchor.get_seq_length(layer_idx)
        own = next((layer for layer in self.anchor.layers if isinstance(layer, CacheLayerMixin)), None)
        length = None if own is None else own.get_seq_length()
        # a static layer counts in a tensor, a recurrent one not at all: the cross keys are as many on aligned tokens
        return length if isinstance(length, int) else self.cross[0].get_seq_length()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.anchor.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.anchor.get_mask_sizes(query_length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        return False
