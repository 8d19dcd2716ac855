"""The paper's form of dual_lora together with the linear layer that it adapts, on a GPU.

dual_lora after the layer reads x and y once more and writes a second tensor of y's size. Here the residual is written
first, and cuBLAS adds the layer's product to it: it reads the residual while other tiles are multiplied. Bytes and
model: docs/ops/dual_lora.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from calm_fast._ops.dual_lora.api import _choose
from calm_fast._ops.dual_lora.torch_impl import Folded

_lib = torch.library.Library("calm_fast", "FRAGMENT")


def joins_linear(x: torch.Tensor, rank: int) -> bool:
    """Return True if `dual_lora_linear` runs for x (..., d_in) and rank R: on a GPU, where auto takes Triton."""
    return x.device.type == "cuda" and _choose(x, rank, "auto", False).impl == "triton"


def dual_lora_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, folded: Folded, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dual_lora of y = x weight^T + bias in the paper's form, and zg, which carries no gradient.

        out = x weight^T + (bias + [weight_pos z_pos, weight_neg z_neg] up^T)

    The sum in brackets is rounded once to x's dtype, the whole once more.

    Args:
        x: (..., d_in) float32, bfloat16 or float16; all tensors have its dtype and device, and autocast is off.
        weight (d_out, d_in), bias (d_out,) or None: of the layer.
        folded: from `fold_dual_lora`, in the form "none".
        r_pos: R_pos.
    Returns:
        out (..., d_out), differentiable in every tensor, and zg (..., 2R). Shapes are not checked here.
    Deterministic. No double backward.
    """
    out, zg = torch.ops.calm_fast.dual_lora_triton_linear(
        x.reshape(-1, x.shape[-1]), weight, bias, folded.down, folded.up, r_pos
    )
    return out.view(*x.shape[:-1], out.shape[-1]), zg.view(*x.shape[:-1], zg.shape[-1])


_lib.define(
    "dual_lora_triton_linear(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up, int r_pos)"
    " -> (Tensor out, Tensor zg)"
)


@torch.library.impl(_lib, "dual_lora_triton_linear", "CompositeExplicitAutograd")
def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from calm_fast.kernels.dual_lora import launch  # imports Triton, so only where a kernel is launched

    zg = F.linear(x, down)
    out = launch.launch_dual_lora_residual(zg, up, bias, r_pos)
    return out.addmm_(x, weight.mT), zg  # in place: torch.addmm would copy the residual into its result first


@torch.library.register_fake("calm_fast::dual_lora_triton_linear", lib=_lib)
def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], down.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, down, up, ctx.r_pos = inputs
    ctx.save_for_backward(x, weight, down, up, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dzg_unused: None) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    x, weight, down, up, zg = ctx.saved_tensors
    need_x, need_weight, need_bias, need_down, need_up, _ = ctx.needs_input_grad
    dx = ddown = dup = None
    if need_x or need_down or need_up:
        dzg, mix = torch.ops.calm_fast.dual_lora_triton_bwd(dout @ up, zg, ctx.r_pos)
        # the second product adds to the first: autograd's sum of two would read and write dx once more
        dx = (dzg @ down).addmm_(dout, weight) if need_x else None
        ddown = dzg.mT @ x if need_down else None
        dup = dout.mT @ mix if need_up else None
    return dx, dout.mT @ x if need_weight else None, dout.sum(0) if need_bias else None, ddown, dup, None


torch.library.register_autograd("calm_fast::dual_lora_triton_linear", _backward, setup_context=_setup_context, lib=_lib)
