"""Prefix language models: the tokens of a row's prefix see each other, in the anchor and through the connections.

Token i may see token j if j <= i or j < P, where P is the row's prefix length.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from calm_fast.core.checks import bad_value, describe, require_async, values_checked
from calm_fast.hf.cache import ComposedCache
from calm_fast.hf.inputs import Tokens
from calm_fast.hf.masks import WHERE, Visibility

NAME = "prefix_lengths"
# settings of layers that read a part of the tokens, in the configs of all families
_WINDOWS = ("sliding_window", "attention_window", "window_size", "attention_window_size", "attention_chunk_size")


def attention_of(anchor: PreTrainedModel) -> str:
    """Return the name of the attention implementation of `anchor`."""
    return str(anchor.config.get_text_config(decoder=True)._attn_implementation)


def cannot_take(anchor: PreTrainedModel) -> str:
    """Return why no prefix mask can be given to `anchor`, as far as its config says, or ""."""
    config = anchor.config.get_text_config(decoder=True)
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        return f"which has layers of the type {kinds[0]}"
    for name in _WINDOWS:
        value = getattr(config, name, None)
        if value is not None and getattr(config, "use_sliding_window", True) is not False:
            return f"whose layers read through a window ({name}={value!r} in its config)"
    if getattr(anchor, "_is_stateful", False):
        return "which has recurrent layers"
    kind = attention_of(anchor)
    if kind not in ("eager", "sdpa"):
        return f"loaded with attn_implementation={kind!r}, which takes no such mask (load it with 'sdpa' or 'eager')"
    return ""


def read_prefix(given: Any, ids: torch.Tensor, past: int, cache: ComposedCache | None) -> torch.Tensor | None:
    """Return the prefix lengths (B, 1) int32 of a call, or None if every token sees earlier ones only.

    given: an int, or int64 or int32 (B,). ids: (B, M). past: the number of the anchor's tokens in `cache`, which must
    have begun with the same lengths: then the new tokens come after the prefix.

    Raises ValueError for another type, shape or value, and for a cache that began otherwise.
    """
    batch, new = ids.shape
    if isinstance(given, torch.Tensor):
        if given.shape != (batch,) or given.dtype not in (torch.int64, torch.int32):
            raise bad_value(WHERE, NAME, f"an int, or int64 of shape ({batch},), one per row", describe(given))
    elif isinstance(given, bool) or not isinstance(given, int):
        raise bad_value(WHERE, NAME, f"an int, or int64 of shape ({batch},), one per row", describe(given))
    if past > 0:
        _check_same(given, None if cache is None else cache.prefix)
        return None
    expected = f"from 0 to {new}, the tokens of the call that begins a text (padding included)"
    if isinstance(given, int):
        if not 0 <= given <= new:
            raise bad_value(WHERE, NAME, expected, str(given))
        # a token alone sees itself
        return torch.full((batch, 1), given, dtype=torch.int32, device=ids.device) if given > 1 else None
    if values_checked(given):
        least, most = (int(value) for value in given.aminmax()) if batch else (0, 0)
        if least < 0 or most > new:
            raise bad_value(WHERE, NAME, expected, str(least if least < 0 else most))
    else:
        inside = ((given >= 0) & (given <= new)).all()
        require_async(inside, str(bad_value(WHERE, NAME, expected, "another value")))
    return given.to(ids.device, torch.int32)[:, None]


def _check_same(given: Any, began: Any) -> None:
    """Raise ValueError unless a cache `began` with the prefix lengths `given`; a GPU, which is not read, asserts it."""
    expected = "that of the call which began the cache: the prefix is read there"
    if began is None:
        raise bad_value(WHERE, NAME, expected, f"{describe(given)}, and there was none. Begin with a new cache")
    if began is given or (isinstance(began, int) and isinstance(given, int) and began == given):
        return
    tensors = [value for value in (began, given) if isinstance(value, torch.Tensor)]
    problem = bad_value(WHERE, NAME, expected, f"{describe(given)}, which is another one. Begin with a new cache")
    if not tensors:
        raise problem
    same = (began == (given.to(began.device) if len(tensors) == 2 else given)).all()
    if not all(map(values_checked, tensors)):
        require_async(same, str(problem))
    elif not bool(same):
        raise problem


def check_prefix_labels(prefix: torch.Tensor, labels: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a label is visible to the token that predicts it: one of the tokens 1 to P - 1 of a row.

    prefix: (B, 1). labels: (B, M), shifted by the loss. kwargs: shift_labels (B, M) are shifted already, ignore_index
    is the value of labels that do not count. Where labels are not read (a GPU), the device asserts it.
    """
    ignored = kwargs.get("ignore_index", -100)
    for name, value, shift in (("labels", labels, 0), ("shift_labels", kwargs.get("shift_labels"), 1)):
        if not isinstance(value, torch.Tensor) or value.ndim != 2:
            continue
        target = torch.arange(shift, value.shape[1] + shift, device=value.device)
        visible = (target > 0) & (target < prefix.to(value.device))
        leaks = (visible & (value != ignored)).any()
        expected = f"{ignored} for every token of the prefix but the first, because the prefix sees it"
        got = "other values. A loss needs tokens after the prefix: mask the prefix, or shorten `prefix_lengths`"
        if not values_checked(value):
            require_async(~leaks, str(bad_value(WHERE, name, expected, got)))
        elif bool(leaks):
            raise bad_value(WHERE, name, expected, got)


