"""The emulated CUDA kernel of vote."""

from __future__ import annotations

from pathlib import Path

import torch

from calm_fast.verify.emulation import CSRC, SCHEDULES, Schedule, call
from calm_fast.verify.numerics import Inputs, Values

_POISON = -77


def run(inputs: Inputs, schedule: Schedule = SCHEDULES[0], csrc: Path = CSRC, most_blocks: int = 0) -> Values | None:
    """winner, weight, total, margin, ties (Q,) of a case's inputs (see `calm_fast.verify.cases.vote`).

    most_blocks: the largest grid, so that a block takes several questions in turn; 0 = as planned.
    """
    answers, scores, valid = inputs["answers"], inputs["scores"], inputs["valid"]
    scores = None if inputs["rule"] == "count" else scores
    q, k = answers.shape
    outputs = {
        name: torch.full((q,), _POISON, dtype=torch.int64 if name in ("winner", "ties") else torch.float64)
        for name in ("winner", "weight", "total", "margin", "ties")
    }
    if q:
        if scores is not None:  # the kernel reads two dtypes; the op widens the others
            scores = (scores if scores.dtype in (torch.float32, torch.float64) else scores.float()).contiguous()
        tensors = [
            answers.contiguous(),
            *(scores if scores is not None and scores.dtype == d else None for d in (torch.float32, torch.float64)),
            None if valid is None else valid.contiguous(),
            *outputs.values(),
        ]
        call("vote", tensors, [q, k, inputs["rule"] == "adaptive", most_blocks], [float(inputs["lam"])], schedule, csrc)
    return {name: values.double() for name, values in outputs.items()}
