"""Registered torch ops of linear_nce, which torch.compile, export, FSDP and opcheck see.

`linear_nce_<engine>_fwd`, `_bwd` and `_step` for the engines torch, triton and native have the same schemas, fakes and
autograd formulas. `linear_nce_scale_gradient` is the backward of every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calm_fast._ops.linear_nce.native import linear_nce_native_bwd, linear_nce_native_fwd, linear_nce_native_step
from calm_fast._ops.linear_nce.torch_impl import linear_nce_torch_bwd, linear_nce_torch_fwd, linear_nce_torch_step
from calm_fast._ops.linear_nce.triton_impl import linear_nce_triton_bwd, linear_nce_triton_fwd, linear_nce_triton_step

Grads = tuple[torch.Tensor | None, ...]

_ARGUMENTS = (
    "(Tensor student, Tensor nat, Tensor neg, Tensor weight, Tensor? bias, Tensor targets, Tensor seq_ids,"
    " float alpha, float temperature, float offset, float? softcap, int ignore_index)"
)
_FWD = _ARGUMENTS + " -> (Tensor loss, Tensor norms, Tensor coefficients)"
_STEP = _ARGUMENTS + " -> (Tensor loss, Tensor gradient)"
_BWD = (
    "(Tensor dloss, Tensor student, Tensor nat, Tensor weight, Tensor? bias, Tensor targets, Tensor norms,"
    " Tensor coefficients, float temperature, float? softcap, int ignore_index, bool[] needs)"
    " -> (Tensor dstudent, Tensor dweight, Tensor dbias)"
)
# implemented for every device in Python; an engine itself refuses a device it has no code for
_KEY = "CompositeExplicitAutograd"


def linear_nce_scale_gradient(dloss: torch.Tensor, gradient: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return dloss () times gradient (T, d) in student's dtype."""
    # scaled before it is rounded, so that the factor of a loss scaler counts
    return (dloss * gradient).to(student.dtype)


_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define("linear_nce_torch_fwd" + _FWD)
_lib.define("linear_nce_torch_bwd" + _BWD)
_lib.define("linear_nce_torch_step" + _STEP)
_lib.define("linear_nce_triton_fwd" + _FWD)
_lib.define("linear_nce_triton_bwd" + _BWD)
_lib.define("linear_nce_triton_step" + _STEP)
_lib.define("linear_nce_native_fwd" + _FWD)
_lib.define("linear_nce_native_bwd" + _BWD)
_lib.define("linear_nce_native_step" + _STEP)
_lib.define("linear_nce_scale_gradient(Tensor dloss, Tensor gradient, Tensor student) -> Tensor dstudent")
_lib.impl("linear_nce_torch_fwd", linear_nce_torch_fwd, _KEY)
_lib.impl("linear_nce_torch_bwd", linear_nce_torch_bwd, _KEY)
_lib.impl("linear_nce_torch_step", linear_nce_torch_step, _KEY)
_lib.impl("linear_nce_triton_fwd", linear_nce_triton_fwd, _KEY)
_lib.impl("linear_nce_triton_bwd", linear_nce_triton_bwd, _KEY)
_lib.impl("linear_nce_triton_step", linear_nce_triton_step, _KEY)
_lib.impl("linear_nce_native_fwd", linear_nce_native_fwd, _KEY)
_lib.impl("linear_nce_native_bwd", linear_nce_native_bwd, _KEY)
_lib.impl("linear_nce_native_step", linear_nce_native_step, _KEY)
_lib.impl("linear_nce_scale_gradient", linear_nce_scale_gradient, _KEY)


