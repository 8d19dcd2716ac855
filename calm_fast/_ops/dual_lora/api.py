"""Dual LoRA: a frozen linear layer with a positive and a negative LoRA, integrated by an attention gate (NAT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from calm_fast._ops.dual_lora.native import dual_lora_native, native_obstacle
from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast._ops.dual_lora.torch_impl import Folded, dual_lora_torch, fold_dual_lora, project
from calm_fast.core.checks import bad_type, bad_value, check_pair, check_tensor
from calm_fast.core.devices import product_dtype
from calm_fast.core.dispatch import (
    Decision,
    autograd_records,
    check_impl,
    refuse,
    transform_decision,
    triton_obstacle,
)

_OP = "dual_lora"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("none", "gelu")


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
    """Add a positive and a negative LoRA of x to the output y of a frozen layer, weighted by an attention gate.

        h_* = s_* B_* A_* x,    (p_pos, p_neg) = softmax( (W_q x) . (W_k h_pos), (W_q x) . (W_k h_neg) )
        activation "none" (the paper): out = y + W_v ( (p_pos + 1/2) h_pos + (p_neg - 1/2) h_neg )
        activation "gelu" (the released code): h_* is y + s_* B_* A_* x in all of this, f(h) = C2 gelu(C1 h),
            out = y + (p_pos + 1/2) f(h_pos) + (p_neg - 1/2) f(h_neg)

    Every implementation but "reference" multiplies the factors out first (exact algebra, docs/ops/dual_lora.md).
    One product with 2 (R_pos + R_neg) columns reads x, and no token is multiplied by a d_out x d_out matrix.
    `calm_fast.DualLoRALinear` folds once for many calls.

    Args:
        x: (..., d_in) float32, bfloat16 or float16; float64 with impl "reference" or "torch".
        y: (..., d_out) with x's leading dimensions. All tensors have x's dtype and device.
        a_pos (R_pos, d_in), b_pos (d_out, R_pos), a_neg (R_neg, d_in), b_neg (d_out, R_neg): the LoRA factors.
        w_q (G, d_in), w_k (G, d_out): the gate.
        value: (w_v (d_out, d_out),) or (c1 (m, d_out), c2 (d_out, m)) with w_v = c2 c1; "gelu" needs two factors.
        scaling: s, or (s_pos, s_neg).
        activation: "none" or "gelu" (exact gelu).
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        out (..., d_out) in x's dtype, differentiable in every tensor. Sums are float32, autocast is ignored.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    CPU and GPU; on a GPU "native" takes at most 64 tokens. Deterministic, forward and backward. Double backward works
    with "reference" and "torch".
    Source: NAT (arXiv 2312.12832) section 3.2. "gelu" is what its released code computes, here for d_in != d_out too.
    """
    factors = (a_pos, b_pos, a_neg, b_neg, w_q, w_k)
    decision = decide(x, y, *factors, value, scaling=scaling, activation=activation, impl=impl)
    pair = check_pair(_OP, "scaling", scaling, "pos, neg")
    with torch.autocast(y.device.type, enabled=False):
        if decision.impl == "reference":
            return dual_lora_reference(x, y, *factors, value, pair, activation)
        compute = x.dtype if decision.impl == "triton" else product_dtype(x.device.type, x.dtype)
        folded = fold_dual_lora(*factors, value, pair, activation, compute)
        zg = project(x.to(compute), folded)
        return _apply(zg, y.to(compute), folded, a_pos.shape[0], decision.impl).to(x.dtype)


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
    """Return the implementation that the same `dual_lora` call runs, and why. Raises what that call would raise.

    auto: triton on a GPU for float32 and below; native on a CPU for float32 and below where autograd records nothing;
    torch everywhere else.
    """
    check_impl(_OP, impl)
    factors = {"a_pos": a_pos, "b_pos": b_pos, "a_neg": a_neg, "b_neg": b_neg, "w_q": w_q, "w_k": w_k}
    _check(x, y, factors, value)
    _check_options(value, scaling, activation)
    rank = a_pos.shape[0] + a_neg.shape[0]
    return _choose(y, rank, impl, autograd_records(x, y, *factors.values(), *value))


def dual_lora_folded(
    zg: torch.Tensor, y: torch.Tensor, folded: Folded, r_pos: int, *, impl: str = "auto"
) -> torch.Tensor:
    """Compute `dual_lora` from factors that the caller, `DualLoRALinear`, folded and keeps.

    Args:
        zg: (..., 2R), from `project(x, folded)`. y: (..., d_out). folded: from `fold_dual_lora`. r_pos: R_pos.
    Returns:
        out (..., d_out). Shapes are not checked here: all tensors share one dtype, and autocast is off.
    """
    check_impl(_OP, impl)
    recorded = autograd_records(zg, y, folded.down, folded.up, folded.c1, folded.c2)
    return _apply(zg, y, folded, r_pos, _choose(y, folded.up.shape[1], impl, recorded).impl)


def _choose(y: torch.Tensor, rank: int, impl: str, recorded: bool) -> Decision:
    """Choose for y (..., d_out) and rank R. recorded: autograd records the call, so that on a CPU torch is faster."""
    if impl in ("reference", "torch"):
        return Decision(_OP, impl, "asked for")
    if decision := transform_decision(_OP, impl):
        return decision
    if impl == "native" or (impl == "auto" and y.device.type == "cpu"):
        obstacle = native_obstacle(y, rank)
        if impl == "native":
            if obstacle:
                raise refuse(_OP, impl, obstacle)
            return Decision(_OP, impl, "asked for")
        if obstacle or recorded:
            return Decision(_OP, "torch", f"CPU tensors, and {obstacle or 'autograd records it'}: torch's own products")
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
        out = dual_lora_native(flat_zg, flat_y, folded, r_pos)
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


# ---- the registered ops of Triton: what torch.compile, export, FSDP and opcheck see ----------------------------------
# T tokens, R = r_pos + r_neg. torch multiplies by c1, c2 and up in the backward pass, so that each product is computed
# only where its gradient is asked for.

_lib = torch.library.Library("calm_fast", "FRAGMENT")


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(f"{_OP}: impl='triton' has no double backward. Use impl='torch' or 'reference' for it.")


_lib.define("dual_lora_triton_bwd(Tensor dmix, Tensor zg, int r_pos) -> (Tensor dzg, Tensor mix)")


@torch.library.impl(_lib, "dual_lora_triton_bwd", "CompositeExplicitAutograd")
def _triton_bwd(dmix: torch.Tensor, zg: torch.Tensor, r_pos: int) -> tuple[torch.Tensor, torch.Tensor]:
    from calm_fast.kernels.dual_lora import launch  # imports Triton, so only where a kernel is launched

    return launch.launch_dual_lora_bwd(dmix, zg, r_pos)


@torch.library.register_fake("calm_fast::dual_lora_triton_bwd", lib=_lib)
def _triton_bwd_fake(dmix: torch.Tensor, zg: torch.Tensor, r_pos: int) -> tuple[torch.Tensor, torch.Tensor]:
    return zg.new_empty(zg.shape), zg.new_empty(dmix.shape)


torch.library.register_autograd("calm_fast::dual_lora_triton_bwd", _no_double_backward, lib=_lib)

_lib.define("dual_lora_triton_fwd(Tensor zg, Tensor y, Tensor up, int r_pos) -> Tensor")


@torch.library.impl(_lib, "dual_lora_triton_fwd", "CompositeExplicitAutograd")
def _triton_fwd(zg: torch.Tensor, y: torch.Tensor, up: torch.Tensor, r_pos: int) -> torch.Tensor:
    from calm_fast.kernels.dual_lora import launch

    return launch.launch_dual_lora_fwd(zg, y, up, r_pos)


@torch.library.register_fake("calm_fast::dual_lora_triton_fwd", lib=_lib)
def _triton_fwd_fake(zg: torch.Tensor, y: torch.Tensor, up: torch.Tensor, r_pos: int) -> torch.Tensor:
    return y.new_empty(y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    zg, _, up, ctx.r_pos = inputs
    ctx.save_for_backward(zg, up)


def _backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    zg, up = ctx.saved_tensors
    need_zg, need_y, need_up, _ = ctx.needs_input_grad
    dzg = dup = None
    if need_zg or need_up:
        dzg, mix = torch.ops.calm_fast.dual_lora_triton_bwd(dout @ up, zg, ctx.r_pos)
        dup = dout.mT @ mix if need_up else None
    return dzg if need_zg else None, dout if need_y else None, dup, None


torch.library.register_autograd("calm_fast::dual_lora_triton_fwd", _backward, setup_context=_setup_context, lib=_lib)

_lib.define(
    "dual_lora_triton_gelu_bwd(Tensor dmix, Tensor zg, Tensor u, Tensor up, int r_pos)"
    " -> (Tensor dzg, Tensor dpos, Tensor dneg)"
)


@torch.library.impl(_lib, "dual_lora_triton_gelu_bwd", "CompositeExplicitAutograd")
def _triton_gelu_bwd(
    dmix: torch.Tensor, zg: torch.Tensor, u: torch.Tensor, up: torch.Tensor, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from calm_fast.kernels.dual_lora import launch

    return launch.launch_dual_lora_gelu_bwd(dmix, zg, u, up, r_pos)


@torch.library.register_fake("calm_fast::dual_lora_triton_gelu_bwd", lib=_lib)
def _triton_gelu_bwd_fake(
    dmix: torch.Tensor, zg: torch.Tensor, u: torch.Tensor, up: torch.Tensor, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return zg.new_empty(zg.shape), u.new_empty(u.shape), u.new_empty(u.shape)


torch.library.register_autograd("calm_fast::dual_lora_triton_gelu_bwd", _no_double_backward, lib=_lib)

_lib.define(
    "dual_lora_triton_gelu_fwd(Tensor zg, Tensor y, Tensor c1, Tensor up, Tensor c2, int r_pos)"
    " -> (Tensor out, Tensor u, Tensor mix)"
)


@torch.library.impl(_lib, "dual_lora_triton_gelu_fwd", "CompositeExplicitAutograd")
def _triton_gelu_fwd(
    zg: torch.Tensor, y: torch.Tensor, c1: torch.Tensor, up: torch.Tensor, c2: torch.Tensor, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from calm_fast.kernels.dual_lora import launch

    return launch.launch_dual_lora_gelu_fwd(zg, y, c1, up, c2, r_pos)


@torch.library.register_fake("calm_fast::dual_lora_triton_gelu_fwd", lib=_lib)
def _triton_gelu_fwd_fake(
    zg: torch.Tensor, y: torch.Tensor, c1: torch.Tensor, up: torch.Tensor, c2: torch.Tensor, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = (y.shape[0], c1.shape[0])
    return y.new_empty(y.shape), y.new_empty(hidden), y.new_empty(hidden)


def _gelu_setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    zg, y, c1, up, c2, ctx.r_pos = inputs
    _, u, mix = output
    ctx.save_for_backward(zg, y, c1, up, c2, u, mix)
    ctx.set_materialize_grads(False)


def _gelu_backward(
    ctx: Any, dout: torch.Tensor | None, du_unused: None, dmix_unused: None
) -> tuple[torch.Tensor | None, ...]:
    # u and mix, the other two outputs, are saved for this pass only: no gradient reaches them
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


torch.library.register_autograd(
    "calm_fast::dual_lora_triton_gelu_fwd", _gelu_backward, setup_context=_gelu_setup_context, lib=_lib
)
