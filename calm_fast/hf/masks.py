"""What each anchor token may read of the augmenter: attention masks and positions as [lo, hi) intervals."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast.core.checks import readable, values_checked


class Visibility(NamedTuple):
    """Arguments of one cross-attention call: lo, hi (B, M) int32 or None, and the plainly causal flag."""

    lo: torch.Tensor | None
    hi: torch.Tensor | None
    causal: bool


CAUSAL = Visibility(None, None, True)


def _document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Start index of every token's document, (B, M): one begins where the position does not grow by 1."""
    restarts = torch.zeros_like(position_ids, dtype=torch.bool)
    restarts[:, 1:] = position_ids[:, 1:] - position_ids[:, :-1] != 1
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    return torch.where(restarts, index, 0).cummax(dim=1).values


def is_packed(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> bool:
    """Whether positions restart inside a row, read as transformers does: only without an attention mask."""
    if position_ids is None or attention_mask is not None or position_ids.ndim != 2:
        return False
    if torch.compiler.is_compiling():
        return True  # values cannot be read while tracing, and intervals are right in either case
    return bool((position_ids[:, 1:] - position_ids[:, :-1] != 1).any())


def _check_one_block(mask: torch.Tensor) -> None:
    """The real tokens of every row must be one block: an interval cannot skip a hole."""
    starts = mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if bool((starts > 1).any()):
        raise ValueError(
            "attention_mask: expected the ones of each row in one block (left and/or right padding), "
            "got a row with zeros between ones"
        )


def aligned_visibility(
    attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, batch: int, past: int, new: int
) -> Visibility:
    """Intervals for models that read the same tokens: query i sees its document's real keys up to itself.

    attention_mask (B, past + new), 1 = real, one block of ones per row; position_ids (1 or B, new) whose
    restarts begin documents, given only where the anchor itself separates them. A padding token sees nothing.
    Returns plain causality where there is no padding and one document. Raises ValueError for masks of another
    shape or form.
    """
    if attention_mask is None:
        if not is_packed(position_ids, attention_mask):
            return CAUSAL
        lo = _document_starts(position_ids).expand(batch, new)
        hi = torch.arange(1, new + 1, device=lo.device).expand(batch, new)
        return Visibility(lo.to(torch.int32), hi.to(torch.int32), False)

    if attention_mask.ndim != 2 or tuple(attention_mask.shape) != (batch, past + new):
        raise ValueError(
            f"attention_mask: expected shape ({batch}, {past + new}) (batch, past + new tokens), "
            f"got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if new == 1 and past > 0 and readable(mask):
        # a step of a generation: where each row is real from its first one on, the new token reads all of that
        first = mask.to(torch.uint8).argmax(dim=1)
        starts, real = first.tolist(), mask.sum(dim=1).tolist()
        if all(start + count == past + 1 for start, count in zip(starts, real, strict=True)):
            return Visibility(first.to(torch.int32).unsqueeze(1), None, False) if any(starts) else CAUSAL
    if not torch.compiler.is_compiling():
        # the plain causal paths are the fast ones; later steps of a generation do not ask again
        if past == 0 and bool(mask.all()):
            return CAUSAL
        if values_checked(mask):
            _check_one_block(mask)
    first = mask.to(torch.int32).argmax(dim=1, keepdim=True)
    real = mask[:, past:]
    hi = torch.where(real, torch.arange(past + 1, past + new + 1, device=mask.device), first)
    return Visibility(first.expand(batch, new).to(torch.int32), hi.to(torch.int32), False)
