"""The emulated CUDA kernels of dual_lora: at most 64 tokens. torch computes the products before them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from calm_fast._ops.dual_lora.native import CUDA_MAX_FUSED, CUDA_MAX_TOKENS
from calm_fast._ops.dual_lora.torch_impl import fold_dual_lora, project
from calm_fast.core.numerics import Inputs, Values
from calm_fast.verify.emulation import CSRC, SCHEDULES, Schedule, call

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSORS = 16  # multiprocessors of the GPU that the launch is planned for


def run(inputs: Inputs, schedule: Schedule = SCHEDULES[0], csrc: Path = CSRC, most_blocks: int = 0) -> Values | None:
    """Return out (..., d_out) of a case; None for more tokens than the kernels take.

    most_blocks: number of multiprocessors that share the columns of the output; 0 = `PROCESSORS`.
    """
    x, y, scaling = inputs["x"], inputs["y"], inputs["scaling"]
    a_pos, b_pos, a_neg, b_neg, w_q, w_k = (inputs[name] for name in ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k"))
    value = [inputs[name] for name in ("value0", "value1") if name in inputs]
    pair = scaling if isinstance(scaling, tuple) else (scaling, scaling)
    folded = fold_dual_lora(a_pos, b_pos, a_neg, b_neg, w_q, w_k, value, pair, inputs["activation"])
    flat_y = y.reshape(-1, y.shape[-1]).contiguous()
    tokens, n = flat_y.shape
    if tokens > CUDA_MAX_TOKENS:
        return None
    out = torch.full_like(flat_y, float("nan"))
    if not tokens:
        return {"out": out.view(y.shape)}
    zg = project(x, folded).reshape(tokens, -1).contiguous()
    up, r_pos, r = folded.up.contiguous(), a_pos.shape[0], zg.shape[1] // 2
    integers = [DTYPES.index(y.dtype), tokens, r, r_pos]
    if folded.c1 is None or folded.c2 is None:
        tensors = [zg, None, None, up, flat_y, out]
        call("dual_lora", tensors, [*integers, 0, n, most_blocks or PROCESSORS], (), schedule, csrc)
        return {"out": out.view(y.shape)}
    u, hidden = F.linear(flat_y, folded.c1), folded.c1.shape[0]
    integers += [hidden, n, most_blocks or PROCESSORS]
    if hidden <= CUDA_MAX_FUSED:
        call("dual_lora", [zg, u, up, folded.c2.contiguous(), flat_y, out], integers, (), schedule, csrc)
        return {"out": out.view(y.shape)}
    mix = torch.full_like(u, float("nan"))
    call("dual_lora", [zg, u, up, None, None, mix], integers, (), schedule, csrc)
    return {"out": torch.addmm(flat_y, mix, folded.c2.mT).view(y.shape)}
