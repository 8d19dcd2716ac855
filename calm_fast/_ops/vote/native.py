"""vote by the compiled library (csrc/vote)."""

from __future__ import annotations

import torch


def vote_native(
    answers: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    rule: str,
    lam: float,
    lane: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return winner, weight, total, margin and ties (Q,) as `vote_reference` defines them, bit for bit.

    lane: a SIMD lane of csrc/common/lanes.h, -1 for the best one here; every lane returns the same bits.
    """
    if scores is not None:
        scores = (scores if scores.dtype == torch.float64 else scores.float()).contiguous()  # exact
    valid = None if valid is None else valid.contiguous()
    return torch.ops.calm_fast._vote_native_fwd(answers.contiguous(), scores, valid, rule == "adaptive", lam, lane)
