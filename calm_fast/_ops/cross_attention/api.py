"""Cross-attention with one interval of visible keys per query: the core of CALM composition."""

from __future__ import annotations

import torch

from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast._ops.cross_attention.torch_impl import cross_attention_torch, cross_attention_torch_bwd
from calm_fast.core import native_library
from calm_fast.core.checks import bad_type, bad_value, check_bool, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import (
    Decision,
    active_transform,
    check_impl,
    refuse,
    transform_decision,
    triton_obstacle,
    warn_once,
)

_OP = "cross_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_HEAD_DIM = 256  # of Triton and native
_MAX_NATIVE_KEYS = 1 << 23  # a float holds every key's number and a half
NATIVE_MAX_QUERIES = 16  # of the code for decoding, the only one on a GPU


def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention where query i sees the keys lo[i] <= j < hi[i].

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j,    lse_i = log sum_j exp(scale * q_i . k_j),    lo_i <= j < hi_i

    The interval expresses full, causal, padded, packed, sliding-window and cross-tokenizer attention alike. A query
    with an empty interval gives exactly 0 and lse -inf. Intervals need not be monotone; where they are, whole blocks
    of keys are skipped.

    Args:
        q: (B, M, H, D) float32, bfloat16 or float16 (float64 with impl "reference" or "torch").
        k, v: (B, N, Hkv, D), q's dtype and device; H % Hkv == 0, query head h reads KV head h // (H / Hkv).
        lo: (B, M) or (M,) int32, first visible key, 0 <= lo <= N; None = 0.
        hi: (B, M) or (M,) int32, one past the last visible key, 0 <= hi <= N; None = N.
        causal: shorthand for lo = 0, hi = clamp(i + 1 + (N - M), 0, N); excludes lo and hi.
        scale: multiplies the scores; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        out (B, M, H, D) in q's dtype; with return_lse (out, lse), lse (B, H, M) float32 (float64 for float64 input).
        Both are differentiable in q, k and v. Accumulation is in float32, autocast is ignored.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic, forward and backward; only where SDPA runs on a GPU is the backward as deterministic as SDPA's
    (`torch.use_deterministic_algorithms`). float32 products are IEEE unless torch's float32 matmul precision allows
    TF32. "native" takes on a GPU at most 16 queries and head dims that are multiples of 8. Double backward
    works with "reference", and with "torch" where return_lse avoids SDPA. Source: CALM (arXiv 2401.02412) section 3.
    """
    if impl == "auto" and lo is None and hi is None and scale is None and _surely_native(q, k, v, causal, return_lse):
        out, lse = _run_native(q, k, v, causal, q.shape[3] ** -0.5)
        return (out, lse) if return_lse else out
    decision = decide(q, k, v, lo=lo, hi=hi, causal=causal, scale=scale, return_lse=return_lse, impl=impl)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if decision.costly and not torch.compiler.is_compiling():
        warn_once(f"{decision}; it stores an (M, N) mask or the scores, which is slow")
    if decision.impl in ("reference", "torch") and _autocasts(q.device.type):
        # it would round q, k, v and lse behind our back
        with torch.autocast(q.device.type, enabled=False):
            return cross_attention(
                q, k, v, lo=lo, hi=hi, causal=causal, scale=scale, return_lse=return_lse, impl=decision.impl
            )
    if decision.impl == "reference":
        out, lse = cross_attention_reference(q, k, v, lo, hi, causal, scale)
    elif decision.impl == "torch":
        out, lse = cross_attention_torch(q, k, v, lo, hi, causal, scale, return_lse)
    else:
        lo, hi = (t if t is None else t.expand(q.shape[0], q.shape[1]) for t in (lo, hi))
        if scale <= 0:  # the kernels take the row maximum before scaling; a sign costs no rounding, a product would
            q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
        run = "cross_attention_triton_fwd"
        if decision.impl == "native":
            few = q.device.type == "cuda" or q.shape[1] <= NATIVE_MAX_QUERIES
            run = "cross_attention_native_decode" if few else "cross_attention_native_fwd"
        out, lse = getattr(torch.ops.calm_fast, run)(q, k, v, lo, hi, causal, scale)
    return (out, lse) if return_lse else out


def decide(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lo: torch.Tensor | None = None,
    hi: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Decision:
    """Which implementation the same call of `cross_attention` runs, and why; raises what that call would raise.

    auto: native on a CPU, torch where that cannot run or is slow, and for float64; on a GPU intervals and lse ->
    triton, plainly causal or full -> torch (SDPA); torch wherever Triton cannot run.
    """
    check_impl(_OP, impl)
    _check(q, k, v, lo, hi, causal, scale)
    check_bool(_OP, "return_lse", return_lse)
    if impl in ("reference", "torch"):
        return Decision(_OP, impl, "asked for")
    if decision := transform_decision(_OP, impl):
        return decision
    if impl == "native":
        if why := _native_cannot(q, k):
            raise refuse(_OP, impl, why)
        return Decision(_OP, impl, "asked for")
    if impl == "triton":
        if obstacle := _triton_cannot(q):
            raise refuse(_OP, impl, obstacle)
        return Decision(_OP, impl, "asked for")
    if q.device.type == "cpu":
        few = q.shape[1] <= NATIVE_MAX_QUERIES
        if why := _native_cannot(q, k) or (None if few else native_library.slowness(q.dtype)):
            return Decision(_OP, "torch", f"CPU tensors: torch's SDPA is the fast path ({why})")
        if few:
            return Decision(_OP, "native", "few queries on a CPU: keys and values are read once for all of them")
        return Decision(
            _OP, "native", "CPU tensors: scores, softmax and values in one pass over the keys that are seen"
        )
    square = causal and q.shape[1] == k.shape[1]
    plain = (square or (lo is None and hi is None and not causal)) and not return_lse
    if obstacle := _triton_cannot(q):
        return Decision(_OP, "torch", f"Triton cannot run: {obstacle}", costly=not plain)
    if plain:
        return Decision(_OP, "torch", "plainly causal or full attention on a GPU: SDPA has a kernel for it")
    return Decision(_OP, "triton", "an interval mask or lse: SDPA would store an (M, N) mask or the scores")


def _surely_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, return_lse: bool) -> bool:
    """Whether `decide` surely accepts this call and takes "native" on a CPU; False may also mean that it would.

    Every connection asks this in every step, where the checks one by one take longer than attention over a short text.
    """
    if not (type(q) is type(k) is type(v) is torch.Tensor) or torch.compiler.is_compiling():
        return False
    of, there, dtype = q.shape, k.shape, q.dtype
    return (
        q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and len(of) == len(there) == 4
        and there == v.shape
        and (of[0], of[3]) == (there[0], there[3])
        and of[2] > 0
        and there[2] > 0
        and of[2] % there[2] == 0
        and 0 < of[3] <= _MAX_HEAD_DIM
        and there[1] <= _MAX_NATIVE_KEYS
        and dtype == k.dtype == v.dtype
        and dtype in _DTYPES[:3]
        and q.layout == k.layout == v.layout == torch.strided
        and type(causal) is type(return_lse) is bool
        and active_transform() is None
        and _native_cannot(q, k) is None
        and (of[1] <= NATIVE_MAX_QUERIES or native_library.slowness(dtype) is None)
    )


def _run_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float):
    """out and lse of a call that is `_surely_native`; without autograd not through the registered op's entry to it."""
    few = q.shape[1] <= NATIVE_MAX_QUERIES
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        run = (
            torch.ops.calm_fast.cross_attention_native_decode if few else torch.ops.calm_fast.cross_attention_native_fwd
        )
    elif not few:
        run = _tiles
    elif q.stride(3) == k.stride(3) == v.stride(3) == 1:
        run = torch.ops.calm_fast._cross_attention_native_decode
    else:
        run = _decode
    return run(q, k, v, None, None, causal, scale)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _triton_cannot(q: torch.Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "the kernels compute in float32, q is float64"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is larger than {_MAX_HEAD_DIM}"
    return triton_obstacle(q.device)


def _native_cannot(q: torch.Tensor, k: torch.Tensor) -> str | None:
    # comparisons that torch.compile can hold as guards
    if q.device.type == "cuda" and q.shape[1] > NATIVE_MAX_QUERIES:
        return f"the compiled library decodes on a GPU, at most {NATIVE_MAX_QUERIES} queries"
    if k.shape[1] > _MAX_NATIVE_KEYS:
        return f"the compiled library takes at most {_MAX_NATIVE_KEYS} keys"
    if q.dtype == torch.float64:
        return "the compiled library computes in float32, q is float64"
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is larger than {_MAX_HEAD_DIM}"
    if q.device.type == "cuda" and q.shape[-1] % 8:
        return f"the CUDA kernels load 16 bytes at once: the head dim must be a multiple of 8, not {q.shape[-1]}"
    if obstacle := native_library.obstacle(_OP, q.device.type):
        return obstacle
    # a checkout whose library was compiled before its sources changed
    return None if q.shape[1] <= NATIVE_MAX_QUERIES else native_library.obstacle(f"{_OP}_bwd", q.device.type)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> None:
    check_tensor(_OP, "q", q, "(B, M, H, D)", _DTYPES)
    check_tensor(_OP, "k", k, "(B, N, Hkv, D)", _DTYPES, q.device)
    check_tensor(_OP, "v", v, "(B, N, Hkv, D)", _DTYPES, q.device)
    batch, m, heads, d = q.shape
    n, kv_heads = k.shape[1], k.shape[2]
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise TypeError(f"{_OP}: `{name}` must have q's dtype {q.dtype}, got {t.dtype}")
        if t.shape[0] != batch:
            raise bad_value(_OP, name, f"of q's batch size {batch}", f"shape {tuple(t.shape)}")
        if t.shape[3] != d:
            raise bad_value(_OP, name, f"of q's head dim {d}", f"shape {tuple(t.shape)}")
    if v.shape != k.shape:
        raise bad_value(_OP, "v", f"of k's shape {tuple(k.shape)}", f"shape {tuple(v.shape)}")
    if heads < 1 or d < 1:
        raise bad_value(_OP, "q", "of at least one head and head dim 1", f"shape {tuple(q.shape)}")
    if kv_heads < 1 or heads % kv_heads != 0:
        expected = f"(B, N, Hkv, D) with a number of heads that divides q's {heads}"
        raise bad_value(_OP, "k", expected, f"shape {tuple(k.shape)}, {kv_heads} heads")
    check_bool(_OP, "causal", causal)
    for name, bound in (("lo", lo), ("hi", hi)):
        if bound is None:
            continue
        if causal:
            raise bad_value(_OP, name, "None where causal=True (causal is shorthand for lo and hi)", "a tensor")
        _check_bound(name, bound, batch, m, n, q.device)
    if scale is not None:
        check_finite_number(_OP, "scale", scale)


def _check_bound(name: str, bound: torch.Tensor, batch: int, m: int, n: int, device: torch.device) -> None:
    def shapes() -> str:  # only for a message: under torch.compile, formatting a length makes it a constant
        return f"of shape (B, M) = ({batch}, {m}) or (M,) = ({m},)"

    if not isinstance(bound, torch.Tensor):
        raise bad_type(_OP, name, f"an int32 tensor {shapes()}", bound)
    if bound.dtype != torch.int32:
        raise TypeError(f"{_OP}: `{name}` must have dtype int32, got {bound.dtype}")
    # dimension by dimension: comparing whole tuples goes wrong where torch.compile holds lengths as symbols
    fits = bound.dim() in (1, 2) and bound.shape[-1] == m and (bound.dim() == 1 or bound.shape[0] == batch)
    if not fits:
        raise bad_value(_OP, name, shapes(), f"shape {tuple(bound.shape)}")
    if bound.device != device:
        raise bad_value(_OP, name, f"on {device} like q", f"device {bound.device}")
    if bound.numel() and values_checked(bound):
        least, most = (int(x) for x in torch.aminmax(bound))
        if least < 0 or most > n:
            raise bad_value(_OP, name, f"within 0 and N = {n}", f"values from {least} to {most}")


# ---- the registered ops: what torch.compile, export, FSDP and opcheck see -------------------------------------------

# Triton's; native for few queries, on a CPU and a GPU; native for many, on a CPU
_FORWARD = ("cross_attention_triton_fwd", "cross_attention_native_decode", "cross_attention_native_fwd")
_BACKWARD = ("cross_attention_triton_bwd", "cross_attention_native_bwd")
_lib = torch.library.Library("calm_fast", "FRAGMENT")
for _name in _FORWARD:
    _lib.define(
        f"{_name}(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, bool causal, float scale)"
        " -> (Tensor out, Tensor lse)"
    )
for _name in _BACKWARD:
    _lib.define(
        f"{_name}(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
        " Tensor? lo, Tensor? hi, bool causal, float scale) -> (Tensor dq, Tensor dk, Tensor dv)"
    )


@torch.library.impl(_lib, "cross_attention_triton_fwd", "CompositeExplicitAutograd")
def _fwd(q, k, v, lo, hi, causal, scale):
    from calm_fast.kernels.cross_attention import launch as kernels  # imports triton: only where it is used

    return kernels.launch_cross_attention_fwd(q, k, v, lo, hi, causal, scale)


@torch.library.impl(_lib, "cross_attention_triton_bwd", "CompositeExplicitAutograd")
def _bwd(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale):
    from calm_fast.kernels.cross_attention import launch as kernels

    return kernels.launch_cross_attention_bwd(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale)


def wide_loads(t: torch.Tensor) -> torch.Tensor:
    """`t`, or a copy of it where its rows do not begin at multiples of 16 bytes: what the CUDA kernels load at once."""
    pack = 16 // t.itemsize
    fits = t.stride(-1) == 1 and all(stride % pack == 0 for stride in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _whole_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(t if t is None else t.contiguous() for t in tensors)


@torch.library.impl(_lib, "cross_attention_native_decode", "CompositeExplicitAutograd")
def _decode(q, k, v, lo, hi, causal, scale):
    rows = wide_loads if q.device.type == "cuda" else _whole_rows
    return torch.ops.calm_fast._cross_attention_native_decode(
        rows(q), rows(k), rows(v), *_contiguous(lo, hi), causal, scale
    )


@torch.library.impl(_lib, "cross_attention_native_fwd", "CompositeExplicitAutograd")
def _tiles(q, k, v, lo, hi, causal, scale):
    rows = (_whole_rows(t) for t in (q, k, v))
    return torch.ops.calm_fast._cross_attention_native_fwd(*rows, *_contiguous(lo, hi), causal, scale)


@torch.library.impl(_lib, "cross_attention_native_bwd", "CompositeExplicitAutograd")
def _tiles_bwd(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale):
    rows = (_whole_rows(t) for t in (q, k, v))
    return torch.ops.calm_fast._cross_attention_native_bwd(
        *_contiguous(dout, dlse), *rows, *_contiguous(out, lse, lo, hi), causal, scale
    )


def _fwd_fake(q, k, v, lo, hi, causal, scale):
    batch, m, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, m), dtype=torch.float32)