def widened(visible: Visibility, prefix: torch.Tensor, new: int) -> Visibility:
    """Return intervals in which each token of the prefix reads all that a token of the prefix may read.

    prefix: (B, 1). new: M. Empty intervals, of padding, stay empty.
    """
    lo, hi = visible.lo, visible.hi
    device = prefix.device if hi is None else hi.device
    index = torch.arange(new, dtype=torch.int32, device=device)
    hi = index + 1 if hi is None else hi
    hi = hi.expand(len(prefix), new)
    inside = (index < prefix.to(device)) & (hi > (0 if lo is None else lo.to(device)))
    furthest = torch.where(inside, hi, 0).amax(dim=1, keepdim=True)
    return visible._replace(hi=torch.where(inside, furthest, hi), causal=False)


def prefix_mask(
    anchor: PreTrainedModel, prefix: torch.Tensor, mask: torch.Tensor | None, new: int, keys: int
) -> torch.Tensor:
    """Return the mask (B, 1, M, N) of a call that begins a text, in the form that `anchor`'s attention takes.

    prefix: (B, 1). mask: (B, M) or None, 0 for padding, which no token but itself sees. new: M. keys: N, at least M;
    more in a static cache. bool (True = visible) for SDPA, else additive in the anchor's dtype.
    """
    device = prefix.device
    query, key = torch.arange(new, device=device)[:, None], torch.arange(keys, device=device)
    visible = (key <= query) | (key < prefix[:, None])
    if mask is not None:
        real = torch.nn.functional.pad(mask.to(device).bool(), (0, keys - new))
        # softmax needs a visible token
        visible = visible & (real[:, None] | (key == query))
    visible = visible[:, None]
    if attention_of(anchor) == "sdpa":
        return visible
    zero = torch.zeros((), dtype=anchor.dtype, device=device)
    return torch.where(visible, zero, torch.finfo(anchor.dtype).min)


def give_prefix_mask(
    anchor: PreTrainedModel, prepared: dict[str, Any], prefix: torch.Tensor, inputs: Tokens, cache: Cache | None
) -> None:
    """Replace the mask in `prepared`, the arguments of `anchor`, by that of `prefix` (B, 1).

    inputs: the anchor's tokens in this call, which begins a text. cache: the anchor's.
    """
    new = inputs["input_ids"].shape[1]
    keys = new if cache is None else int(cache.get_mask_sizes(new, 0)[0])
    device = next(value.device for value in prepared.values() if isinstance(value, torch.Tensor))
    prepared["attention_mask"] = prefix_mask(anchor, prefix.to(device), inputs["attention_mask"], new, keys)
