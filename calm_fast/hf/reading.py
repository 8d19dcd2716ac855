"""What augmenters read in a call, and running them: the hooks leave the states of connected layers in the frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from calm_fast.hf.aligned_calls import AlignedCall, align_call
from calm_fast.hf.augmenter_training import check_trained_parts, trains
from calm_fast.hf.cache import ComposedCache
from calm_fast.hf.encoded_calls import EncodedCall, encode_call, run_encoder
from calm_fast.hf.given_states import place_states
from calm_fast.hf.hooks import Frame, sort_states
from calm_fast.hf.inputs import AugmenterCall, Past, Signature, Tokens, part_inputs
from calm_fast.hf.keywords import augmenter_keywords
from calm_fast.hf.layers import hidden_size, submodule
from calm_fast.hf.masks import Visibility
from calm_fast.hf.trials import try_encoders

if TYPE_CHECKING:
    from calm_fast.hf.composition import Composition


class TextCall:
    """The texts that the model itself makes for augmenters in one call: aligned ones, and those read in full."""

    def __init__(self, aligned: AlignedCall, encoded: EncodedCall) -> None:
        self.aligned, self.encoded = aligned, encoded

    def calls(self, calls: list[AugmenterCall]) -> list[AugmenterCall]:
        """Return the calls of all augmenters, with what bidirectional ones read."""
        found = list(calls)
        for index, reading in self.encoded.readings.items():
            seen = Visibility(reading.lo, reading.hi, False, cacheable=calls[index].visibility.cacheable)
            found[index] = AugmenterCall(calls[index].inputs, seen, None, reading)
        return found

    def commit(self, cache: ComposedCache) -> None:
        """Go on with the texts of `cache`."""
        self.aligned.commit(cache)
        self.encoded.commit(cache)


def read_texts(
    composed: Composition,
    inputs: Tokens,
    external: dict[str, Any],
    past: Past,
    prompt_length: Any,
    learns: bool,
) -> TextCall:
    """Return the texts of a call, and write those of aligned augmenters into `external`.

    inputs: the anchor's. external: the arguments of `augmenter_calls`. learns: the call computes a loss, or the model
    is in training mode. Raises ValueError as `align_call` and `encode_call` do.
    """
    where = (past.cache, past.cached, past.tokens, prompt_length)
    aligners, encoders = composed._aligners, composed.encoders
    encoded = encode_call(encoders, aligners, inputs, external, *where, learns)  # type: ignore[arg-type]  # StreamAligners
    if encoded.readings:
        try_encoders(composed, encoded.readings)
    streams = [aligner if encoder is None else None for aligner, encoder in zip(aligners, encoders, strict=True)]
    ids, mask, positions = inputs["input_ids"], inputs["attention_mask"], inputs["position_ids"]
    return TextCall(align_call(streams, ids, mask, positions, external, *where), encoded)


def read_augmenters(
    composed: Composition,
    frame: Frame,
    calls: list[AugmenterCall],
    cache: ComposedCache | None,
    past: int,
    shared: dict[str, Any],
    given: Sequence[torch.Tensor | None] | None = None,
) -> None:
    """Run every augmenter up to its last connected layer.

    past: the number of the anchor's tokens before this call. given: per augmenter its states, as `given_states` has
    checked them, in place of running it. Autograd records an augmenter only if one of its parameters trains.
    """
    for index, (model, call) in enumerate(zip(composed.augmenters, calls, strict=True)):
        frame.stage = index
        if given is not None and (own_states := given[index]) is not None:
            place_states(composed, frame, index, call, own_states)
            continue
        own, before = None if cache is None else cache.augmenters[index], past
        if cache is not None and call.step is not None:
            cache.begin_step(index, call.step.text, call.step.move)
            before = cache.cross[composed.first_of[index]].get_seq_length()
        signature = composed.signatures[index + 1]
        if call.reading is None and call.inputs["input_ids"].shape[1] == 0:
            _read_nothing(composed, frame, index, call.inputs["input_ids"].shape[0])
            continue
        called = submodule(model, composed.headless[index])
        recorded = trains(model)
        with torch.set_grad_enabled(recorded):
            if call.reading is None:
                run_augmenter(frame, model, called, signature, call, own, before, shared)  # type: ignore[arg-type]
            elif call.reading.ids.shape[1] > 0:
                keys = [key for key in composed.hooks.reads if key[0] == index]
                encoder, device = composed.encoders[index], signature.device(model)  # type: ignore[arg-type]
                run_encoder(frame, index, model, called, encoder, call.reading, keys, device)
        if call.reading is not None and call.reading.ids.shape[1] == 0:
            _read_nothing(composed, frame, index, call.inputs["input_ids"].shape[0])
        elif recorded:
            read = 1 + max(a for i, a, _ in composed.pairs if i == index)
            states = [state for (i, _), state in frame.states.items() if i == index]
            check_trained_parts(index, model, str(composed.config.augmenter_layers[index]), read, states)


def _read_nothing(composed: Composition, frame: Frame, index: int, batch: int) -> None:
    """Leave states without tokens in the frame: augmenter `index` has no new token in this call."""
    model = composed._augmenter(index)
    empty = torch.zeros(batch, 0, hidden_size(model), dtype=model.dtype, device=model.device)
    for augmenter, a, _ in composed.pairs:
        if augmenter == index:
            frame.states[index, a] = empty


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
