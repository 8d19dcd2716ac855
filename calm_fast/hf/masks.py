"""Attention masks and positions as intervals: the augmenter tokens lo <= j < hi that each anchor token reads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast.core.checks import bad_value, readable, values_checked


class Visibility(NamedTuple):
    """The interval arguments of one CrossAttention call: lo and hi (B, M) int32 or None, and the causal flag."""

    lo: torch.Tensor | None
    hi: torch.Tensor | None
    causal: bool


CAUSAL = Visibility(None, None, True)


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


def _check_one_block(mask: torch.Tensor) -> None:
    """Raise ValueError unless the real tokens of every row form one block: an interval cannot skip a hole."""
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if bool((starts > 1).any()):
        raise bad_value(
            "ComposedForCausalLM",
            "attention_mask",
            "one block of ones per row (left and/or right padding)",
            "a row with zeros between ones",
        )


def aligned_visibility(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, past: int, new: int
) -> Visibility:
    """Return the intervals for models that read the same tokens: each query sees its document's real keys up to itself.

    attention_mask (B, past + new), 1 = real, one block of ones per row. position_ids (1 or B, new): documents begin
    where positions restart; pass them only if the anchor itself separates documents. A padding token sees nothing.

    Returns CAUSAL if there is no padding and one document. Raises ValueError for a mask of another shape or with
    holes.
    """
    if attention_mask is None:
        # transformers separates documents by positions only without an attention mask
        if position_ids is None or not _is_packed(position_ids):
            return CAUSAL
        lo = _document_starts(position_ids).expand(batch, new)
        hi = torch.arange(1, new + 1, device=lo.device).expand(batch, new)
        return Visibility(lo.to(torch.int32), hi.to(torch.int32), False)

    if attention_mask.ndim != 2 or tuple(attention_mask.shape) != (batch, past + new):
        raise bad_value(
            "ComposedForCausalLM",
            "attention_mask",
            f"of shape ({batch}, {past + new}) (batch, past + new tokens)",
            f"shape {tuple(attention_mask.shape)}",
        )
    mask = attention_mask.bool()
    if new == 1 and past > 0 and readable(mask):
        # A decode step. Where every row is real from its first real token on, the new token reads all of that.
        first = mask.to(torch.uint8).argmax(dim=1)
        starts, counts = first.tolist(), mask.sum(dim=1).tolist()
        if all(start + count == past + 1 for start, count in zip(starts, counts, strict=True)):
            return Visibility(first.to(torch.int32).unsqueeze(1), None, False) if any(starts) else CAUSAL
    if not torch.compiler.is_compiling():
        # Plainly causal calls are the fast ones. Only the first call of a generation looks: later ones would
        # synchronise a GPU at every step.
        if past == 0 and bool(mask.all()):
            return CAUSAL
        if values_checked(mask):
            _check_one_block(mask)
    first = mask.to(torch.int32).argmax(dim=1, keepdim=True)
    ends = torch.arange(past + 1, past + new + 1, device=mask.device)
    hi = torch.where(mask[:, past:], ends, first)
    return Visibility(first.expand(batch, new).to(torch.int32), hi.to(torch.int32), False)
