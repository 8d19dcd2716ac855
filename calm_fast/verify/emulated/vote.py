"""The emulated CUDA kernel of vote."""

from __future__ import annotations

from pathlib import Path

import torch

from calm_fast.core.numerics import Inputs, Values
from calm_fast.verify.emulation import CSRC, SCHEDULES, Schedule, call

_POISON = -77


def run(inputs: Inputs, schedule: Schedule = SCHEDULES[0], csrc: Path = CSRC, most_blocks: int = 0) -> Values | None:
    """Return winner, weight, total, margin and ties (Q,) of a case (see `calm_fast._ops.vote.cases`).

    most_blocks: largest grid, with which a block takes several questions in turn; 0 = as the launch plans it.
    """
    answers, scores, valid = inputs["answers"], inputs["scores"], inputs["valid"]
    q, k = answers.shape
    outputs = {
        name: torch.full((q,), _POISON, dtype=torch.int64 if name in ("winner", "ties") else torch.float64)
        for name in ("winner", "weight", "total", "margin", "ties")
    }
    if q:
        tensors = [
            answers.contiguous(),
            *two_dtypes(None if inputs["rule"] == "count" else scores),
            None if valid is None else valid.contiguous(),
            *outputs.values(),
        ]
        call("vote", tensors, [q, k, inputs["rule"] == "adaptive", most_blocks], [float(inputs["lam"])], schedule, csrc)
    return {name: values.double() for name, values in outputs.items()}


def two_dtypes(scores: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the scores as (float32, None) or (None, float64), the two dtypes that the kernels read.

    The op widens narrower dtypes to float32.
    """
    if scores is None:
        return None, None
    if scores.dtype == torch.float64:
        return None, scores.contiguous()
    return scores.float().contiguous(), None