def _bwd_fake(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, lo, hi, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, lo, hi, *output)
    ctx.set_materialize_grads(False)


def _decode_bwd(dout, dlse, q, *rest):
    if q.device.type == "cpu":
        return torch.ops.calm_fast.cross_attention_native_bwd(dout, dlse, q, *rest)
    # few queries: their scores are small enough to be computed again as a whole
    return cross_attention_torch_bwd(dout, dlse, q, *rest)


def _differentiated_by(backward):
    """The autograd formula of a forward: `backward`(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale)."""

    def formula(ctx, dout, dlse):
        if dout is None and dlse is None:
            return (None,) * 7
        q, k, v, lo, hi, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        return (*backward(dout, dlse, q, k, v, out, lse, lo, hi, ctx.causal, ctx.scale), None, None, None, None)

    return formula


def _no_double_backward(impl):
    def formula(ctx, *grads):
        raise RuntimeError(f"{_OP}: impl='{impl}' has no double backward. Use impl='reference' for it.")

    return formula


_DERIVATIVES = (
    torch.ops.calm_fast.cross_attention_triton_bwd,
    _decode_bwd,
    torch.ops.calm_fast.cross_attention_native_bwd,
)
for _name, _derivative in zip(_FORWARD, _DERIVATIVES, strict=True):
    torch.library.register_fake(f"calm_fast::{_name}", _fwd_fake, lib=_lib)
    _formula = _differentiated_by(_derivative)
    torch.library.register_autograd(f"calm_fast::{_name}", _formula, setup_context=_setup_context, lib=_lib)
for _name, _impl in zip(_BACKWARD, ("triton", "native"), strict=True):
    torch.library.register_fake(f"calm_fast::{_name}", _bwd_fake, lib=_lib)
    torch.library.register_autograd(f"calm_fast::{_name}", _no_double_backward(_impl), lib=_lib)
