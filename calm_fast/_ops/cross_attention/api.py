"""cross_attention: the public function, its choice of an implementation, and its argument checks.

Every query sees one interval of keys: the core of CALM composition.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal, overload

import torch

import calm_fast._ops.cross_attention.registered  # noqa: F401  defines torch.ops.calm_fast.cross_attention_*
from calm_fast._ops.cross_attention import native
from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast._ops.cross_attention.torch_impl import attend_plainly, cross_attention_torch
from calm_fast.core import native_library
from calm_fast.core.checks import bad_type, bad_value, check_bool, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import (
    Decision,
    DecisionCache,
    active_transform,
    autograd_records,
    check_impl,
    refuse,
    transform_decision,
    triton_obstacle,
    warn_once,
)

_OP = "cross_attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DECISIONS = DecisionCache()


@overload
def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> torch.Tensor: ...


@overload
def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def cross_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lo: torch.Tensor | None = ...,
    hi: torch.Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: bool,
    impl: str = ...,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


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
    """Compute multi-head attention where query i sees the keys lo[i] <= j < hi[i].

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j,    lse_i = log sum_j exp(scale * q_i . k_j),    lo_i <= j < hi_i

    The interval expresses full, causal, padded, packed, sliding-window and cross-tokenizer attention alike. A query
    with an empty interval gives exactly 0 and lse -inf. Intervals need not be monotone. If they are, whole blocks of
    keys are skipped. NaN and Inf outside a query's interval reach neither its output nor its gradients (except that
    SDPA, on a GPU and for plainly causal attention, may make rows NaN); a row that sees one is not finite.

    Args:
        q: (B, M, H, D) float32, bfloat16 or float16 (float64 with impl "reference" or "torch").
        k, v: (B, N, Hkv, D) in q's dtype and on its device; H % Hkv == 0, query head h reads KV head h // (H / Hkv).
        lo: (B, M) or (M,) int32, first visible key, 0 <= lo <= N; None = 0.
        hi: (B, M) or (M,) int32, one past the last visible key, 0 <= hi <= N; None = N.
        causal: shorthand for lo = 0, hi = clamp(i + 1 + (N - M), 0, N); excludes lo and hi.
        scale: multiplies the scores; default 1 / sqrt(D).
        return_lse: also return the log-sum-exp.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        out (B, M, H, D) in q's dtype; with return_lse (out, lse), lse (B, H, M) float32 (float64 for float64 input).
        Both are differentiable in q, k and v. Accumulation is in float32. Autocast is ignored.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Forward and backward are deterministic, except that the backward of SDPA on a GPU is as deterministic as torch makes
    it (`torch.use_deterministic_algorithms`). float32 products are IEEE unless torch's float32 matmul precision allows
    TF32. On a GPU "native" takes at most 16 queries, and head dims that are multiples of 8. Double backward works with
    "reference", and with "torch" if return_lse=True avoids SDPA. Source: CALM (arXiv 2401.02412) section 3.
    """
    plain = impl == "auto" and lo is None and hi is None and scale is None
    signature = _signature(q, k, v, causal, return_lse) if plain else None
    decision = None if signature is None else _DECISIONS.get(signature)
    if decision is None:
        decision = decide(q, k, v, lo=lo, hi=hi, causal=causal, scale=scale, return_lse=return_lse, impl=impl)
        if signature is not None:
            _DECISIONS.keep(signature, decision)
    lse: torch.Tensor | None
    if signature is not None and decision.impl == "native":
        out, lse = native.run_plain(q, k, v, causal, q.shape[3] ** -0.5)
        return (out, lse) if return_lse else out
    if signature is not None and not return_lse and not (decision.costly or torch.is_autocast_enabled("cpu")):
        if decision.impl == "torch" and not (causal and autograd_records(q, k, v)):
            return attend_plainly(q, k, v, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if decision.costly and not torch.compiler.is_compiling():
        warn_once(f"{decision}; it stores an (M, N) mask or the scores, which is slow")
    if decision.impl in ("reference", "torch") and _autocasts(q.device.type):
        # autocast would round q, k, v and lse inside the torch ops
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
        if decision.impl == "triton":
            out, lse = torch.ops.calm_fast.cross_attention_triton_fwd(q, k, v, lo, hi, causal, scale)
        elif native.takes_decode_kernel(q):
            out, lse = torch.ops.calm_fast.cross_attention_native_decode(q, k, v, lo, hi, causal, scale)
        else:
            out, lse = torch.ops.calm_fast.cross_attention_native_fwd(q, k, v, lo, hi, causal, scale)
    if not return_lse:
        return out
    assert lse is not None  # every implementation returns it on request
    return out, lse


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
    """Return the implementation that the same call of `cross_attention` runs, and why; raise what it would raise.

    "auto" takes native on a CPU, or torch if native cannot run or is slow. On a GPU it takes triton for intervals and
    lse, and torch (SDPA) for plainly causal or full attention and wherever Triton cannot run.
    """
    check_impl(_OP, impl)
    _check(q, k, v, lo, hi, causal, scale)
    check_bool(_OP, "return_lse", return_lse)
    if impl in ("reference", "torch"):
        return Decision(_OP, impl, "asked for")
    if decision := transform_decision(_OP, impl):
        return decision
    if impl == "native":
        if why := native.obstacle(q, k):
            raise refuse(_OP, impl, why)
        return Decision(_OP, impl, "asked for")
    if impl == "triton":
        if obstacle := _triton_obstacle(q):
            raise refuse(_OP, impl, obstacle)
        return Decision(_OP, impl, "asked for")
    if q.device.type == "cpu":
        if torch.compiler.is_exporting():  # the choice below asks for lengths, and the program must take others
            return Decision(_OP, "torch", "torch.export: one program of torch's own ops for every length")
        few = q.shape[1] <= native.NATIVE_MAX_QUERIES
        # matrix units pay in SDPA's forward pass alone: with a mask, an lse or its backward pass it is slower
        plain, records = lo is None and hi is None and not return_lse, autograd_records(q, k, v)
        slow = None
        if plain and records and native.is_small_step(q, k, causal):
            slow = "a small training step"
        elif plain and not records and not native.is_few(q, k):
            empty = "the second tile of queries would be mostly empty" if native.fills_no_tile(q, causal) else None
            slow = native_library.slowness(q.dtype) or empty
        elif not few:
            slow = native_library.slowness(torch.float32)
        if why := native.obstacle(q, k) or slow:
            return Decision(_OP, "torch", f"CPU tensors: torch's SDPA is the fast path ({why})")
        if few:
            return Decision(_OP, "native", "few queries on a CPU: keys and values are read once for all of them")
        return Decision(
            _OP, "native", "CPU tensors: scores, softmax and values in one pass over the keys that are seen"
        )
    square = causal and q.shape[1] == k.shape[1]
    plain = (square or (lo is None and hi is None and not causal)) and not return_lse
    if obstacle := _triton_obstacle(q):
        return Decision(_OP, "torch", f"Triton cannot run: {obstacle}", costly=not plain)
    if plain:
        return Decision(_OP, "torch", "plainly causal or full attention on a GPU: SDPA has a kernel for it")
    return Decision(_OP, "triton", "an interval mask or lse: SDPA would store an (M, N) mask or the scores")


def _signature(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, return_lse: bool
) -> tuple[Hashable, ...] | None:
    """Return all that `decide` reads for this call on a CPU without lo, hi and scale; None if the call needs more.

    Every connection of a composed model asks in every step, and the checks of `decide` one by one take longer than
    attention over a short text. Of N only its relation to three limits counts, so that decode steps share one.
    """
    if torch.compiler.is_compiling() or not (type(q) is type(k) is type(v) is torch.Tensor):
        return None
    if torch._C._is_tracing():  # sizes are tensors then: keys that no later call equals
        return None
    if not (q.is_cpu and k.is_cpu and v.is_cpu) or not type(causal) is type(return_lse) is bool:
        return None
    q_shape, k_shape = q.shape, k.shape
    if not len(q_shape) == len(k_shape) == 4 or active_transform() is not None:
        return None
    batch, n, kv_heads, d = k_shape
    return (
        q_shape, batch, kv_heads, d, k_shape == v.shape,
        n <= native.SMALL, n <= native.SHORT_TEXT, n <= native.MAX_KEYS,
        q.dtype, k.dtype, v.dtype, q.layout, k.layout, v.layout, causal, return_lse,
        native_library.obstacle(_OP, "cpu"), native.obstacles_to_tiles(q.dtype), autograd_records(q, k, v),
    )  # fmt: skip


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _triton_obstacle(q: torch.Tensor) -> str | None:
    """Return why Triton cannot attend with q, or None."""
    if q.dtype == torch.float64:
        return "the kernels compute in float32, q is float64"
    if q.shape[-1] > native.MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is larger than {native.MAX_HEAD_DIM}"
    return triton_obstacle(q.device)


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
            raise bad_value(_OP, name, "None if causal=True (causal is shorthand for lo and hi)", "a tensor")
        _check_bound(name, bound, batch, m, n, q.device)
    if scale is not None:
        check_finite_number(_OP, "scale", scale)


def _check_bound(name: str, bound: torch.Tensor, batch: int, m: int, n: int, device: torch.device) -> None:
    def shapes() -> str:  # for messages only: under torch.compile, formatting a length makes it a constant
        return f"of shape (B, M) = ({batch}, {m}) or (M,) = ({m},)"

    if not isinstance(bound, torch.Tensor):
        raise bad_type(_OP, name, f"an int32 tensor {shapes()}", bound)
    if bound.dtype != torch.int32:
        raise TypeError(f"{_OP}: `{name}` must have dtype int32, got {bound.dtype}")
    # dimension by dimension: comparing whole tuples fails if torch.compile holds lengths as symbols
    fits = bound.dim() in (1, 2) and bound.shape[-1] == m and (bound.dim() == 1 or bound.shape[0] == batch)
    if not fits:
        raise bad_value(_OP, name, shapes(), f"shape {tuple(bound.shape)}")
    if bound.device != device:
        raise bad_value(_OP, name, f"on {device} like q", f"device {bound.device}")
    if bound.numel() and values_checked(bound):
        least, most = (int(x) for x in torch.aminmax(bound))
        if least < 0 or most > n:
            raise bad_value(_OP, name, f"within 0 and N = {n}", f"values from {least} to {most}")
