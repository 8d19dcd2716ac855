"""dual_lora in the compiled library: its limits, packed factors and the registered op around its functions."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast._ops.dual_lora.torch_impl import Folded, dual_lora_backward_torch, project
from calm_fast._ops.packed_linear.api import Packed, can_pack, linear, pack
from calm_fast.core import native_library
from calm_fast.core.dispatch import autograd_records, refuse

_OP = "dual_lora"
# csrc/dual_lora/dual_lora.cuh: tokens of a call, m for one fused launch, R = R_pos + R_neg
CUDA_MAX_TOKENS, CUDA_MAX_FUSED, CUDA_MAX_RANK = 64, 512, 1024


def native_obstacle(y: torch.Tensor, rank: int) -> str | None:
    """Return why the compiled library cannot compute dual_lora for y (..., d_out) and rank R; None where it can."""
    if y.dtype == torch.float64:
        return "the compiled code computes in float32, x is float64"
    if y.device.type == "cuda":
        if y.numel() > CUDA_MAX_TOKENS * y.shape[-1]:  # a comparison that torch.compile can hold as a guard
            return f"the CUDA kernels decode, at most {CUDA_MAX_TOKENS} tokens"
        if rank > CUDA_MAX_RANK:
            return f"the CUDA kernels take R_pos + R_neg up to {CUDA_MAX_RANK}, not {rank}"
    return native_library.obstacle(_OP, y.device.type)


def pack_folded(folded: Folded) -> Folded:
    """Return `folded` with packed copies of its factors where the compiled library reads them faster, else as it is.

    For factors that are kept: packing costs about what it saves on 200 tokens.
    """
    if native_library.obstacle(_OP):
        return folded
    down = _panels(folded.down)
    if down is None:
        return folded
    c1 = None if folded.c1 is None else _panels(folded.c1)
    return folded._replace(
        packed_down=down, packed_c1=c1, packed_last=_panels(folded.up if folded.c2 is None else folded.c2)
    )


def _panels(weight: torch.Tensor) -> torch.Tensor | None:
    packed = pack(weight)
    return packed.panels if isinstance(packed, Packed) else None


def project_folded(x: torch.Tensor, folded: Folded, lora_x: torch.Tensor | None = None) -> torch.Tensor:
    """Return `project(x, folded, lora_x)`; the compiled library multiplies where `down` is packed.

    torch multiplies where autograd records the product, and where the LoRAs read another tensor than x.
    """
    packed = folded.packed_down
    if packed is None or lora_x is not None or not can_pack(x) or autograd_records(folded.down, folded.up):
        return project(x, folded, lora_x)
    return linear(x, Packed(packed, folded.down.shape[0]))


def dual_lora_native(zg: torch.Tensor, y: torch.Tensor, folded: Folded, r_pos: int) -> torch.Tensor:
    """Return out (T, d_out) from zg (T, 2R) and y (T, d_out); same meaning as `dual_lora_torch`."""
    return torch.ops.calm_fast.dual_lora_native_fwd(
        zg, y, folded.up, folded.c1, folded.c2, folded.packed_c1, folded.packed_last, r_pos
    )


# ---- the registered op -----------------------------------------------------------------------------------------------
# It wraps the library's functions, which torch cannot see into. T tokens, R = r_pos + r_neg. packed_last: the panels of
# the last factor, up (d_out, R) in the form "none", c2 (d_out, m) in the form "gelu".

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define(
    "dual_lora_native_fwd(Tensor zg, Tensor y, Tensor up, Tensor? c1, Tensor? c2, Tensor? packed_c1,"
    " Tensor? packed_last, int r_pos) -> Tensor"
)


def _library(device_type: str) -> Any:
    """Return the namespace of the compiled functions, or raise the reason why the library is not here.

    A graph compiled by one process may run in another one, which has not loaded the library yet.
    """
    if why := native_library.obstacle(_OP, device_type):
        raise refuse(_OP, "native", why)
    return torch.ops.calm_fast


@torch.library.impl(_lib, "dual_lora_native_fwd", "CPU")
def _native_fwd_cpu(
    zg: torch.Tensor,
    y: torch.Tensor,
    up: torch.Tensor,
    c1: torch.Tensor | None,
    c2: torch.Tensor | None,
    packed_c1: torch.Tensor | None,
    packed_last: torch.Tensor | None,
    r_pos: int,
) -> torch.Tensor:
    library, zg, y = _library("cpu"), zg.contiguous(), y.contiguous()
    if c1 is None or c2 is None:
        mix, last = library._dual_lora_native_weigh(zg, r_pos), up
    else:
        u = y @ c1.mT if packed_c1 is None else library._packed_linear_native_fwd(y, packed_c1, c1.shape[0])
        mix, last = library._dual_lora_native_mix(zg, u, up.contiguous(), r_pos), c2
    if packed_last is None:
        return torch.addmm(y, mix, last.mT)
    return library._packed_linear_native_fwd(mix, packed_last, last.shape[0], y)


@torch.library.impl(_lib, "dual_lora_native_fwd", "CUDA")
def _native_fwd_cuda(
    zg: torch.Tensor,
    y: torch.Tensor,
    up: torch.Tensor,
    c1: torch.Tensor | None,
    c2: torch.Tensor | None,
    packed_c1: torch.Tensor | None,
    packed_last: torch.Tensor | None,
    r_pos: int,
) -> torch.Tensor:
    library, zg, y, up = _library("cuda"), zg.contiguous(), y.contiguous(), up.contiguous()
    if c1 is None or c2 is None:
        return library._dual_lora_native_update(zg, y, up, None, None, r_pos)
    u = y @ c1.mT
    if c1.shape[0] <= CUDA_MAX_FUSED:
        return library._dual_lora_native_update(zg, y, up, u, c2.contiguous(), r_pos)
    return torch.addmm(y, library._dual_lora_native_mix(zg, u, up, r_pos), c2.mT)


@torch.library.register_fake("calm_fast::dual_lora_native_fwd", lib=_lib)
def _native_fwd_fake(
    zg: torch.Tensor,
    y: torch.Tensor,
    up: torch.Tensor,
    c1: torch.Tensor | None,
    c2: torch.Tensor | None,
    packed_c1: torch.Tensor | None,
    packed_last: torch.Tensor | None,
    r_pos: int,
) -> torch.Tensor:
    return y.new_empty(y.shape)


def _native_setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    zg, y, up, c1, c2, _, _, ctx.r_pos = inputs
    ctx.save_for_backward(zg, y, up, c1, c2)


def _native_backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    zg, y, up, c1, c2 = ctx.saved_tensors
    # `down` is not among the op's inputs, and no gradient of the others needs it
    folded = Folded(down=zg, up=up, c1=c1, c2=c2)
    return *dual_lora_backward_torch(dout, zg, y, folded, ctx.r_pos), None, None, None


torch.library.register_autograd(
    "calm_fast::dual_lora_native_fwd", _native_backward, setup_context=_native_setup_context, lib=_lib
)
