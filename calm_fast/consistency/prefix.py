"""A prompt's cache, filled once and continued by many rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from calm_fast.hf import ComposedCache, ComposedForCausalLM
from calm_fast.hf.inputs import Signature, lacks_cache, part_inputs

# cache layers that hold keys and values only: continuing a copy of them, by any number of tokens, is what the model
# would have computed from the start. Recurrent states are not: some families continue them by one token at a time.
_PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")


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
    without a Cache. Raises ValueError if the model takes its cache under a name that is not known: reading every prompt
    anew for each token would give the same results, many times slower, without a word.
    """

    def __init__(self, model: PreTrainedModel, share: bool = True) -> None:
        self.model = model
        self.signature = None if lacks_cache(model) else Signature.of(model)
        self.shares = share and self.signature is not None and _plain(self.new_cache())

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
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        prepared = part_inputs(self.model, self.signature, inputs, cache, past)
        if keep is not None and self.signature.logits_to_keep:
            prepared["logits_to_keep"] = keep
        return self.model(**prepared, return_dict=True)

    def filled(self, cache: Cache, tokens: int) -> bool:
        """Whether the model really kept all tokens in the cache; if not, it is never asked to share again."""
        layers = [layer for layer in cache.layers if type(layer).__name__ != "DummyLayer"]
        self.shares = _plain(cache) and bool(layers) and all(layer.get_seq_length() == tokens for layer in layers)
        return self.shares


def _plain(cache: Cache) -> bool:
    return all(type(layer).__name__ in _PLAIN_LAYERS for layer in cache.layers)


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
