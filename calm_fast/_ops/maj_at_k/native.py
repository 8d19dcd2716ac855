"""maj_at_k by the compiled library (csrc/maj_at_k)."""

from __future__ import annotations

import torch


def maj_at_k_native(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    ks: list[int],
    method: str,
    resamples: int,
    rule: str,
    lam: float,
    seed: int,
    lane: int = -1,
) -> torch.Tensor:
    """Return the credit (Q, len(ks)) float64 that `maj_at_k_reference` defines.

    lane: a SIMD lane of csrc/common/lanes.h, -1 for the best one here; every lane returns the same bits.
    """
    answers, correct = answers.contiguous(), correct.contiguous()
    valid = None if valid is None else valid.contiguous()
    if method == "exact":
        return torch.ops.calm_fast._maj_at_k_native_exact(answers, correct, valid, ks, lane)
    if scores is not None:
        scores = (scores if scores.dtype == torch.float64 else scores.float()).contiguous()  # exact
    return torch.ops.calm_fast._maj_at_k_native_resample(
        answers, correct, scores, valid, ks, resamples, rule == "adaptive", lam, seed, lane
    )
