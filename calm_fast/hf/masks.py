"""Attention masks and positions as intervals: the augmenter tokens lo <= j < hi that each anchor token reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast.core.checks import bad_value, readable, require_async, values_checked

WHERE = "ComposedForCausalLM"  # the object that the errors of forward and generate are about


class Visibility(NamedTuple):
    """The interval arguments of one CrossAttention call: lo and hi (B, M) int32 or None, and the causal flag.

    order: (B, N) int64, the augmenter tokens in the order in which lo and hi count them, or None for their own order.
    """

    lo: torch.Tensor | None
    hi: torch.Tensor | None
    causal: bool
    order: torch.Tensor | None = None


CAUSAL = Visibility(None, None, True)


class RealKeys(NamedTuple):
    """The real tokens among N keys.

    Without `order` they are one block [first, end) of each row, both (B, 1) int32. With it they come first in every
    row: order (B, N) int64 sorts them to the front, and counts (B, N + 1) int32 holds how many stand before each index.
    """

    first: torch.Tensor
    end: torch.Tensor
    order: torch.Tensor | None = None
    counts: torch.Tensor | None = None


def _document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the index (B, M) at which each token's document starts: where the position does not grow by 1."""
    restarts = torch.zeros_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids[:, 1:] - position_ids[:, :-1] != 1
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    return torch.where(restarts, index, 0).cummax(dim=1).values


def _is_packed(position_ids: torch.Tensor) -> bool:
    """Return True if positions restart inside a row."""
    if position_ids.ndim != 2:
        return False
    if torch.compiler.is_compiling():
        return True  # tracing cannot read values, and the intervals are right in either case
    return bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any())


