"""The cache of a composed model: the anchor's, every augmenter's, and the keys and values of every connection."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)

from calm_fast.core.checks import bad_value
from calm_fast.hf.aligned_text import RowText
from calm_fast.hf.cross_cache import CrossLayer, FixedCrossLayer
from calm_fast.hf.encoded_text import EncodedText
from calm_fast.hf.own_text import Move, OwnText, cannot_move, keep_whole_text, move_layers

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


def cache_of_first_layers(config: PreTrainedConfig, depth: int, fixed: int = 0) -> Cache:
    """Return an empty cache for a decoder that runs only the layers that fill the first `depth` layers of its cache.

    fixed: the number of tokens of a static cache; 0 makes one that grows.

    A layer that never runs stays empty, and a hybrid of attention and recurrent layers may ask it how many tokens it
    has seen, so those layers are dropped. If the first `depth` layers hold no attention layer, the next one is kept,
    because transformers asks an attention layer for the length.
    """
    cache = StaticCache(config=config, max_cache_len=fixed) if fixed else DynamicCache(config=config)
    rest, cache.layers = cache.layers[depth:], cache.layers[:depth]
    if not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        cache.layers += [layer for layer in rest if isinstance(layer, CacheLayerMixin)][:1]
    return cache


class OneThread:
    """A cache that one thread uses at a time. A copy is free, whoever uses the original.

    where: the composition's class, in errors. user: "thread" -> the thread that runs a forward or generate with it.
    """

    where: ClassVar[str] = "ComposedForCausalLM"
    user: dict[str, int]

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
                f"{self.where}: `cache` must be used by one thread at a time, got one that another thread is "
                "using; give each thread its own (copy.deepcopy copies a prefix)"
            )
        return free

    def end(self) -> None:
        """Let other threads use the cache."""
        self.user.pop("thread", None)


class ComposedCache(OneThread, Cache):
    """One transformers Cache around the caches of all parts.

    ``layers`` is computed on every access: the anchor's layers, each augmenter's layers, one CrossLayer per connection
    with its keys and values (B, Hkv, N, D), the OwnText of every augmenter that reads tokens of its own (``own``), and
    the text of each augmenter with another tokenizer or a bidirectional one (``texts``, None for the others). The
    inherited reorder_cache, crop, reset and batch operations iterate over ``layers``, so beam search and
    num_return_sequences reorder all parts together. Lengths and mask sizes are the anchor's. The cache reports that it
    cannot be compiled, which makes transformers pass two-dimensional attention masks on to the parts.

    owner: name of the composition that fills the cache; no other may continue it. One thread uses a cache at a time.
    readers: the augmenter of every connection (default, 0). fixed: if not 0, the most tokens that it holds: the
    connections' keys have buffers of this size, and a step without a mask reads no count on the host.
    """

    def __init__(
        self,
        anchor: Cache,
        augmenters: Sequence[Cache],
        connections: int,
        owner: str = "",
        readers: Sequence[int] | None = None,
        fixed: int = 0,
    ) -> None:
        # Cache.__init__ would assign `layers`, which is a property here
        self.anchor = anchor
        self.augmenters = list(augmenters)
        self.fixed, self.begun = fixed, False
        layers = (FixedCrossLayer(fixed) if fixed else CrossLayer() for _ in range(connections))
        self.cross: list[Any] = [*layers]
        self.readers = [0] * connections if readers is None else list(readers)
        # the text of every augmenter that reads tokens of its own, and the number of the anchor's tokens
        self.own: dict[int, OwnText] = {}
        self.texts: list[RowText | None] = [None] * len(self.augmenters)
        self.seen = 0  # -1 where a compiled or captured step counted on its device only
        # later calls must say again that rows have padding (a bool scalar on its device where it was not read)
        self.padded: bool | torch.Tensor = False
        self.prefix: Any = None  # prefix_lengths of the call that began the text
        self.all_real = False  # True while generate extends a mask without padding, which it need not pass on
        self.layer_class_to_replicate = None
        self.offloading = False
        self.owner = owner
        self.user = {}

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]  # transformers has an attribute; nothing assigns ours
        """Every layer of every part, in a fixed order."""
        parts = [*self.anchor.layers]
        for cache in self.augmenters:
            parts.extend(cache.layers)
        return [*parts, *self.cross, *self.own.values(), *(text for text in self.texts if text is not None)]

    def __repr__(self) -> str:
        return f"ComposedCache(anchor={self.anchor!r}, augmenters={self.augmenters!r}, cross={len(self.cross)})"

    def _anchor_length(self) -> Any:
        own = next((layer for layer in self.anchor.layers if isinstance(layer, CacheLayerMixin)), None)
        return None if own is None else own.get_seq_length()

    def expect(self, tokens: int) -> None:
        """Limit the buffers of the connections: the text will have at most `tokens` tokens."""
        for layer in self.cross:
            if isinstance(layer, CrossLayer):
                layer.most = tokens

    def end_generation(self) -> None:
        """Forget what holds only while generate runs."""
        self.all_real = False
        for text in self.texts:
            if text is not None:
                text.stops = frozenset()

    def in_step(self) -> bool:
        """Return True if every part holds as many tokens as the composition has given it."""
        anchor = self._anchor_length()
        seen = self.get_seq_length()
        if isinstance(anchor, int) and anchor != seen:
            return False
        lengths = {i: text.width for i, text in self.own.items()} | {i: text.slots for i, text in self.encoded()}
        held = zip(self.readers, self.cross, strict=True)
        return all(layer.get_seq_length() == lengths.get(reader, seen) for reader, layer in held)

    def encoded(self) -> list[tuple[int, EncodedText]]:
        """Return the texts of bidirectional augmenters, with the augmenter's number."""
        return [(index, text) for index, text in enumerate(self.texts) if isinstance(text, EncodedText)]

    def drop_keys(self, index: int) -> None:
        """Empty the connections of augmenter `index`: their keys are replaced."""
        for reader, layer in zip(self.readers, self.cross, strict=True):
            if reader == index:
                layer.reset()

    def own_layers(self, index: int) -> list[Any]:
        """Return the layers that hold the tokens of augmenter `index`: its cache's and its connections'."""
        cross = (layer for reader, layer in zip(self.readers, self.cross, strict=True) if reader == index)
        return [*self.augmenters[index].layers, *cross]

    def fixed_rows(self, index: int, name: str) -> str:
        """Return why the tokens of augmenter `index`, a `name`, cannot move in the cache, or ""."""
        return cannot_move(self.augmenters[index].layers, name)

    def begin_step(self, index: int, text: OwnText, move: Move | None) -> None:
        """Make room for new tokens of augmenter `index`: its own text becomes `text`, after its cached tokens moved."""
        if index not in self.own:
            if self.fixed:
                expected = "None with a cache of a fixed size"
                raise bad_value("ComposedForCausalLM", "augmenter_input_ids", expected, "a value. Pass a new cache")
            keep_whole_text(self.augmenters[index].layers)
        self.own[index] = text
        if move is not None:
            move_layers(self.own_layers(index), move)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens from every part, with the arguments of the installed transformers' Cache.crop.

        An augmenter with tokens of its own loses those that it got for the tokens removed. Raises ValueError if that is
        not known, because the caller gave its tokens, or if its cache cannot go back.
        """
        if not self.in_step():
            lengths = ", ".join(str(layer.get_seq_length()) for layer in self.cross)
            raise ValueError(
                f"ComposedCache.crop: every part must hold the same tokens, got {int(self.get_seq_length())} of the "
                f"anchor and {lengths} of the connections; start a new cache"
            )
        # transformers calls its argument by several names: tokens to remove, or before 5.24 also tokens to keep
        number = int(args[0] if args else next(iter(kwargs.values())))
        seen = self.get_seq_length()
        kept = min(seen, number) if number > 0 else max(0, seen + number)
        prefix = 0 if self.prefix is None else int(torch.as_tensor(self.prefix).max())
        if 1 < prefix and 0 < kept < prefix:
            raise ValueError(
                f"ComposedCache.crop: the prefix of {prefix} tokens must be kept, because its tokens have read each "
                f"other, got {kept} tokens to keep; start a new cache"
            )
        shorter = {index: text.without_last(self._lost(index, kept)) for index, text in self.own.items()}
        own = {id(layer) for index in self.own for layer in (*self.own_layers(index), self.own[index])}
        # the encoding of a prompt stays as a whole
        own |= {id(layer) for index, _ in self.encoded() for layer in self.own_layers(index)}
        for layer in self.layers:
            if id(layer) not in own:
                layer.crop(*args, **kwargs)
        for index, (text, move) in shorter.items():
            self.begin_step(index, text, move)
        self.seen, self.begun = kept, kept > 0

    def _lost(self, index: int, kept: int) -> list[int]:
        """Return for every row how many own tokens of augmenter `index` came after the anchor's first `kept` tokens."""
        text: Any = self.texts[index]
        if text is None or isinstance(text, EncodedText):
            raise ValueError(
                f"ComposedCache.crop: augmenter {index} must read the anchor's tokens, got tokens of its own, and it "
                "is not known which of them to remove; start a new cache"
            )
        lost = [now - then for now, then in zip(text.counts(), text.counts(kept), strict=True)]
        if any(lost) and (why := self.fixed_rows(index, f"augmenter {index}")):
            raise ValueError(f"ComposedCache.crop: every part must be able to go back, got one that is not: {why}")
        return lost

    def reset(self) -> None:
        """Empty the caches of all parts."""
        super().reset()
        self.padded, self.own, self.seen, self.begun, self.prefix = False, {}, 0, False, None
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
        # A static layer counts in a tensor and a recurrent one does not count.
        if isinstance(length, int):
            return length
        if self.seen < 0:
            self.seen = int(self.cross[0].get_seq_length())
        return self.seen

    def before(self, masked: bool) -> int:
        """Return the number of anchor tokens so far; only whether there are any if `fixed` and nothing is `masked`.

        A graph of a step then knows no count that the next step would change.
        """
        return self.get_seq_length() if masked or not self.fixed else int(self.begun)

    def count(self, new: int) -> None:
        """Note that the anchor has read `new` more tokens."""
        if not self.fixed:
            self.seen = self.get_seq_length() if isinstance(self._anchor_length(), int) else self.seen + new
        elif torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self.seen = -1
        elif self.seen >= 0:
            self.seen += new
        self.begun = True

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.anchor.get_max_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.anchor.get_mask_sizes(query_length, layer_idx)

    @property
    def is_compileable(self) -> bool:
        return False
