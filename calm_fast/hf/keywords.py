"""Keyword arguments that forward passes on: what changes the anchor's reading must reach the augmenters too."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from calm_fast.core.checks import bad_value, describe, values_checked
from calm_fast.hf.inputs import WHERE

# they choose what is returned, or scale the loss
ANCHOR_ONLY = frozenset(
    "output_attentions output_hidden_states output_router_logits num_items_in_batch shift_labels ignore_index "
    "skip_logits".split()
)
# where documents begin in a packed row, beside position_ids: as DataCollatorWithFlattening writes them
_DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_INSTEAD = {
    "token_type_ids": "Leave it out, or make the tokenizer leave it out",
    "encoder_hidden_states": "Compose a model that reads tokens only",
    "pixel_values": "Compose the language model that reads tokens only",
}


def shared_keywords(
    kwargs: dict[str, Any],
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    separable: bool,
    past: int,
) -> dict[str, Any]:
    """Check the keyword arguments that forward got beyond its own; return those that every part must get.

    separable: True if restarting positions separate documents in this call (no mask, no cache, aligned tokens).

    Raises ValueError naming an argument that would change what the anchor reads and not what the augmenters read.
    """
    shared = {}
    for name, value in kwargs.items():
        if value is None or name in ANCHOR_ONLY:
            continue
        if name == "cache_position":
            _check_positions(value, past, input_ids.shape[1])
        elif name in _DOCUMENTS:
            if position_ids is None or not separable:
                expected = "given with `position_ids` that restart and no mask, cache or augmenter's own tokens"
                raise bad_value(WHERE, name, expected, "a value. Connections know documents by their positions")
            _check_documents(name, value, input_ids, position_ids)
            shared[name] = value
        else:
            got = f"{describe(value)}. {_INSTEAD.get(name, 'It would reach the anchor only: leave it out')}"
            raise bad_value(WHERE, name, "None", got)
    return shared


def _check_positions(value: Any, past: int, new: int) -> None:
    if isinstance(value, torch.Tensor) and values_checked(value) and value.tolist() != [*range(past, past + new)]:
        raise bad_value(WHERE, "cache_position", f"{past} to {past + new - 1}, as the cache counts", describe(value))


def _check_documents(name: str, value: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> None:
    """Raise ValueError if `value` says other document limits than the positions."""
    if not isinstance(value, torch.Tensor) or not (values_checked(value) and values_checked(position_ids)):
        return
    starts = torch.ones(input_ids.shape, dtype=torch.bool)
    starts[:, 1:] = (position_ids[:, 1:] - position_ids[:, :-1] != 1).expand(len(input_ids), -1).cpu()
    if name == "seq_idx":
        same = value.shape == input_ids.shape and bool(((value[:, 1:] != value[:, :-1]).cpu() == starts[:, 1:]).all())
    else:
        same = value.tolist() == [*starts.flatten().nonzero().flatten().tolist(), starts.numel()]
    if not same:
        raise bad_value(WHERE, name, "the document limits that `position_ids` say", describe(value))


def augmenter_keywords(called: nn.Module, shared: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `shared` on the device of an augmenter. Raises ValueError if its forward does not take an argument."""
    parameters = inspect.signature(called.forward).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in shared:
            if name not in parameters:
                got = f"a value, which {type(called).__name__} of `augmenters` does not take"
                raise bad_value(WHERE, name, "None", got)
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in shared.items()}