def forward_op(impl: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the registered forward op of the engine `impl`: "torch", "triton" or "native"."""
    if impl == "native":
        return torch.ops.calm_fast.linear_nce_native_fwd
    if impl == "triton":
        return torch.ops.calm_fast.linear_nce_triton_fwd
    return torch.ops.calm_fast.linear_nce_torch_fwd


def step_op(impl: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the registered op of the engine `impl` that computes the loss and the student's gradient in one pass."""
    if impl == "native":
        return torch.ops.calm_fast.linear_nce_native_step
    if impl == "triton":
        return torch.ops.calm_fast.linear_nce_triton_step
    return torch.ops.calm_fast.linear_nce_torch_step


# ---- fakes ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("calm_fast::linear_nce_torch_fwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_nce_triton_fwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_nce_native_fwd", lib=_lib)
def _fwd_fake(student: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    compute, tokens = torch.promote_types(student.dtype, torch.float32), student.shape[0]
    return tuple(student.new_empty(shape, dtype=compute) for shape in ((), (5, tokens), (2, tokens)))


@torch.library.register_fake("calm_fast::linear_nce_torch_bwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_nce_triton_bwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_nce_native_bwd", lib=_lib)
def _bwd_fake(
    dloss: torch.Tensor, student: torch.Tensor, nat: torch.Tensor, weight: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    needs = options[-1]
    shapes = (student.shape, weight.shape, (weight.shape[0],))
    return tuple(student.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


@torch.library.register_fake("calm_fast::linear_nce_torch_step", lib=_lib)
@torch.library.register_fake("calm_fast::linear_nce_triton_step", lib=_lib)
@torch.library.register_fake("calm_fast::linear_nce_native_step", lib=_lib)
def _step_fake(student: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    compute = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty((), dtype=compute), student.new_empty(student.shape, dtype=compute)


@torch.library.register_fake("calm_fast::linear_nce_scale_gradient", lib=_lib)
def _scale_gradient_fake(dloss: torch.Tensor, gradient: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(gradient.shape, dtype=student.dtype)


# ---- autograd -------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    student, nat, _, weight, bias, targets, _, _, ctx.temperature, _, ctx.softcap, ctx.ignore_index = inputs
    ctx.save_for_backward(student, nat, weight, bias, targets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, op: Any, dloss: torch.Tensor | None) -> Grads:
    """Return the gradients of the forward op's twelve arguments; `op` is the backward op of the same engine."""
    if dloss is None:
        return (None,) * 12
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    grads = op(dloss, *ctx.saved_tensors, ctx.temperature, ctx.softcap, ctx.ignore_index, needs)
    dstudent, dweight, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dstudent, None, None, dweight, dbias, *(None,) * 7


def _torch_backward(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> Grads:
    return _backward(ctx, torch.ops.calm_fast.linear_nce_torch_bwd, dloss)


def _triton_backward(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> Grads:
    return _backward(ctx, torch.ops.calm_fast.linear_nce_triton_bwd, dloss)


def _native_backward(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> Grads:
    return _backward(ctx, torch.ops.calm_fast.linear_nce_native_bwd, dloss)


def _step_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _step_backward(ctx: Any, dloss: torch.Tensor | None, *_: Any) -> Grads:
    if dloss is None:
        return (None,) * 12
    return torch.ops.calm_fast.linear_nce_scale_gradient(dloss, *ctx.saved_tensors), *(None,) * 11


def _double_backward(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise RuntimeError(
        "linear_nce: impl='torch', 'triton' and 'native' have no double backward. Use impl='reference' for it."
    )


_register = torch.library.register_autograd
_register("calm_fast::linear_nce_torch_fwd", _torch_backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::linear_nce_triton_fwd", _triton_backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::linear_nce_native_fwd", _native_backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::linear_nce_torch_step", _step_backward, setup_context=_step_setup_context, lib=_lib)
_register("calm_fast::linear_nce_triton_step", _step_backward, setup_context=_step_setup_context, lib=_lib)
_register("calm_fast::linear_nce_native_step", _step_backward, setup_context=_step_setup_context, lib=_lib)
_register("calm_fast::linear_nce_torch_bwd", _double_backward, lib=_lib)
_register("calm_fast::linear_nce_triton_bwd", _double_backward, lib=_lib)
_register("calm_fast::linear_nce_native_bwd", _double_backward, lib=_lib)
_register("calm_fast::linear_nce_scale_gradient", _double_backward, lib=_lib)