def _one_block(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool scalar: the real tokens of every row form one block, which is all that an interval can express."""
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    return (starts <= 1).all()


def _has_hole(name: str) -> ValueError:
    expected = "one block of ones per row (left and/or right padding) where a cache is kept"
    got = "a row with zeros between ones. Move the padding to one end of the row, or pass use_cache=False"
    return bad_value(WHERE, name, expected, got)


def _not_binary(name: str) -> ValueError:
    got = "other values. A token is read or it is not; give documents as `position_ids` that restart"
    return bad_value(WHERE, name, "0 for padding and 1 for a real token (or bool)", got)


def _facts(name: str, given: torch.Tensor, mask: torch.Tensor) -> tuple[bool, bool]:
    """Return (every token is real, some row has a hole), read at once: one synchronisation of a GPU.

    given: the mask as it came; mask: the same as bool. Raises ValueError for values other than 0 and 1.
    """
    binary = (given == mask).all() if given.dtype != torch.bool else torch.ones_like(mask[0, 0])
    full, one_block, values = torch.stack([mask.all(), _one_block(mask), binary]).tolist()
    if not values:
        raise _not_binary(name)
    return full, not one_block


def _check_shape(name: str, mask: torch.Tensor, batch: int, past: int, new: int) -> None:
    if mask.ndim != 2 or tuple(mask.shape) != (batch, past + new):
        expected = f"of shape ({batch}, {past + new}) (batch, past + new tokens)"
        raise bad_value(WHERE, name, expected, f"shape {tuple(mask.shape)}")


def real_keys(name: str, given: torch.Tensor, past: int, new: int, cached: bool | None) -> RealKeys | None:
    """Return the real tokens that a mask names, or None if all of them are.

    given: (B, past + new), 0 or 1, of any dtype. cached: True if a cache holds or will hold the keys, None if one
    may be left out.

    Without a cache, a hole is skipped by sorting the real tokens to the front. With a cache it is a ValueError. The
    values are read on a CPU, and on a GPU in calls that start a text or bring several tokens. In the other calls, and
    in a traced graph with a cache, the hole is asserted away on the device, without a synchronisation.
    """
    mask = given.bool()
    if mask.numel() == 0:
        return None
    tracing = torch.compiler.is_compiling()
    reads = not tracing and (past == 0 or new > 1 or values_checked(mask))
    hole = False
    if reads:
        full, hole = _facts(name, given, mask)
        if full:
            return None
        if hole and (cached or past > 0):
            raise _has_hole(name)
    counted = mask.sum(dim=1, keepdim=True)
    first = mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    first, end = first.to(torch.int32), (first + counted).to(torch.int32)
    if not reads:
        if (past == 0 or new > 1) and given.dtype != torch.bool:
            require_async((given == mask).all(), str(_not_binary(name)))
        if past > 0 or cached is not False:
            require_async(_one_block(mask), str(_has_hole(name)))
    if not hole and not (tracing and past == 0 and cached is False):
        return RealKeys(first, end)
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    counts = torch.nn.functional.pad(mask.cumsum(dim=1), (1, 0)).to(torch.int32)
    return RealKeys(first, end, order, counts)


def aligned_visibility(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    batch: int,
    past: int,
    new: int,
    cached: bool | None = None,
) -> Visibility:
    """Return the intervals for models that read the same tokens: each query sees its document's real keys up to itself.

    attention_mask (B, past + new), 1 = real. position_ids (1 or B, new): documents begin where positions restart; pass
    them only if the anchor itself separates documents. A padding token sees nothing. cached: see `real_keys`.

    Returns CAUSAL if there is no padding and one document. Raises ValueError for a mask of another shape or with other
    values, and for a hole where a cache is kept.
    """
    if attention_mask is None:
        # transformers separates documents by positions only without an attention mask
        if position_ids is None or not _is_packed(position_ids):
            return CAUSAL
        lo = _document_starts(position_ids).expand(batch, new)
        hi = torch.arange(1, new + 1, device=lo.device).expand(batch, new)
        return Visibility(lo.to(torch.int32), hi.to(torch.int32), False)

    _check_shape("attention_mask", attention_mask, batch, past, new)
    mask = attention_mask.bool()
    if new == 1 and past > 0 and readable(mask):
        # A decode step. Where every row is real from its first real token on, the new token reads all of that.
        first = mask.to(torch.uint8).argmax(dim=1)
        starts, counts = first.tolist(), mask.sum(dim=1).tolist()
        if all(start + count == past + 1 for start, count in zip(starts, counts, strict=True)):
            return Visibility(first.to(torch.int32).unsqueeze(1), None, False) if any(starts) else CAUSAL
    keys = real_keys("attention_mask", attention_mask, past, new, cached)
    if keys is None:
        return CAUSAL
    real = mask[:, past:]
    if keys.counts is not None:
        return Visibility(None, keys.counts[:, 1:].masked_fill(~real, 0), False, keys.order)
    ends = torch.arange(past + 1, past + new + 1, device=mask.device, dtype=torch.int32)
    return Visibility(keys.first.expand(batch, new), torch.where(real, ends, keys.first), False)


def _check_bound(name: str, bound: torch.Tensor, batch: int, queries: int, tokens: int) -> None:
    """Raise ValueError unless `bound` is int32, (B, M) or (M,), with values from 0 to `tokens` where they are read."""
    if bound.dtype != torch.int32:
        raise TypeError(f"{WHERE}: `{name}` must have dtype int32, got {bound.dtype}")
    fits = bound.ndim in (1, 2) and bound.shape[-1] == queries and (bound.ndim == 1 or bound.shape[0] == batch)
    if not fits:
        expected = f"of shape ({batch}, {queries}) or ({queries},), one bound per anchor token"
        raise bad_value(WHERE, name, expected, f"shape {tuple(bound.shape)}")
    if bound.numel() and values_checked(bound):
        least, most = (int(value) for value in bound.aminmax())
        if least < 0 or most > tokens:
            expected = f"from 0 to {tokens}, the number of the augmenter's tokens (the cache's included)"
            raise bad_value(WHERE, name, expected, str(least if least < 0 else most))


def given_visibility(
    lo: torch.Tensor | None,
    hi: torch.Tensor,
    name: str,
    mask: torch.Tensor | None,
    batch: int,
    queries: int,
    past: int,
    new: int,
    cached: bool | None,
) -> Visibility:
    """Return the caller's intervals without the padding among the keys.

    lo, hi: (B, M) or (M,) int32, M = `queries`. mask: (B, past + new), of the augmenter's tokens; argument `name` of
    the errors. cached: see `real_keys`.
    """
    for bound_name, bound in (("lo", lo), ("hi", hi)):
        if bound is not None:
            _check_bound(bound_name, bound, batch, queries, past + new)
    if mask is None:
        return Visibility(lo, hi, False)
    _check_shape(name, mask, batch, past, new)
    keys = real_keys(name, mask.to(hi.device), past, new, cached)
    if keys is None:
        return Visibility(lo, hi, False)
    hi = hi.expand(batch, queries)
    lo = None if lo is None else lo.to(hi.device).expand(batch, queries)
    if keys.counts is None:
        lo = keys.first.expand(batch, queries) if lo is None else lo.maximum(keys.first)
        return Visibility(lo, hi.minimum(keys.end), False)
    # among the sorted tokens, an index becomes the number of real tokens before it
    before = [None if b is None else keys.counts.gather(1, b.clamp(0, past + new).long()) for b in (lo, hi)]
    return Visibility(before[0], before[1], False, keys.order)


def check_left_padded(mask: torch.Tensor | None) -> None:
    """Raise ValueError if a row of a prompt's mask (B, T) ends with padding: generate would continue after a hole."""
    if mask is None or mask.ndim != 2 or mask.numel() == 0 or mask.device.type == "meta":
        return
    if not bool(mask[:, -1].bool().all()):
        got = 'a row that ends with padding. Pad on the left (tokenizer.padding_side = "left")'
        raise bad_value("generate", "attention_mask", "1 for the last token of every row", got)
