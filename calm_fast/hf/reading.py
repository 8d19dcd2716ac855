"""Running an augmenter up to its last connected layer; the hooks leave its states in the frame."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from calm_fast.hf.hooks import Frame, sort_states
from calm_fast.hf.inputs import AugmenterCall, Signature, Tokens, part_inputs
from calm_fast.hf.keywords import augmenter_keywords


def run_augmenter(
    frame: Frame,
    model: PreTrainedModel,
    called: nn.Module,
    signature: Signature,
    call: AugmenterCall,
    cache: Cache | None,
    past: int,
    shared: dict[str, Any],
) -> None:
    """Run `called`, the module inside `model` that has its layers, on the tokens of one call.

    cache: the augmenter's own, with `past` tokens. shared: document limits that go to every part.
    """
    parts = [call.inputs] if call.step is None or past == 0 else _in_turn(call.inputs, cache)
    for n, tokens in enumerate(parts):
        inputs = part_inputs(model, signature, tokens, cache, past + n)
        if shared:
            inputs |= augmenter_keywords(called, shared, signature.device(model))
        frame.goes_on = n > 0
        called(**inputs)
    frame.goes_on = False
    if call.visibility.order is not None:
        assert isinstance(frame.stage, int)
        sort_states(frame, frame.stage, call.visibility.order)


def _in_turn(tokens: Tokens, cache: Cache | None) -> list[Tokens]:
    """Return new tokens as one call, or as one call per token for a cache with recurrent layers.

    The recurrent layers of transformers go on from their state with one token at a time.
    """
    ids, mask, positions = tokens["input_ids"], tokens["attention_mask"], tokens["position_ids"]
    new = ids.shape[1]
    layers = [] if cache is None or new == 1 else cache.layers
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
        return [tokens]
    return [
        Tokens(
            input_ids=ids[:, n : n + 1],
            attention_mask=None if mask is None else mask[:, : mask.shape[1] - new + n + 1],
            position_ids=None if positions is None else positions[:, n : n + 1],
        )
        for n in range(new)
    ]
