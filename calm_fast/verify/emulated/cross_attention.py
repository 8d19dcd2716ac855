"""The emulated CUDA kernels of cross_attention: at most 16 queries, head dims that are multiples of 8."""

from __future__ import annotations

from pathlib import Path

import torch

from calm_fast._ops.cross_attention.native import NATIVE_MAX_QUERIES, wide_loads
from calm_fast.core.numerics import Inputs, Values
from calm_fast.verify.emulation import CSRC, SCHEDULES, Schedule, call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSORS = 16  # multiprocessors of the GPU that the launch is planned for


def run(inputs: Inputs, schedule: Schedule = SCHEDULES[0], csrc: Path = CSRC, most_blocks: int = 0) -> Values | None:
    """Return out (B, M, H, D) and, if the case has dlse, lse (B, H, M); None if the kernels do not serve the case.

    most_blocks: number of multiprocessors over which the keys are split; 0 = `PROCESSORS`.
    """
    q, k, v, scale = (inputs[name] for name in ("q", "k", "v", "scale"))
    (b, m, h, d), n, hkv = q.shape, k.shape[1], k.shape[2]
    if m > NATIVE_MAX_QUERIES or d % 8:
        return None
    scale = d**-0.5 if scale is None else scale
    if scale <= 0:  # the op does the same
        q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
    q, k, v = (wide_loads(t) for t in (q, k, v))
    lo, hi = (t if t is None else t.expand(b, m).contiguous() for t in (inputs["lo"], inputs["hi"]))
    out = torch.full((b, m, h, d), float("nan"), dtype=q.dtype)
    lse = torch.full((b, h, m), float("nan"))
    integers = [DTYPES.index(q.dtype), b, m, h, n, hkv, d, bool(inputs["causal"]), most_blocks or PROCESSORS]
    for t in (q, k, v):
        integers += [t.storage_offset(), *t.stride()[:3]]
    if out.numel():
        call(
            "cross_attention", [*(_storage(t) for t in (q, k, v)), lo, hi, out, lse], integers, [scale], schedule, csrc
        )
    return {"out": out, "lse": lse} if inputs["dlse"] is not None else {"out": out}


def _storage(t: torch.Tensor) -> torch.Tensor:
    """Return all elements of the tensor's storage, since strides may reach any of them."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(storage, 0, (storage.nbytes() // t.itemsize,), (1,))
