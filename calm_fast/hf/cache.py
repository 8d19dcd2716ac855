"""The cache of a composed model: the anchor's, every augmenter's, and the keys and values of every connection."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

# attribute of a user's cache object: the ComposedCache around it
AROUND = "_calm_fast_composed_cache"


class Identity:
    """Ties a cache to the composition that fills it. A deep copy of a composition gets an identity of its own."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex

    def __deepcopy__(self, memo: dict[int, Any]) -> Identity:
        return Identity()


def is_empty(cache: Cache) -> bool:
    """Return True if no layer of `cache` holds a token or a recurrent state."""
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()) > 0:
            return False
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            recurrent = layer.has_previous_state
            if any(recurrent.values()) if isinstance(recurrent, dict) else recurrent:
                return False
    return True


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

    owner: name of the composition that fills the cache; no other may continue it. One thread uses a cache at a time.
    """

    def __init__(self, anchor: Cache, augmenters: Sequence[Cache], connections: int, owner: str = "") -> None:
        # Cache.__init__ would assign `layers`, which is a property here
        self.anchor = anchor
        self.augmenters = list(augmenters)
        self.cross = [DynamicLayer() for _ in range(connections)]
        # what later calls must say again: that rows have padding, and which augmenters read tokens of their own
        self.padded = False
        self.own_tokens: set[int] = set()
        self.layer_class_to_replicate = None
        self.offloading = False
        self.owner = owner
        self.user: dict[str, int] = {}  # "thread" -> the thread that runs a forward or generate with this cache

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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"user": {}}

    def begin(self) -> bool:
        """Take the cache for this thread. Returns True if the caller has to end() it.

        Raises ValueError if another thread uses it. A compiled forward does not look.
        """
        if torch.compiler.is_compiling():
            return False
        own, free = threading.get_ident(), "thread" not in self.user
        if self.user.setdefault("thread", own) != own:  # atomic
            raise ValueError(
                "ComposedForCausalLM: `cache` must be used by one thread at a time, got one that another thread is "
                "using; give each thread its own (copy.deepcopy copies a prefix)"
            )
        return free

    def end(self) -> None:
        """Let other threads use the cache."""
        self.user.pop("thread", None)

    def in_step(self) -> bool:
        """Return True if every connection holds as many keys as the anchor has seen tokens."""
        return all(layer.get_seq_length() == int(self.get_seq_length()) for layer in self.cross)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens from every part, with the arguments of the installed transformers' Cache.crop.

        Raises ValueError if an augmenter read tokens of its own: then no one number of tokens fits all parts.
        """
        if not self.in_step():
            lengths = ", ".join(str(layer.get_seq_length()) for layer in self.cross)
            raise ValueError(
                f"ComposedCache.crop: every part must hold the same tokens, got {int(self.get_seq_length())} of the "
                f"anchor and {lengths} of the connections; start a new cache"
            )
        super().crop(*args, **kwargs)

    def reset(self) -> None:
        """Empty the caches of all parts."""
        super().reset()
        # releases before 5.24 zero a growing layer in place, which keeps its length
        self.cross = [DynamicLayer() for _ in self.cross]
        self.padded, self.own_tokens = False, set()
        if not all(map(is_empty, (self.anchor, *self.augmenters))):
            raise ValueError(
                "ComposedCache.reset: the parts must be empty afterwards, got caches that transformers' own reset "
                "leaves filled; start a new cache"
            )

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
