"""One call of an augmenter that reads tokens of its own with a cache: what it reads, and how its cached text moves."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast.core.checks import bad_value, require_async, values_checked
from calm_fast.hf.masks import WHERE, Visibility, check_bound, check_shape, not_binary
from calm_fast.hf.own_text import Move, OwnText, on_device, sources

MASK = "augmenter_attention_mask"


class OwnStep(NamedTuple):
    """One call of an augmenter with tokens of its own.

    ids (B, n), mask (B, width) or None, positions (B, n) or None: what the augmenter reads, tokens that are read again
    included. visibility: the caller's intervals among the slots of the cache. text: the text after the call.
    move: what happens to the cached slots before it, or None.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None
    visibility: Visibility
    text: OwnText
    move: Move | None


def own_step(
    text: OwnText,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor,
    queries: int,
    fixed: str,
) -> OwnStep:
    """Return what an augmenter reads when its text goes on with ids (B, N).

    mask: (B, slots + N), 1 = real, of all slots that the caller has given; None if all are real. positions: (1 or B, N)
    or None. lo, hi: (B, M) or (M,) int32, counted in these slots, M = `queries`. fixed: why the cache of this augmenter
    cannot move its tokens, or "".

    The mask is read where `values_checked` allows it: then padding that all rows share is dropped. Elsewhere nothing
    waits for the device, and the cache grows by N slots.

    Raises ValueError for a mask of another shape or with other values, or of other text than the cache holds, and for
    rows that a recurrent augmenter would have to read again.
    """
    batch, new = ids.shape
    if positions is not None and positions.ndim != 2:
        expected = f"2-dimensional (1 or {batch}, {new}) where a cache is kept"
        raise bad_value(WHERE, "augmenter_position_ids", expected, f"shape {tuple(positions.shape)}")
    for name, bound in (("lo", lo), ("hi", hi)):
        if bound is not None:
            check_bound(name, bound, batch, queries, text.slots + new)
    if mask is None:
        if not text.whole():
            expected = "given in every call with this cache, because its rows have padding"
            raise bad_value(WHERE, MASK, expected, "None. Pass the mask of all slots so far")
        return _append(text, ids, None, positions, Visibility(lo, hi, False))
    check_shape(MASK, mask, batch, text.slots, new)
    real = mask.bool()
    before, added = real[:, : text.slots].sum(1), real[:, text.slots :].sum(1)
    if not values_checked(mask):
        _check_on_device(text, mask, real, before)
        if fixed and text.width > 0:
            require_async((added == new).all(), str(_cannot_move(fixed, "another number in some row")))
        width = text.width + new
        sizes = _Sizes(width, new, False, None)
        return _goon_device(text, ids, real, positions, lo, hi, before, added, sizes)
    sizes = _read_sizes(text, mask, real, before, added)
    if fixed and text.width > 0 and (sizes.shifts is None or any(sizes.shifts)):
        raise _cannot_move(fixed, f"{added.tolist()}")
    if sizes.new == new and sizes.whole and not any(sizes.shifts or ()):
        whole = text.slots == text.width
        bounds = Visibility(lo, hi, False) if whole else _visible(real, before, added, sizes, lo, hi)
        return _append(text, ids, mask if whole else None, positions, bounds)
    return _goon_device(text, ids, real, positions, lo, hi, before, added, sizes)


class _Sizes(NamedTuple):
    """The slots after a call. width: of the cache. new: that the augmenter reads. whole: True if none is padding.

    shifts: for every row, how many slots its cached tokens move to the left; None if it is not known on the host.
    """

    width: int
    new: int
    whole: bool
    shifts: list[int] | None
    counts: list[int] | None = None


def _read_sizes(
    text: OwnText, mask: torch.Tensor, real: torch.Tensor, before: torch.Tensor, added: torch.Tensor
) -> _Sizes:
    """Return the smallest sizes that hold every row. Raises ValueError as `own_step` does."""
    if mask.dtype != torch.bool and not bool((mask == real).all()):
        raise not_binary(MASK)
    cached, fresh = before.tolist(), added.tolist()
    known = text.counts if text.counts is not None else [text.width] * len(cached) if text.real is None else None
    if known is not None and known != cached:
        raise _other_text(text.slots, f"{cached} where the cache holds {known}")
    counts = [a + b for a, b in zip(cached, fresh, strict=True)]
    width, new = max(counts, default=0), max(fresh, default=0)
    shifts = [text.width - width + n for n in fresh]
    return _Sizes(width, new, all(n == width for n in counts), shifts, counts)


def _check_on_device(text: OwnText, mask: torch.Tensor, real: torch.Tensor, before: torch.Tensor) -> None:
    if mask.dtype != torch.bool:
        require_async((mask == real).all(), str(not_binary(MASK)))
    known = text.width if text.real is None else on_device(text.real, before.device).sum(1)
    require_async((before == known).all(), str(_other_text(text.slots, "another number in some row")))


