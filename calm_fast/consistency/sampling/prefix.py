"""A prompt's cache, filled once and continued by many rows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from calm_fast.hf import ComposedCache, ComposedForCausalLM
from calm_fast.hf.inputs import Signature, Tokens, lacks_cache, part_inputs

# cache layers that hold keys and values only: continuing a copy of them, by any number of tokens, is what the model
# would have computed from the start. Recurrent states are not: some families continue them by one token at a time.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
_RECURRENT = LinearAttentionCacheLayerMixin


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients within the block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_model(caller: str, model: Any) -> None:
    """A decoder-only transformers model, or an error that says what came."""
    if not isinstance(model, PreTrainedModel):
        hint = "; give its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"{caller}: `model` must be a transformers model, got {type(model).__name__}{hint}")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"{caller}: `model` must be a decoder-only causal language model, got {type(model).__name__}")


class PrefixReader:
    """Runs a model on prompts and on their continuations, with caches that can be branched where the family allows it.

    `shares` is False where a prompt's cache cannot be continued by copies: models that keep a recurrent state (Mamba,
    RWKV, hybrids), or no transformers Cache at all. Callers then feed whole sequences. `signature` is None for families
    without a Cache. Rereading every prompt gives the same results but is many times slower. It is silent only for
    families known to need it: otherwise an unknown cache name is a ValueError, and an unfilled or unknown cache warns.
    """

    def __init__(self, model: PreTrainedModel, share: bool = True) -> None:
        self.model = model
        self.signature = None if lacks_cache(model) else Signature.of(model)
        self.shares = share and self.signature is not None and self._shareable(self.new_cache())

    @property
    def pads(self) -> bool:
        """Whether prompts of different length can be read together, left-padded.

        False without a Cache, and for families whose forward takes no positions: some of them (the decoders of BART and
        Whisper) count the padding.
        """
        parts = self.model.signatures if isinstance(self.model, ComposedForCausalLM) else [self.signature]
        return all(part is not None and part.position_ids for part in parts)

    def new_cache(self) -> Cache:
        if isinstance(self.model, ComposedForCausalLM):
            return self.model.new_cache()
        config = self.model.config.get_text_config(decoder=True)
        depth = getattr(config, "decoder_layers", None)
        if depth is not None and depth != config.num_hidden_layers:
            # the decoder half of an encoder-decoder: num_hidden_layers is the encoder's; this cache grows by itself
            return DynamicCache()
        return DynamicCache(config=config)

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past: int = 0,
        keep: int | None = None,
    ) -> Any:
        """The model's output for ids (B, M) after `past` tokens of `cache`.

        mask (B, past + M), 1 = real, None = all. keep: only the last tokens' logits are needed (a model may give all).
        """
        if self.signature is None:
            inputs = {"input_ids": ids.to(self.model.device), "use_cache": False}
            return self.model(**inputs, return_dict=True)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        tokens = Tokens(input_ids=ids, attention_mask=mask, position_ids=positions)
        prepared = part_inputs(self.model, self.signature, tokens, cache, past)
        if keep is not None and self.signature.logits_to_keep:
            prepared["logits_to_keep"] = keep
        return self.model(**prepared, return_dict=True)

    def filled(self, cache: Cache, tokens: int) -> bool:
        """Whether the model really kept all tokens in the cache; if not, it is never asked to share again."""
        layers = _used(cache)
        self.shares = self._shareable(cache)
        if self.shares and not (layers and all(layer.get_seq_length() == tokens for layer in layers)):
            self.shares = False
            self._warn(f"its forward did not keep {tokens} tokens in the cache it was given")
        return self.shares

    def _shareable(self, cache: Cache) -> bool:
        """Whether copies of the cache may be continued: all its layers hold keys and values only."""
        others = [layer for layer in _used(cache) if type(layer) not in _PLAIN_LAYERS]
        unknown = sorted({type(layer).__name__ for layer in others if not isinstance(layer, _RECURRENT)})
        if unknown:
            self._warn(f"cache layers of type {' and '.join(unknown)} are not known to be safe to copy and continue")
        return not others

    def _warn(self, why: str) -> None:
        name = type(self.model).__name__
        warnings.warn(f"{name}: every prompt is read anew for every sample, because {why}", stacklevel=2)


def _used(cache: Cache) -> list[Any]:
    """The layers of a cache without the place holders for model layers that keep nothing."""
    return [layer for layer in cache.layers if type(layer).__name__ != "DummyLayer"]


def branch(cache: Cache, rows: torch.Tensor) -> Cache:
    """A cache whose row i is row rows[i] of `cache`, which stays as it is; rows (B,) int64, repeats allowed."""
    twin = copy.copy(cache)
    if isinstance(cache, ComposedCache):
        twin.anchor, twin.augmenters = _copied(cache.anchor), [_copied(part) for part in cache.augmenters]
        twin.cross = [copy.copy(layer) for layer in cache.cross]
    else:
        twin = _copied(cache)
    twin.batch_select_indices(rows)
    return twin


def _copied(cache: Cache) -> Cache:
    """Layers of its own over the same tensors: a layer replaces its tensors and never writes into them."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
