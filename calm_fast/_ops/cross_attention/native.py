"""cross_attention in the compiled library: its limits, and calls of its kernels with rows laid out as they need them.

The library registers `calm_fast::_cross_attention_native_decode`, `_fwd` and `_bwd`. The decode kernel takes few
queries, on a CPU and on a GPU. The tiles (fwd and bwd) take any number, on a CPU only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from calm_fast.core import native_library

_OP = "cross_attention"
NATIVE_MAX_QUERIES = 16  # of the decode kernel; on a GPU there is no other
SHORT_TEXT = 512  # keys
SMALL = 64  # queries and keys
MAX_KEYS = 1 << 23  # index + 0.5 must be exact in float32
MAX_HEAD_DIM = 256  # of the Triton kernels too

Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def obstacle(q: torch.Tensor, k: torch.Tensor) -> str | None:
    """Return why the compiled library cannot attend with q (B, M, H, D) and k (B, N, Hkv, D), or None."""
    # comparisons that torch.compile can hold as guards
    if q.device.type == "cuda" and q.shape[1] > NATIVE_MAX_QUERIES:
        return f"the compiled library decodes on a GPU, at most {NATIVE_MAX_QUERIES} queries"
    if k.shape[1] > MAX_KEYS:
        return f"the compiled library takes at most {MAX_KEYS} keys"
    if q.dtype == torch.float64:
        return "the compiled library computes in float32, q is float64"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {q.shape[-1]} is larger than {MAX_HEAD_DIM}"
    if q.device.type == "cuda" and q.shape[-1] % 8:
        return f"the CUDA kernels load 16 bytes at once: the head dim must be a multiple of 8, not {q.shape[-1]}"
    if why := native_library.obstacle(_OP, q.device.type):
        return why
    # a checkout whose library was compiled before the tiles were written
    return None if q.shape[1] <= NATIVE_MAX_QUERIES else native_library.obstacle(f"{_OP}_bwd", q.device.type)


def obstacles_to_tiles(dtype: torch.dtype) -> tuple[str | None, ...]:
    """Return why the tiles are not in the library and why they would be slow, each None where it does not apply.

    They are slow in any dtype without vector instructions, and in `dtype` where torch's products use matrix units.
    """
    slowness = native_library.slowness
    return native_library.obstacle(f"{_OP}_bwd", "cpu"), slowness(torch.float32), slowness(dtype)


def is_few(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Return True if "auto" prefers the decode kernel for these queries on a CPU, where it may run.

    With matrix units SDPA is ahead in 16 bits from 8 queries on, and for one query over a short text. Times of the
    kernel over SDPA, one thread: 1 query, 64 and 512 keys 1.2 and 1.3, 4096 keys 0.8 to 1.1; 4 queries 0.9; 8 queries
    1.15; 16 queries 1.5.
    """
    m = q.shape[1]
    if m > NATIVE_MAX_QUERIES:
        return False
    if q.dtype not in (torch.bfloat16, torch.float16) or native_library.slowness(q.dtype) is None:
        return True
    return 1 < m < 8 or (m == 1 and k.shape[1] > SHORT_TEXT)


def fills_no_tile(q: torch.Tensor, causal: bool) -> bool:
    """Return True if the second tile of 16 queries is mostly empty: SDPA then takes 0.7 to 0.95 of the tiles' time.

    Causal, it takes as long as the tiles: it needs a search for NaN among keys and values, 30 microseconds of calls.
    """
    return NATIVE_MAX_QUERIES < q.shape[1] < 24 and not causal


def is_small_step(q: torch.Tensor, k: torch.Tensor, causal: bool) -> bool:
    """Return True if the registered ops take longer than a training step's attention: 0.1 to 0.2 ms, twice.

    SDPA then takes 0.55 (16 queries) to 0.9 (64) of native's time in float32. Causal, it needs a search for NaN.
    """
    return q.dtype == torch.float32 and not causal and q.shape[1] <= SMALL and k.shape[1] <= SMALL


def takes_decode_kernel(q: torch.Tensor) -> bool:
    """Return True if the decode kernel serves q, False if the tiles do."""
    return q.device.type == "cuda" or q.shape[1] <= NATIVE_MAX_QUERIES


def run_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> Pair:
    """Return out and lse for plain CPU tensors, no intervals and scale > 0; the caller has decided for "native".

    The registered op is called only if autograd records: its autograd entry costs as much Python as a short attention.
    """
    run: Callable[..., Pair]
    few = q.shape[1] <= NATIVE_MAX_QUERIES
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        ops = torch.ops.calm_fast
        run = ops.cross_attention_native_decode if few else ops.cross_attention_native_fwd
    elif not few:
        run = forward
    elif q.stride(3) == k.stride(3) == v.stride(3) == 1:
        run = torch.ops.calm_fast._cross_attention_native_decode
    else:
        run = decode
    return run(q, k, v, None, None, causal, scale)


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> Pair:
    """Call the decode kernel: q (B, M, H, D), M <= 16, scale > 0; lo, hi (B, M) int32; out like q, lse (B, H, M)."""
    rows = wide_loads if q.device.type == "cuda" else _whole_rows
    return torch.ops.calm_fast._cross_attention_native_decode(
        rows(q), rows(k), rows(v), _dense(lo), _dense(hi), causal, scale
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> Pair:
    """Call the tiles forward, on a CPU: arguments and results as in `decode`, any M."""
    return torch.ops.calm_fast._cross_attention_native_fwd(
        _whole_rows(q), _whole_rows(k), _whole_rows(v), _dense(lo), _dense(hi), causal, scale
    )


def backward(
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
    """Call the tiles backward, on a CPU, any M: dq, dk, dv from what `decode` or `forward` took and returned."""
    return torch.ops.calm_fast._cross_attention_native_bwd(
        _dense(dout),
        _dense(dlse),
        _whole_rows(q),
        _whole_rows(k),
        _whole_rows(v),
        _dense(out),
        _dense(lse),
        _dense(lo),
        _dense(hi),
        causal,
        scale,
    )


def wide_loads(t: torch.Tensor) -> torch.Tensor:
    """Return `t`, or a copy if its rows do not begin at multiples of 16 bytes, which the CUDA kernels load at once."""
    pack = 16 // t.itemsize
    fits = t.stride(-1) == 1 and all(stride % pack == 0 for stride in t.stride()[:-1]) and t.data_ptr() % 16 == 0
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def _whole_rows(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return t if t is None else t.contiguous()
