"""Hidden states of augmenters that a caller hands to forward, in place of running the augmenters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from calm_fast.core.checks import bad_value, describe
from calm_fast.hf.hooks import Frame, sort_states
from calm_fast.hf.inputs import WHERE, AugmenterCall, per_augmenter
from calm_fast.hf.layers import hidden_size

if TYPE_CHECKING:
    from calm_fast.hf.composition import Composition

NAME = "augmenter_hidden_states"


def connected_layers(composed: Composition, index: int) -> list[int]:
    """Return the connected layers of augmenter `index` in ascending order; -1 is its embedding output."""
    return sorted({a for augmenter, a, _ in composed.pairs if augmenter == index})


def tokens_read(call: AugmenterCall) -> int:
    """Return N, how many tokens of an augmenter the intervals of `call` count."""
    return int(call.inputs["input_ids"].shape[1] if call.reading is None else call.reading.places.shape[1])


def given_states(
    composed: Composition, value: Any, calls: list[AugmenterCall], cached: bool
) -> list[torch.Tensor | None]:
    """Return the states that forward got for each augmenter, None for one that has to run.

    value: the argument `augmenter_hidden_states`. calls: what the augmenters would read. cached: the call has or starts
    a cache.

    Raises ValueError for a cache, for an augmenter that trains, and for a tensor that is not floating-point of shape
    (batch, connected layers, tokens, width).
    """
    count = len(calls)
    if isinstance(value, torch.Tensor) and count > 1:
        expected = f"a list with a tensor or None for each of {count} augmenters"
        raise bad_value(WHERE, NAME, expected, describe(value))
    found = per_augmenter(NAME, value, count)
    if cached:
        got = "a value. Leave it out, or pass use_cache=False: later calls need the augmenters' own caches"
        raise bad_value(WHERE, NAME, "None where a cache is kept", got)
    for index, (states, call) in enumerate(zip(found, calls, strict=True)):
        if states is None:
            continue
        model = composed._augmenter(index)
        if any(p.requires_grad for p in model.parameters()):
            got = "a value. Run the augmenter: given states would leave its parameters without a gradient"
            raise bad_value(WHERE, NAME, f"None for augmenter {index}, which trains", got)
        batch = call.inputs["input_ids"].shape[0]
        shape = (batch, len(connected_layers(composed, index)), tokens_read(call), hidden_size(model))
        if tuple(states.shape) != shape or not states.is_floating_point():
            expected = f"floating-point of shape {shape} (batch, connected layers, tokens, width) for augmenter {index}"
            raise bad_value(WHERE, NAME, expected, describe(states))
    return found


def place_states(composed: Composition, frame: Frame, index: int, call: AugmenterCall, states: torch.Tensor) -> None:
    """Leave given states (B, L, N, DA) in the frame as the hooks of augmenter `index` would, in its dtype."""
    model = composed._augmenter(index)
    for place, layer in enumerate(connected_layers(composed, index)):
        frame.states[index, layer] = states[:, place].to(model.dtype)
    if call.visibility.order is not None:
        sort_states(frame, index, call.visibility.order)
