"""op_name: the public function, the choice of implementation, the registered torch ops."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast._ops.op_name.reference import op_name_reference
from calm_fast._ops.op_name.torch_impl import op_name_torch
from calm_fast.core.checks import check_finite_number, check_tensor
from calm_fast.core.dispatch import Decision, check_impl, refuse, transform_decision, triton_obstacle

_OP = "op_name"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def op_name(x: torch.Tensor, *, scale: float = 1.0, impl: str = "auto") -> torch.Tensor:
    """Multiply a tensor by a number.

        out = scale * x

    Args:
        x: (T, D) float32, bfloat16 or float16 (float64 with impl "reference" or "torch").
        scale: finite.
        impl: "auto", "reference", "torch" or "triton"; an explicit choice is honoured or refused.
    Returns:
        out (T, D), x's dtype; differentiable in x.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic. The product is computed in float32 and rounded once.
    """
    decision = decide(x, scale=scale, impl=impl)
    if decision.impl == "reference":
        return op_name_reference(x, float(scale))
    if decision.impl == "torch":
        return op_name_torch(x, float(scale))
    out: torch.Tensor = torch.ops.calm_fast.op_name_triton_fwd(x, float(scale))
    return out


def decide(x: torch.Tensor, *, scale: float = 1.0, impl: str = "auto") -> Decision:
    """Return the implementation that the same call of `op_name` runs, and why; raises what that call would raise.

    auto: Triton on a GPU, torch elsewhere and for float64.
    """
    check_impl(_OP, impl)
    check_tensor(_OP, "x", x, "(T, D)", _DTYPES)
    check_finite_number(_OP, "scale", scale)
    if impl in ("reference", "torch"):
        return Decision(_OP, impl, "asked for")
    if decision := transform_decision(_OP, impl):
        return decision
    if impl == "native":
        raise refuse(_OP, impl, "the compiled library has no op_name")
    obstacle = "the kernel computes in float32, x is float64" if x.dtype == torch.float64 else triton_obstacle(x.device)
    if impl == "triton":
        if obstacle:
            raise refuse(_OP, impl, obstacle)
        return Decision(_OP, impl, "asked for")
    if x.device.type == "cpu" or obstacle:
        return Decision(_OP, "torch", obstacle or "one elementwise product")
    return Decision(_OP, "triton", "one launch")


# ---- the registered ops: what torch.compile, export, FSDP and opcheck see -------------------------------------------

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define("op_name_triton_fwd(Tensor x, float scale) -> Tensor")


@torch.library.impl(_lib, "op_name_triton_fwd", "CompositeExplicitAutograd")
def _fwd(x: torch.Tensor, scale: float) -> torch.Tensor:
    # imports Triton: only where a kernel is launched
    from calm_fast.kernels.op_name.launch import launch_op_name_fwd

    return launch_op_name_fwd(x, scale)


@torch.library.register_fake("calm_fast::op_name_triton_fwd", lib=_lib)
def _fwd_fake(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.scale = inputs


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, None]:
    # dx = scale * dout: the same kernel
    return torch.ops.calm_fast.op_name_triton_fwd(dout, ctx.scale), None


torch.library.register_autograd("calm_fast::op_name_triton_fwd", _backward, setup_context=_setup_context, lib=_lib)
