"""The emulated CUDA kernel of maj_at_k with method "resample"; method "exact" has no kernel."""

from __future__ import annotations

from pathlib import Path

import torch

from calm_fast._ops.maj_at_k.api import curve
from calm_fast.core.numerics import Inputs, Values
from calm_fast.verify.emulated.vote import two_dtypes
from calm_fast.verify.emulation import CSRC, SCHEDULES, Schedule, call

_MOST_SIZES = 64  # csrc/maj_at_k/maj_at_k.cuh


def run(inputs: Inputs, schedule: Schedule = SCHEDULES[0], csrc: Path = CSRC, most_blocks: int = 0) -> Values | None:
    """Return accuracy and stderr (len(ks),) of a case; None with method "exact".

    most_blocks: largest grid, with which a block takes several questions in turn; 0 = as the launch plans it.
    """
    if inputs["method"] == "exact":
        return None
    answers, scores, valid = inputs["answers"], inputs["scores"], inputs["valid"]
    (q, k), ks = answers.shape, inputs["ks"]
    if not answers.numel():
        return curve(torch.zeros(q, len(ks), dtype=torch.float64))._asdict()
    credit = torch.full((q, len(ks)), float("nan"), dtype=torch.float64)
    columns = torch.tensor(sorted(range(len(ks)), key=lambda i: ks[i]))
    sizes = torch.tensor(ks)[columns].clamp(max=k)
    integers = [q, k, len(ks), inputs["resamples"], inputs["rule"] == "adaptive"]
    integers += [(inputs["seed"] + 2**63) % 2**64 - 2**63, most_blocks]
    tensors = [
        answers.contiguous(),
        inputs["correct"].contiguous(),
        *two_dtypes(None if inputs["rule"] == "count" else scores),
        None if valid is None else valid.contiguous(),
    ]
    for own, at in zip(sizes.split(_MOST_SIZES), columns.split(_MOST_SIZES), strict=True):
        call("maj_at_k", [*tensors, own, at, credit], integers, [float(inputs["lam"])], schedule, csrc)
    return curve(credit)._asdict()