def _other_text(slots: int, got: str) -> ValueError:
    return bad_value(WHERE, MASK, f"1 for as many of the first {slots} slots as earlier calls said are real", got)


def _cannot_move(fixed: str, got: str) -> ValueError:
    expected = f"1 for the same number of new tokens in every row of a step, because {fixed}"
    return bad_value(WHERE, MASK, expected, f"{got}. Run the rows one by one")


def _append(
    text: OwnText,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    visibility: Visibility,
) -> OwnStep:
    """Return the step of rows that all get every new token."""
    batch, new = ids.shape
    kept = _with_positions(text, positions, ids, None, None)
    all_ids = torch.cat([text.ids, ids.to(text.ids.dtype)], 1) if text.width else ids
    counts = None if text.counts is None else [n + new for n in text.counts]
    after = OwnText(all_ids, text.slots + new, None, kept, counts)
    return OwnStep(ids, mask, positions, visibility, after, None)


def _goon_device(
    text: OwnText,
    ids: torch.Tensor,
    real: torch.Tensor,
    positions: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor,
    before: torch.Tensor,
    added: torch.Tensor,
    sizes: _Sizes,
) -> OwnStep:
    """Return the step of rows that get different numbers of tokens."""
    device, width = ids.device, sizes.width
    block = on_device(real[:, text.slots :], device)
    order = None if ids.shape[1] <= 1 else (~block).to(torch.uint8).argsort(dim=1, stable=True)
    source = sources((text.width - width + added)[:, None], width, device)
    # [text, new real tokens, padding] -> the last `width` of every row's text
    joined = torch.cat([text.ids, (ids if order is None else ids.gather(1, order)).to(text.ids.dtype)], 1)
    joined_positions = _with_positions(text, positions, ids, order, before)
    pads = on_device((width - before - added)[:, None], device)
    index = torch.arange(width, device=device)
    after = OwnText(
        joined.gather(1, source),
        text.slots + ids.shape[1],
        None if sizes.whole else index >= pads,
        None if joined_positions is None else joined_positions.gather(1, source),
        sizes.counts,
    )
    kept = width - sizes.new
    move = None
    if text.width > 0 and (sizes.shifts is None or any(sizes.shifts)):
        same = sizes.shifts is not None and len(set(sizes.shifts)) == 1 and sizes.shifts[0] >= 0
        move = Move(sizes.shifts[0], kept) if same and sizes.shifts else Move(0, kept, source[:, :kept])
    read = (index - pads).clamp(min=0) if after.positions is None else after.positions
    mask = None if after.real is None else after.real.long()
    bounds = _visible(real, before, added, sizes, lo, hi)
    return OwnStep(after.ids[:, kept:], mask, read[:, kept:], bounds, after, move)


def _with_positions(
    text: OwnText,
    positions: torch.Tensor | None,
    ids: torch.Tensor,
    order: torch.Tensor | None,
    before: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return the positions of the text and of the new tokens, (B, T + N), or None if they count the real tokens.

    order: (B, N), that sorts the new real tokens to the front. before: (B,), real tokens of the text, None for all.
    """
    if text.positions is None and positions is None:
        return None
    (batch, new), device = ids.shape, ids.device
    first = torch.full((batch, 1), text.width, device=device) if before is None else on_device(before[:, None], device)
    old, fresh = text.positions, positions
    if old is None:
        old = (torch.arange(text.width, device=device) - (text.width - first)).clamp(min=0)
    if fresh is None:
        fresh = first + torch.arange(new, device=device)
    else:
        fresh = on_device(fresh, device).expand(batch, new)
        fresh = fresh if order is None else fresh.gather(1, order)
    return torch.cat([old, fresh.to(old.dtype)], 1)


def _visible(
    real: torch.Tensor,
    before: torch.Tensor,
    added: torch.Tensor,
    sizes: _Sizes,
    lo: torch.Tensor | None,
    hi: torch.Tensor,
) -> Visibility:
    """Return intervals that count the caller's slots as intervals among the slots of the cache."""
    pads = (sizes.width - before - added)[:, None]
    slots = torch.nn.functional.pad(real.cumsum(1), (1, 0)) + pads
    slots = on_device(slots.to(torch.int32), hi.device)
    batch, queries = len(slots), hi.shape[-1]

    def among_the_real(bound: torch.Tensor) -> torch.Tensor:
        index = on_device(bound, hi.device).expand(batch, queries).clamp(0, real.shape[1])
        return slots.gather(1, index.long())

    if lo is None:
        begin = None if sizes.whole else slots[:, :1].expand(batch, queries)
    else:
        begin = among_the_real(lo)
    return Visibility(begin, among_the_real(hi), False)
