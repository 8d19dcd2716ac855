"""Attention masks and positions as intervals: the augmenter tokens lo <= j < hi that each anchor token reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast.core.checks import bad_value, readable, require_async, values_checked

WHERE = "ComposedForCausalLM"  # the object that the errors of forward and generate are about


class Visibility(NamedTuple):
    """The interval arguments of one CrossAttention call: lo and hi (B, M) int32 or None, and the causal flag.

    order: (B, N) int64, the augmenter tokens in the order in which lo and hi count them, or None for their own order.
    cacheable: False if a cache of these tokens could not go on, because a mask that was read has a hole.
    """

    lo: torch.Tensor | None
    hi: torch.Tensor | None
    causal: bool
    order: torch.Tensor | None = None
    cacheable: bool = True


CAUSAL = Visibility(None, None, True)


class RealKeys(NamedTuple):
    """The real tokens among N keys: one block [first, end) of each row, both (B, 1) int32, once `order` is applied.

    order: (B, N) int64, which sorts real tokens to the front; None keeps every row as it is.
    counts: (B, N + 1) int32 with `order`: where each bound of an interval lies in the sorted row.
    cacheable: False if a row is known to have a hole.
    """

    first: torch.Tensor
    end: torch.Tensor
    order: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    cacheable: bool = True


def _document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the index (B, M) at which each token's document starts: where the position does not grow by 1."""
    restarts = torch.zeros_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids[:, 1:] - position_ids[:, :-1] != 1
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    return torch.where(restarts, index, 0).cummax(dim=1).values


def _is_packed(position_ids: torch.Tensor) -> bool:
    """Return True if positions restart inside a row, or if they cannot be read: the intervals are right for both."""
    if position_ids.ndim != 2:
        return False
    return not values_checked(position_ids) or not bool(_runs_on(position_ids))


def _runs_on(position_ids: torch.Tensor) -> torch.Tensor:
    """Return a bool scalar: every position of a row is one more than the one before."""
    return (position_ids[:, 1:] - position_ids[:, :-1] == 1).all()


def refuse_restarts(position_ids: torch.Tensor, message: str) -> None:
    """Raise ValueError with `message` if positions restart in a row; assert it on devices whose values are not read."""
    if not values_checked(position_ids):
        require_async(_runs_on(position_ids), message)
    elif not bool(_runs_on(position_ids)):
        raise ValueError(message)


def _blocks(mask: torch.Tensor) -> torch.Tensor:
    """Return the number (B,) of blocks of real tokens in each row; an interval can express one."""
    return mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)


def _one_block(mask: torch.Tensor) -> torch.Tensor:
    """Return a bool scalar: the real tokens of every row form one block."""
    return (_blocks(mask) <= 1).all()


def _has_hole(name: str) -> ValueError:
    expected = "one block of ones per row (left and/or right padding) where a cache is kept"
    got = "a row with zeros between ones. Move the padding to one end of the row, or pass use_cache=False"
    return bad_value(WHERE, name, expected, got)


def not_binary(name: str) -> ValueError:
    """Return the error for a mask with values other than 0 and 1."""
    got = "other values. A token is read or it is not; give documents as `position_ids` that restart"
    return bad_value(WHERE, name, "0 for padding and 1 for a real token (or bool)", got)


def _facts(name: str, given: torch.Tensor, mask: torch.Tensor) -> tuple[bool, bool]:
    """Return (every token is real, some row has a hole), read at once: one synchronisation of a GPU.

    given: the mask as it came; mask: the same as bool. Raises ValueError for values other than 0 and 1.
    """
    binary = (given == mask).all() if given.dtype != torch.bool else torch.ones_like(mask[0, 0])
    full, one_block, values = torch.stack([mask.all(), _one_block(mask), binary]).tolist()
    if not values:
        raise not_binary(name)
    return full, not one_block


def check_shape(name: str, mask: torch.Tensor, batch: int, past: int, new: int) -> None:
    """Raise ValueError unless `mask` is (batch, past + new)."""
    if mask.ndim != 2 or tuple(mask.shape) != (batch, past + new):
        expected = f"of shape ({batch}, {past + new}) (batch, past + new tokens)"
        raise bad_value(WHERE, name, expected, f"shape {tuple(mask.shape)}")


def real_keys(name: str, given: torch.Tensor, past: int, new: int, cached: bool | None) -> RealKeys | None:
    """Return the real tokens that a mask names, or None if all of them are known to be real.

    given: (B, past + new), 0 or 1, of any dtype. cached: True if a cache holds or will hold the keys, None if one
    may be left out.

    Without a cache, a hole is skipped by sorting the real tokens to the front. With a cache it is a ValueError. Values
    are read where `values_checked` allows it. Elsewhere, on a GPU and in a traced graph, nothing waits for the device:
    other values than 0 and 1, and a hole with a cache, fail an assertion there.
    """
    mask = given.bool()
    if mask.numel() == 0:
        return None
    reads, tracing = values_checked(mask), torch.compiler.is_compiling()
    if reads:
        full, hole = _facts(name, given, mask)
        if full:
            return None
        if hole and (cached or past > 0):
            raise _has_hole(name)
        if hole:
            return _sorted(mask, cacheable=False)
    elif (past == 0 or new > 1) and given.dtype != torch.bool:
        require_async((given == mask).all(), str(not_binary(name)))
    if not reads and past == 0 and cached is False:
        return _sorted(mask)
    counted = mask.sum(dim=1, keepdim=True)
    first = mask.to(torch.uint8).argmax(dim=1, keepdim=True)
    first, end = first.to(torch.int32), (first + counted).to(torch.int32)
    if reads:
        return RealKeys(first, end)
    if past == 0 and cached is None and not tracing:
        return _sorted_holes(mask, first, end)
    require_async(_one_block(mask), str(_has_hole(name)))
    return RealKeys(first, end)


