"""cross_attention's registered torch ops: what torch.compile, export, FSDP and opcheck see.

Forward and backward are ops of their own, joined by `register_autograd`. The name says who computes:

    cross_attention_triton_fwd, _bwd    Triton, on a GPU
    cross_attention_native_decode       the compiled library, at most 16 queries, on a CPU and on a GPU
    cross_attention_native_fwd, _bwd    the compiled library, any number of queries, on a CPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calm_fast._ops.cross_attention import native
from calm_fast._ops.cross_attention.native import Pair, Triple
from calm_fast._ops.cross_attention.torch_impl import cross_attention_torch_bwd

_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, bool causal, float scale) -> (Tensor out, Tensor lse)"
)
_BACKWARD = (
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? lo, Tensor? hi,"
    " bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)"
)
_LIBRARY = torch.library.Library("calm_fast", "FRAGMENT")
_LIBRARY.define(f"cross_attention_triton_fwd{_FORWARD}")
_LIBRARY.define(f"cross_attention_triton_bwd{_BACKWARD}")
_LIBRARY.define(f"cross_attention_native_decode{_FORWARD}")
_LIBRARY.define(f"cross_attention_native_fwd{_FORWARD}")
_LIBRARY.define(f"cross_attention_native_bwd{_BACKWARD}")


# ---- kernels --------------------------------------------------------------------------------------------------------


def _triton_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> Pair:
    from calm_fast.kernels.cross_attention import launch  # imports Triton: only where it is used

    return launch.launch_cross_attention_fwd(q, k, v, lo, hi, causal, scale)


def _triton_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> Triple:
    from calm_fast.kernels.cross_attention import launch_bwd

    return launch_bwd.launch_cross_attention_bwd(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale)


_LIBRARY.impl("cross_attention_triton_fwd", _triton_fwd, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_attention_triton_bwd", _triton_bwd, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_attention_native_decode", native.decode, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_attention_native_fwd", native.forward, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_attention_native_bwd", native.backward, "CompositeExplicitAutograd")


# ---- shapes and dtypes while tracing --------------------------------------------------------------------------------


def _fwd_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Pair:
    batch, m, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, m), dtype=torch.float32)


def _bwd_fake(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Triple:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


torch.library.register_fake("calm_fast::cross_attention_triton_fwd", _fwd_fake, lib=_LIBRARY)
torch.library.register_fake("calm_fast::cross_attention_triton_bwd", _bwd_fake, lib=_LIBRARY)
torch.library.register_fake("calm_fast::cross_attention_native_decode", _fwd_fake, lib=_LIBRARY)
torch.library.register_fake("calm_fast::cross_attention_native_fwd", _fwd_fake, lib=_LIBRARY)
torch.library.register_fake("calm_fast::cross_attention_native_bwd", _bwd_fake, lib=_LIBRARY)


# ---- derivatives ----------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    q, k, v, lo, hi, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, lo, hi, *output)
    ctx.set_materialize_grads(False)


def _decode_bwd(dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, *rest: Any) -> Triple:
    if q.device.type == "cpu":
        return torch.ops.calm_fast.cross_attention_native_bwd(dout, dlse, q, *rest)
    # few queries: their scores are small enough to be computed again as a whole
    return cross_attention_torch_bwd(dout, dlse, q, *rest)


def _gradient(backward: Callable[..., Triple]) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """Return a forward's autograd formula from backward(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale)."""

    def formula(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dout is None and dlse is None:
            return (None,) * 7
        q, k, v, lo, hi, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        return (*backward(dout, dlse, q, k, v, out, lse, lo, hi, ctx.causal, ctx.scale), None, None, None, None)

    return formula


def _refuse_double_backward(impl: str) -> Callable[..., None]:
    def formula(ctx: Any, *grads: torch.Tensor | None) -> None:
        raise RuntimeError(f"cross_attention: impl='{impl}' has no double backward. Use impl='reference' for it.")

    return formula


torch.library.register_autograd(
    "calm_fast::cross_attention_triton_fwd",
    _gradient(torch.ops.calm_fast.cross_attention_triton_bwd),
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "calm_fast::cross_attention_native_decode", _gradient(_decode_bwd), setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "calm_fast::cross_attention_native_fwd",
    _gradient(torch.ops.calm_fast.cross_attention_native_bwd),
    setup_context=_setup_context,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "calm_fast::cross_attention_triton_bwd", _refuse_double_backward("triton"), lib=_LIBRARY
)
torch.library.register_autograd(
    "calm_fast::cross_attention_native_bwd", _refuse_double_backward("native"), lib=_LIBRARY
)
