"""Registered torch ops of linear_logprob, which torch.compile, export, FSDP and opcheck see.

`linear_logprob_<engine>_fwd` and `linear_logprob_<engine>_bwd` for the engines torch, triton and native have the same
schemas, fakes and autograd formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calm_fast._ops.linear_logprob.native import linear_logprob_native_bwd, linear_logprob_native_fwd
from calm_fast._ops.linear_logprob.torch_impl import linear_logprob_torch_bwd, linear_logprob_torch_fwd
from calm_fast._ops.linear_logprob.triton_impl import linear_logprob_triton_bwd, linear_logprob_triton_fwd
from calm_fast._ops.vocabulary.decide import at_once

Grads = tuple[torch.Tensor | None, ...]

_FWD = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature, float? softcap, int ignore_index,"
    " bool want_entropy, bool want_rank, bool keep_logits=False)"
    " -> (Tensor logprob, Tensor entropy, Tensor rank, Tensor norms, Tensor logits)"
)
_BWD = (
    "(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor norms,"
    " Tensor entropy, Tensor logits, float temperature, float? softcap, int ignore_index, bool[] needs)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)
# implemented for every device in Python; an engine itself refuses a device it has no code for
_KEY = "CompositeExplicitAutograd"

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define("linear_logprob_torch_fwd" + _FWD)
_lib.define("linear_logprob_torch_bwd" + _BWD)
_lib.define("linear_logprob_triton_fwd" + _FWD)
_lib.define("linear_logprob_triton_bwd" + _BWD)
_lib.define("linear_logprob_native_fwd" + _FWD)
_lib.define("linear_logprob_native_bwd" + _BWD)
_lib.impl("linear_logprob_torch_fwd", linear_logprob_torch_fwd, _KEY)
_lib.impl("linear_logprob_torch_bwd", linear_logprob_torch_bwd, _KEY)
_lib.impl("linear_logprob_triton_fwd", linear_logprob_triton_fwd, _KEY)
_lib.impl("linear_logprob_triton_bwd", linear_logprob_triton_bwd, _KEY)
_lib.impl("linear_logprob_native_fwd", linear_logprob_native_fwd, _KEY)
_lib.impl("linear_logprob_native_bwd", linear_logprob_native_bwd, _KEY)


def forward_op(impl: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the registered forward op of the engine `impl`: "torch", "triton" or "native"."""
    if impl == "native":
        return torch.ops.calm_fast.linear_logprob_native_fwd
    if impl == "triton":
        return torch.ops.calm_fast.linear_logprob_triton_fwd
    return torch.ops.calm_fast.linear_logprob_torch_fwd


@torch.library.register_fake("calm_fast::linear_logprob_torch_fwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_logprob_triton_fwd", lib=_lib)
def _fwd_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    want_entropy: bool,
    want_rank: bool,
    keep_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    compute, tokens = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    logprob, norms = hidden.new_empty(tokens, dtype=compute), hidden.new_empty((2, tokens), dtype=compute)
    entropy = hidden.new_empty(tokens if want_entropy else 0, dtype=compute)
    return logprob, entropy, targets.new_empty(tokens if want_rank else 0), norms, hidden.new_empty(0)


@torch.library.register_fake("calm_fast::linear_logprob_native_fwd", lib=_lib)
def _native_fwd_fake(
    hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, keep_logits: bool = False
) -> tuple[torch.Tensor, ...]:
    *results, none = _fwd_fake(hidden, weight, *rest)
    keep_logits = rest[7] if len(rest) == 8 else keep_logits
    kept = keep_logits and at_once("linear_logprob", hidden, weight, True)
    return *results, hidden.new_empty((hidden.shape[0], weight.shape[0])) if kept else none


@torch.library.register_fake("calm_fast::linear_logprob_torch_bwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_logprob_triton_bwd", lib=_lib)
@torch.library.register_fake("calm_fast::linear_logprob_native_bwd", lib=_lib)
def _bwd_fake(
    dlogprob: torch.Tensor, dentropy: torch.Tensor | None, hidden: torch.Tensor, weight: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    needs = options[-1]
    shapes = (hidden.shape, weight.shape, (weight.shape[0],))
    return tuple(hidden.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, targets, ctx.temperature, ctx.softcap, ctx.ignore_index, want_entropy, *_ = inputs
    logprob, entropy, rank, norms, logits = output
    ctx.save_for_backward(hidden, weight, bias, targets, norms, entropy, logits)
    ctx.mark_non_differentiable(rank, norms, logits, *(() if want_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, op: Any, dlogprob: torch.Tensor | None, dentropy: torch.Tensor | None) -> Grads:
    """Return the gradients of the forward op's ten arguments; `op` is the backward op of the same engine."""
    if dlogprob is None and dentropy is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dlogprob = torch.zeros_like(saved[4][0]) if dlogprob is None else dlogprob
    needs = [ctx.needs_input_grad[i] for i in range(3)]
    grads = op(dlogprob, dentropy, *saved, ctx.temperature, ctx.softcap, ctx.ignore_index, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7


def _torch_backward(ctx: Any, dlogprob: torch.Tensor | None, dentropy: torch.Tensor | None, *_: Any) -> Grads:
    return _backward(ctx, torch.ops.calm_fast.linear_logprob_torch_bwd, dlogprob, dentropy)


def _triton_backward(ctx: Any, dlogprob: torch.Tensor | None, dentropy: torch.Tensor | None, *_: Any) -> Grads:
    return _backward(ctx, torch.ops.calm_fast.linear_logprob_triton_bwd, dlogprob, dentropy)


def _native_backward(ctx: Any, dlogprob: torch.Tensor | None, dentropy: torch.Tensor | None, *_: Any) -> Grads:
    return _backward(ctx, torch.ops.calm_fast.linear_logprob_native_bwd, dlogprob, dentropy)


def _double_backward(ctx: Any, *grads: torch.Tensor | None) -> None:
    raise RuntimeError(
        "linear_logprob: impl='torch', 'triton' and 'native' have no double backward. Use impl='reference' for it."
    )


_register = torch.library.register_autograd
_register("calm_fast::linear_logprob_torch_fwd", _torch_backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::linear_logprob_triton_fwd", _triton_backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::linear_logprob_native_fwd", _native_backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::linear_logprob_torch_bwd", _double_backward, lib=_lib)
_register("calm_fast::linear_logprob_triton_bwd", _double_backward, lib=_lib)
_register("calm_fast::linear_logprob_native_bwd", _double_backward, lib=_lib)