def _sorted(mask: torch.Tensor, cacheable: bool = True) -> RealKeys:
    """Return the real tokens sorted to the front of every row."""
    order = _to_front(mask) if torch.compiler.is_exporting() else (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    counts = torch.nn.functional.pad(mask.cumsum(dim=1), (1, 0)).to(torch.int32)
    return RealKeys(torch.zeros_like(counts[:, :1]), counts[:, -1:], order, counts, cacheable)


def _to_front(mask: torch.Tensor) -> torch.Tensor:
    """Return the same order (B, N) as a stable sort, which ONNX does not have."""
    seen = mask.cumsum(dim=1)
    place = torch.where(mask, seen - 1, seen[:, -1:] + (~mask).cumsum(dim=1) - 1)
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    return torch.zeros_like(place).scatter(1, place, index)


def _sorted_holes(mask: torch.Tensor, first: torch.Tensor, end: torch.Tensor) -> RealKeys:
    """Return the real tokens sorted to the front in rows with a hole; a cache of the other rows can go on."""
    holes, n = _blocks(mask)[:, None] > 1, mask.shape[1]
    to_front = _sorted(mask)
    assert to_front.order is not None and to_front.counts is not None
    index = torch.arange(n + 1, device=mask.device, dtype=torch.int32)
    order = torch.where(holes, to_front.order, index[:n])
    counts = torch.where(holes, to_front.counts, index.maximum(first).minimum(end))
    return RealKeys(torch.where(holes, 0, first), torch.where(holes, to_front.end, end), order, counts)


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

    check_shape("attention_mask", attention_mask, batch, past, new)
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
        hi = keys.counts[:, 1:].masked_fill(~real, 0)
        # sorted rows begin at 0; with a cache only those with a hole are sorted
        begin = keys.first.expand(batch, new) if cached is None and keys.cacheable else None
        return Visibility(begin, hi, False, keys.order, keys.cacheable)
    ends = torch.arange(past + 1, past + new + 1, device=mask.device, dtype=torch.int32)
    return Visibility(keys.first.expand(batch, new), torch.where(real, ends, keys.first), False)


def check_bound(name: str, bound: torch.Tensor, batch: int, queries: int, tokens: int) -> None:
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
            check_bound(bound_name, bound, batch, queries, past + new)
    if mask is None:
        return Visibility(lo, hi, False)
    check_shape(name, mask, batch, past, new)
    keys = real_keys(name, mask.to(hi.device), past, new, cached)
    if keys is None:
        return Visibility(lo, hi, False)
    hi = hi.expand(batch, queries)
    lo = None if lo is None else lo.to(hi.device).expand(batch, queries)
    if keys.counts is None:
        lo = keys.first.expand(batch, queries) if lo is None else lo.maximum(keys.first)
        return Visibility(lo, hi.minimum(keys.end), False)
    # among the sorted tokens, an index becomes the number of real tokens before it
    lo = torch.zeros_like(hi) if lo is None else lo
    before = [keys.counts.gather(1, bound.clamp(0, past + new).long()) for bound in (lo, hi)]
    return Visibility(before[0], before[1], False, keys.order, keys.cacheable)


def has_padding(mask: torch.Tensor) -> bool | torch.Tensor:
    """Return whether a mask hides a token: a bool where it may be read, else a bool scalar on its device."""
    hidden = (mask == 0).any()
    return bool(hidden) if values_checked(mask) else hidden


def check_prompt(mask: torch.Tensor | None, cached: bool) -> bool:
    """Check the mask (B, T) of a prompt for generate; return True if all its tokens are real.

    The mask is read on every device, once for a whole generation. Raises ValueError for a row that ends with padding,
    because generate would continue after a hole, for a hole if a cache is kept (`cached`), and for other values.
    """
    if mask is None or mask.ndim != 2 or mask.numel() == 0 or mask.device.type == "meta":
        return mask is None
    real = mask.bool()
    facts = [real[:, -1].all(), real.all(), _one_block(real), (mask == real).all()]
    ends_real, full, one_block, binary = torch.stack(facts).tolist()
    if not ends_real:
        got = 'a row that ends with padding. Pad on the left (tokenizer.padding_side = "left")'
        raise bad_value("generate", "attention_mask", "1 for the last token of every row", got)
    if not binary:
        raise not_binary("attention_mask")
    if cached and not one_block:
        raise _has_hole("attention_mask")
    return bool(full)
