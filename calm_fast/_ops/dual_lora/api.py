"""Dual LoRA: a frozen linear layer with a positive and a negative LoRA, integrated by an attention gate (NAT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast._ops.dual_lora.torch_impl import (
    Folded,
    dual_lora_backward_torch,
    dual_lora_torch,
    fold_dual_lora,
    project,
)
from calm_fast._ops.packed_linear.api import Packed, can_pack, linear, pack
from calm_fast.core import native_library
from calm_fast.core.checks import bad_type, bad_value, check_pair, check_tensor
from calm_fast.core.dispatch import Decision, check_impl, refuse, transform_decision, triton_obstacle

_OP = "dual_lora"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("none", "gelu")
CUDA_MAX_TOKENS, CUDA_MAX_FUSED, _CUDA_MAX_RANK = 64, 512, 1024  # csrc/dual_lora/dual_lora.cuh


def dual_lora(
    x: torch.Tensor,
    y: torch.Tensor,
    a_pos: torch.Tensor,
    b_pos: torch.Tensor,
    a_neg: torch.Tensor,
    b_neg: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    value: Sequence[torch.Tensor],
    *,
    scaling: float | tuple[float, float],
    activation: str = "none",
    impl: str = "auto",
) -> torch.Tensor:
    """The output y of a frozen layer for x, plus what a positive and a negative LoRA add to it through a gate.

        h_* = s_* B_* A_* x,    (p_pos, p_neg) = softmax( (W_q x) . (W_k h_pos), (W_q x) . (W_k h_neg) )
        activation "none" (the paper): out = y + W_v ( (p_pos + 1/2) h_pos + (p_neg - 1/2) h_neg )
        activation "gelu" (the released code): h_* is y + s_* B_* A_* x in all of this, f(h) = C2 gelu(C1 h),
            out = y + (p_pos + 1/2) f(h_pos) + (p_neg - 1/2) f(h_neg)

    Every implementation but "reference" multiplies the factors out first (exact algebra, docs/ops/dual_lora.md):
    x is read by one product with 2 (R_pos + R_neg) columns, and no d_out x d_out matrix meets a token. To fold once
    for many calls, use `calm_fast.DualLoRALinear`.

    Args:
        x: (..., d_in) float32, bfloat16 or float16 (float64 with impl "reference" or "torch").
        y: (..., d_out), x's leading dimensions. All tensors have x's dtype and device.
        a_pos (R_pos, d_in), b_pos (d_out, R_pos), a_neg (R_neg, d_in), b_neg (d_out, R_neg): the LoRA factors.
        w_q: (G, d_in), w_k: (G, d_out), the gate.
        value: (w_v (d_out, d_out),) or (c1 (m, d_out), c2 (d_out, m)) with w_v = c2 c1; "gelu" needs two factors.
        scaling: s, or (s_pos, s_neg). activation: "none" or "gelu" (exact gelu).
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        out (..., d_out) in x's dtype, differentiable in every tensor. Accumulation is in float32, autocast is ignored.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic, forward and backward. Double backward works with "reference" and "torch". "native" takes at most 64
    tokens on a GPU.
    Source: NAT (arXiv 2312.12832) section 3.2; "gelu" is what its released code computes, for d_in != d_out too.
    """
    factors = (a_pos, b_pos, a_neg, b_neg, w_q, w_k)
    decision = decide(x, y, *factors, value, scaling=scaling, activation=activation, impl=impl)
    pair = check_pair(_OP, "scaling", scaling, "pos, neg")
    with torch.autocast(y.device.type, enabled=False):
        if decision.impl == "reference":
            return dual_lora_reference(x, y, *factors, value, pair, activation)
        folded = fold_dual_lora(*factors, value, pair, activation)
        return _apply(project(x, folded), y, folded, a_pos.shape[0], decision.impl)


def decide(
    x: torch.Tensor,
    y: torch.Tensor,
    a_pos: torch.Tensor,
    b_pos: torch.Tensor,
    a_neg: torch.Tensor,
    b_neg: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    value: Sequence[torch.Tensor],
    *,
    scaling: float | tuple[float, float],
    activation: str = "none",
    impl: str = "auto",
) -> Decision:
    """Which implementation the same call of `dual_lora` runs, and why; raises what that call would raise.

    auto: triton on a GPU, for float32 and below; on a CPU native, for float32 and below, where autograd
    records nothing; torch everywhere else.
    """
    check_impl(_OP, impl)
    factors = {"a_pos": a_pos, "b_pos": b_pos, "a_neg": a_neg, "b_neg": b_neg, "w_q": w_q, "w_k": w_k}
    _check(x, y, factors, value)
    _check_options(value, scaling, activation)
    rank = a_pos.shape[0] + a_neg.shape[0]
    return _choose(y, rank, impl, _differentiated(x, y, *factors.values(), *value))


def dual_lora_folded(
    zg: torch.Tensor, y: torch.Tensor, folded: Folded, r_pos: int, *, impl: str = "auto"
) -> torch.Tensor:
    """`dual_lora` for a caller that keeps the folded factors: `DualLoRALinear`.

    Args:
        zg: (..., 2R), `project(x, folded)`. y: (..., d_out). folded: of `fold_dual_lora`. r_pos: of R = R_pos + R_neg.
    Returns:
        out (..., d_out). The caller has made sure of shapes, of one dtype and of autocast being off.
    """
    check_impl(_OP, impl)
    why_torch = _differentiated(zg, y, *(t for t in folded[:4] if t is not None))
    return _apply(zg, y, folded, r_pos, _choose(y, folded.up.shape[1], impl, why_torch).impl)


def project_folded(x: torch.Tensor, folded: Folded, lora_x: torch.Tensor | None = None) -> torch.Tensor:
    """`project`, by the compiled library where `folded` is packed for it and autograd records nothing."""
    if folded.packed is None or lora_x is not None or not can_pack(x) or _differentiated(*folded[:2]):
        return project(x, folded, lora_x)
    return linear(x, folded.packed[0])


def pack_folded(folded: Folded) -> Folded:
    """The same factors with copies that the compiled library reads faster, where it has a use for them.

    For factors that are kept: a copy costs about what it saves on 200 tokens.
    """
    if native_library.obstacle(_OP):
        return folded
    factors = (folded.down, folded.up) if folded.c1 is None else (folded.down, folded.c1, folded.c2)
    packed = tuple(map(pack, factors))
    return folded._replace(packed=packed) if type(packed[0]) is Packed else folded


def _native_obstacle(y: torch.Tensor, rank: int) -> str | None:
    if y.dtype == torch.float64:
        return "the compiled code computes in float32, x is float64"
    if y.device.type == "cuda":
        if y.numel() > CUDA_MAX_TOKENS * y.shape[-1]:  # a comparison that torch.compile can hold as a guard
            return f"the CUDA kernels decode, at most {CUDA_MAX_TOKENS} tokens"
        if rank > _CUDA_MAX_RANK:
            return f"the CUDA kernels take R_pos + R_neg up to {_CUDA_MAX_RANK}, not {rank}"
    return native_library.obstacle(_OP, y.device.type)


def _differentiated(*tensors: torch.Tensor) -> str:
    """Why `auto` leaves a call to torch: autograd would follow it; "" where it would not."""
    return "autograd records it" if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) else ""


def _choose(y: torch.Tensor, rank: int, impl: str, why_torch: str) -> Decision:
    """why_torch: why on a CPU torch is better for this call than the compiled library; "" where it is not."""
    if impl in ("reference", "torch"):
        return Decision(_OP, impl, "asked for")
    if decision := transform_decision(_OP, impl):
        return decision
    if impl == "native" or (impl == "auto" and y.device.type == "cpu"):
        obstacle = _native_obstacle(y, rank)
        if impl == "native":
            if obstacle:
                raise refuse(_OP, impl, obstacle)
            return Decision(_OP, impl, "asked for")
        if obstacle or why_torch:
            return Decision(_OP, "torch", f"CPU tensors, and {obstacle or why_torch}: torch's own products")
        return Decision(_OP, "native", "CPU tensors: gate, activation and mix in one pass, packed products")
    obstacle = "the kernels compute in float32, x is float64" if y.dtype == torch.float64 else triton_obstacle(y.device)
    if impl == "triton":
        if obstacle:
            raise refuse(_OP, impl, obstacle)
        return Decision(_OP, impl, "asked for")
    if obstacle:
        return Decision(_OP, "torch", f"Triton cannot run: {obstacle}")
    return Decision(_OP, "triton", "a GPU: gate, activation, rank update and residual in one pass over y")


def _apply(zg: torch.Tensor, y: torch.Tensor, folded: Folded, r_pos: int, impl: str) -> torch.Tensor:
    if impl not in ("triton", "native"):
        return dual_lora_torch(zg, y, folded, r_pos)
    flat_zg, flat_y = zg.reshape(-1, zg.shape[-1]), y.reshape(-1, y.shape[-1])
    if impl == "native":
        packed = (None, None, *(p.panels for p in (folded.packed or ())[1:]))[-2:]  # of c1 or None, of the last product
        out = torch.ops.calm_fast.dual_lora_native_fwd(flat_zg, flat_y, *folded[1:4], *packed, r_pos)
    elif folded.c1 is None:
        out = torch.ops.calm_fast.dual_lora_triton_fwd(flat_zg, flat_y, folded.up, r_pos)
    else:
        out, _, _ = torch.ops.calm_fast.dual_lora_triton_gelu_fwd(
            flat_zg, flat_y, folded.c1, folded.up, folded.c2, r_pos
        )
    return out.view(y.shape)


def _check(x: torch.Tensor, y: torch.Tensor, factors: dict[str, torch.Tensor], value: Sequence[torch.Tensor]) -> None:
    for name, t, letters in (("x", x, "(..., d_in)"), ("y", y, "(..., d_out)")):
        if not isinstance(t, torch.Tensor):
            raise bad_type(_OP, name, f"a tensor {letters}", t)
        if t.dim() < 1 or t.shape[-1] < 1:
            raise bad_value(_OP, name, f"{letters} of width at least 1", f"shape {tuple(t.shape)}")
        check_tensor(_OP, name, t, ",".join("." * t.dim()), _DTYPES, x.device)
    d_in, d_out = x.shape[-1], y.shape[-1]
    if y.shape[:-1] != x.shape[:-1]:
        raise bad_value(_OP, "y", f"of x's leading dimensions {tuple(x.shape[:-1])}", f"shape {tuple(y.shape)}")
    if not isinstance(value, (tuple, list)):
        raise bad_type(_OP, "value", "a tuple (w_v,) or (c1, c2)", value)
    if len(value) not in (1, 2):
        raise bad_value(_OP, "value", "a tuple (w_v,) or (c1, c2)", f"{len(value)} entries")
    names = ("value[0]", "value[1]")[: len(value)]
    tensors = factors | dict(zip(names, value, strict=True))
    for name, t in tensors.items():
        check_tensor(_OP, name, t, "(rows, columns)", _DTYPES, x.device)
    for name, t in {"y": y, **tensors}.items():
        if t.dtype != x.dtype:
            raise TypeError(f"{_OP}: `{name}` must have x's dtype {x.dtype}, got {t.dtype}")

    r_pos, r_neg, g, m = (tensors[name].shape[0] for name in ("a_pos", "a_neg", "w_q", "value[0]"))
    expected = {
        "a_pos": ("R_pos, d_in", (r_pos, d_in)),
        "b_pos": ("d_out, R_pos", (d_out, r_pos)),
        "a_neg": ("R_neg, d_in", (r_neg, d_in)),
        "b_neg": ("d_out, R_neg", (d_out, r_neg)),
        "w_q": ("G, d_in", (g, d_in)),
        "w_k": ("G, d_out", (g, d_out)),
        "value[0]": ("d_out, d_out", (d_out, d_out)) if len(value) == 1 else ("m, d_out", (m, d_out)),
        "value[1]": ("d_out, m", (d_out, m)),
    }
    for name, t in tensors.items():
        letters, shape = expected[name]
        if tuple(t.shape) != shape:
            raise bad_value(_OP, name, f"of shape ({letters}) = {shape}", f"shape {tuple(t.shape)}")
        if 0 in shape:
            raise bad_value(_OP, name, f"({letters}) with sizes of at least 1", f"shape {shape}")


def _check_options(value: Sequence[torch.Tensor], scaling: Any, activation: Any) -> None:
    if activation not in ACTIVATIONS:
        raise bad_value(_OP, "activation", "'none' or 'gelu'", repr(activation))
    if activation == "gelu" and len(value) != 2:
        raise bad_value(_OP, "value", "two factors (c1, c2) where activation='gelu'", f"{len(value)} factor")
    check_pair(_OP, "scaling", scaling, "pos, neg")


# ---- the registered ops: what torch.compile, export, FSDP and opcheck see -------------------------------------------
# T tokens; R = r_pos + r_neg. The products with c1, c2 and up that a gradient needs are torch's own, so that each is
# computed only where it is asked for.

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define("dual_lora_triton_fwd(Tensor zg, Tensor y, Tensor up, int r_pos) -> Tensor")
_lib.define("dual_lora_triton_bwd(Tensor dmix, Tensor zg, int r_pos) -> (Tensor dzg, Tensor mix)")
_lib.define(
    "dual_lora_triton_gelu_fwd(Tensor zg, Tensor y, Tensor c1, Tensor up, Tensor c2, int r_pos)"
    " -> (Tensor out, Tensor u, Tensor mix)"
)
_lib.define(
    "dual_lora_triton_gelu_bwd(Tensor dmix, Tensor zg, Tensor u, Tensor up, int r_pos)"
    " -> (Tensor dzg, Tensor dpos, Tensor dneg)"
)
_lib.define(
    "dual_lora_native_fwd(Tensor zg, Tensor y, Tensor up, Tensor? c1, Tensor? c2, Tensor? packed_c1,"
    " Tensor? packed_last, int r_pos) -> Tensor"
)


@torch.library.impl(_lib, "dual_lora_triton_fwd", "CompositeExplicitAutograd")
def _triton_fwd(zg, y, up, r_pos):
    from calm_fast.kernels.dual_lora import launch  # imports Triton: only where a kernel is launched

    return launch.launch_dual_lora_fwd(zg, y, up, r_pos)


@torch.library.impl(_lib, "dual_lora_triton_bwd", "CompositeExplicitAutograd")
def _triton_bwd(dmix, zg, r_pos):
    from calm_fast.kernels.dual_lora import launch

    return launch.launch_dual_lora_bwd(dmix, zg, r_pos)


@torch.library.impl(_lib, "dual_lora_triton_gelu_fwd", "CompositeExplicitAutograd")
def _triton_gelu_fwd(zg, y, c1, up, c2, r_pos):
    from calm_fast.kernels.dual_lora import launch

    return launch.launch_dual_lora_gelu_fwd(zg, y, c1, up, c2, r_pos)


@torch.library.impl(_lib, "dual_lora_triton_gelu_bwd", "CompositeExplicitAutograd")
def _triton_gelu_bwd(dmix, zg, u, up, r_pos):
    from calm_fast.kernels.dual_lora import launch

    return launch.launch_dual_lora_gelu_bwd(dmix, zg, u, up, r_pos)


@torch.library.register_fake("calm_fast::dual_lora_triton_fwd", lib=_lib)
@torch.library.register_fake("calm_fast::dual_lora_native_fwd", lib=_lib)
def _fwd_fake(zg, y, up, *rest):
    return y.new_empty(y.shape)


@torch.library.register_fake("calm_fast::dual_lora_triton_bwd", lib=_lib)
def _bwd_fake(dmix, zg, r_pos):
    return zg.new_empty(zg.shape), zg.new_empty(dmix.shape)


@torch.library.register_fake("calm_fast::dual_lora_triton_gelu_fwd", lib=_lib)
def _gelu_fwd_fake(zg, y, c1, up, c2, r_pos):
    hidden = (y.shape[0], c1.shape[0])
    return y.new_empty(y.shape), y.new_empty(hidden), y.new_empty(hidden)


@torch.library.register_fake("calm_fast::dual_lora_triton_gelu_bwd", lib=_lib)
def _gelu_bwd_fake(dmix, zg, u, up, r_pos):
    return zg.new_empty(zg.shape), u.new_empty(u.shape), u.new_empty(u.shape)


def _setup_context(ctx, inputs, output):
    zg, _, up, ctx.r_pos = inputs
    ctx.save_for_backward(zg, up)


def _backward(ctx, dout):
    zg, up = ctx.saved_tensors
    need_zg, need_y, need_up, _ = ctx.needs_input_grad
    dzg = dup = None
    if need_zg or need_up:
        dzg, mix = torch.ops.calm_fast.dual_lora_triton_bwd(dout @ up, zg, ctx.r_pos)
        dup = dout.mT @ mix if need_up else None
    return dzg if need_zg else None, dout if need_y else None, dup, None


def _gelu_setup_context(ctx, inputs, output):
    zg, y, c1, up, c2, ctx.r_pos = inputs
    _, u, mix = output
    ctx.save_for_backward(zg, y, c1, up, c2, u, mix)
    ctx.set_materialize_grads(False)


def _gelu_backward(ctx, dout, du_unused, dmix_unused):  # only `out` leaves this file
    zg, y, c1, up, c2, u, mix = ctx.saved_tensors
    if dout is None:
        return (None,) * 6
    need_zg, need_y, need_c1, need_up, need_c2, _ = ctx.needs_input_grad
    dzg, dpos, dneg = torch.ops.calm_fast.dual_lora_triton_gelu_bwd(dout @ c2, zg, u, up, ctx.r_pos)
    du = dpos + dneg
    dup = None
    if need_up:
        z_pos, z_neg = zg[:, : ctx.r_pos], zg[:, ctx.r_pos : zg.shape[1] // 2]
        dup = torch.cat((dpos.mT @ z_pos, dneg.mT @ z_neg), dim=1)
    return (
        dzg if need_zg else None,
        torch.addmm(dout, du, c1) if need_y else None,
        du.mT @ y if need_c1 else None,
        dup,
        dout.mT @ mix if need_c2 else None,
        None,
    )


def _no_double_backward(ctx, *grads):
    raise RuntimeError(f"{_OP}: impl='triton' has no double backward. Use impl='torch' or 'reference' for it.")


_register = torch.library.register_autograd
_register("calm_fast::dual_lora_triton_fwd", _backward, setup_context=_setup_context, lib=_lib)
_register("calm_fast::dual_lora_triton_gelu_fwd", _gelu_backward, setup_context=_gelu_setup_context, lib=_lib)
_register("calm_fast::dual_lora_triton_bwd", _no_double_backward, lib=_lib)
_register("calm_fast::dual_lora_triton_gelu_bwd", _no_double_backward, lib=_lib)


# ---- the compiled library: opaque functions behind registered ops; gradients are torch's -----------------------------


def _library(device_type: str = "cpu") -> Any:
    """Where the compiled functions are; a graph compiled earlier may run in a process that has not loaded them."""
    if why := native_library.obstacle(_OP, device_type):
        raise refuse(_OP, "native", why)
    return torch.ops.calm_fast


@torch.library.impl(_lib, "dual_lora_native_fwd", "CPU")
def _native_fwd(zg, y, up, c1, c2, packed_c1, packed_last, r_pos):
    library, zg, y = _library(), zg.contiguous(), y.contiguous()
    if c1 is None:
        mix, last = library._dual_lora_native_weigh(zg, r_pos), up
    else:
        u = y @ c1.mT if packed_c1 is None else library._packed_linear_native_fwd(y, packed_c1, c1.shape[0])
        mix, last = library._dual_lora_native_mix(zg, u, up.contiguous(), r_pos), c2
    if packed_last is None:
        return torch.addmm(y, mix, last.mT)
    return library._packed_linear_native_fwd(mix, packed_last, last.shape[0], y)


@torch.library.impl(_lib, "dual_lora_native_fwd", "CUDA")
def _native_fwd_cuda(zg, y, up, c1, c2, packed_c1, packed_last, r_pos):
    library, zg, y, up = _library("cuda"), zg.contiguous(), y.contiguous(), up.contiguous()
    if c1 is None:
        return library._dual_lora_native_update(zg, y, up, None, None, r_pos)
    u = y @ c1.mT
    if c1.shape[0] <= CUDA_MAX_FUSED:
        return library._dual_lora_native_update(zg, y, up, u, c2.contiguous(), r_pos)
    return torch.addmm(y, library._dual_lora_native_mix(zg, u, up, r_pos), c2.mT)


def _native_setup(ctx, inputs, output):
    *tensors, ctx.r_pos = inputs
    ctx.save_for_backward(*tensors[:5])


def _native_backward(ctx, dout):
    zg, y, *factors = ctx.saved_tensors
    return *dual_lora_backward_torch(dout, zg, y, Folded(zg, *factors), ctx.r_pos), None, None, None


_register("calm_fast::dual_lora_native_fwd", _native_backward, setup_context=_native_setup, lib=_lib)
