"""The cache of a prompt, filled once and continued by many rows."""

from __future__ import annotations

import copy
import warnings
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
from calm_fast.hf.aligned_text import AlignedText
from calm_fast.hf.cross_cache import CrossLayer
from calm_fast.hf.encoded_text import EncodedText
from calm_fast.hf.inputs import Signature, Tokens, kept_positions, part_inputs
from calm_fast.hf.own_text import OwnText
from calm_fast.hf.recompute import lacks_cache

# cache layers that hold keys and values, or texts: a copy of them can be continued by any number of tokens, with the
# result of a forward from the start. A recurrent state cannot: some families continue it by one token at a time only.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, CrossLayer, OwnText, AlignedText, EncodedText)
_RECURRENT = LinearAttentionCacheLayerMixin


def check_model(caller: str, model: Any) -> None:
    """Raise TypeError or ValueError unless `model` is a decoder-only transformers model."""
    if not isinstance(model, PreTrainedModel):
        hint = "; give its get_base_model()" if hasattr(model, "get_base_model") else ""
        raise TypeError(f"{caller}: `model` must be a transformers model, got {type(model).__name__}{hint}")
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(f"{caller}: `model` must be a decoder-only causal language model, got {type(model).__name__}")


class PrefixReader:
    """Runs a model on prompts and their continuations, with caches that can be branched if the family allows it.

    `shares` is False if copies of a prompt's cache cannot be continued: the model keeps a recurrent state (Mamba, RWKV,
    hybrids) or has no transformers Cache. Callers then feed whole sequences, with the same results but many times
    slower. This happens in silence only for families that are known to need it: an unknown cache name is a ValueError,
    and an unfilled or unknown cache warns. `signature` is None for families without a Cache.
    """

    def __init__(self, model: PreTrainedModel, share: bool = True) -> None:
        self.model = model
        self.signature = None if lacks_cache(model) else Signature.of(model)
        self.shares = share and self.signature is not None and self._shareable(self.new_cache())

    def new_cache(self) -> Cache:
        """Return an empty cache for the model."""
        if isinstance(self.model, ComposedForCausalLM):
            return self.model.new_cache()
        config = self.model.config.get_text_config(decoder=True)
        depth = getattr(config, "decoder_layers", None)
        if depth is not None and depth != config.num_hidden_layers:
            # the decoder of an encoder-decoder, where num_hidden_layers is the encoder's; this cache grows on demand
            return DynamicCache()
        return DynamicCache(config=config)

    def __call__(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        past: int = 0,
        keep: int | None = None,
        prompt_length: int | None = None,
    ) -> Any:
        """Return the model's output for ids (B, M) after `past` tokens of `cache`.

        Args:
            mask: (B, past + M), 1 = real token, 0 = padding; None = all real. keep: number of last tokens whose logits
                are needed; a model may return more. prompt_length: number of tokens, padding included, that are the
                prompt, for compositions of several tokenizers. Default, the first tokens of a cache, or all.
        """
        composed = isinstance(self.model, ComposedForCausalLM)
        if self.signature is None:
            more = {} if prompt_length is None or not composed else {"prompt_length": prompt_length}
            return self.model(input_ids=ids.to(self.model.device), use_cache=False, return_dict=True, **more)
        positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        tokens = Tokens(input_ids=ids, attention_mask=mask, position_ids=positions)
        prepared = part_inputs(self.model, self.signature, tokens, cache, past)
        if keep is not None and self.signature.logits_to_keep:
            prepared["logits_to_keep"] = kept_positions(keep, ids)
        if prompt_length is not None and composed:
            prepared["prompt_length"] = prompt_length
        return self.model(**prepared, return_dict=True)

    def check_filled(self, cache: Cache, tokens: int) -> bool:
        """Return True if the model kept all tokens in the cache; if not, set `shares` to False for good."""
        # an augmenter with another tokenizer, or a bidirectional one, has another number of tokens
        others = isinstance(cache, ComposedCache) and (cache.own or cache.encoded())
        layers = _used_layers(cache.anchor if others else cache)  # type: ignore[attr-defined]  # a ComposedCache
        self.shares = self._shareable(cache)
        if self.shares and not (layers and all(layer.get_seq_length() == tokens for layer in layers)):
            self.shares = False
            self._warn(f"its forward did not keep {tokens} tokens in the cache it was given")
        return self.shares

    def _shareable(self, cache: Cache) -> bool:
        """Return True if copies of the cache may be continued: all its layers hold keys and values only."""
        others = [layer for layer in _used_layers(cache) if type(layer) not in _PLAIN_LAYERS]
        unknown = sorted({type(layer).__name__ for layer in others if not isinstance(layer, _RECURRENT)})
        if unknown:
            self._warn(f"cache layers of type {' and '.join(unknown)} are not known to be safe to copy and continue")
        return not others

    def _warn(self, why: str) -> None:
        name = type(self.model).__name__
        warnings.warn(f"{name}: every prompt is read anew for every sample, because {why}", stacklevel=2)


def _used_layers(cache: Cache) -> list[Any]:
    """Return the layers of a cache without the placeholders for model layers that keep nothing."""
    return [layer for layer in cache.layers if type(layer).__name__ != "DummyLayer"]


def branch(cache: Cache, rows: torch.Tensor) -> Cache:
    """Return a cache whose row i is row rows[i] of `cache`, which stays as it is; rows: (B,) int64, repeats allowed."""
    if isinstance(cache, ComposedCache):
        composed = copy.copy(cache)
        composed.anchor = _copy_layers(cache.anchor)
        composed.augmenters = [_copy_layers(part) for part in cache.augmenters]
        composed.cross = [copy.copy(layer) for layer in cache.cross]
        composed.own = {index: copy.copy(text) for index, text in cache.own.items()}
        composed.texts = [copy.copy(text) for text in cache.texts]
        twin: Cache = composed
    else:
        twin = _copy_layers(cache)
    twin.batch_select_indices(rows)
    return twin


def _copy_layers(cache: Cache) -> Cache:
    """Copy the layers but not their tensors: a layer replaces its tensors and never writes into them."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin
