"""torch's matrix products as the vocabulary's ops take them, whatever the dtype and the CPU.

Two kinds of CPU are the reason for this file. Without 16-bit products (`core.devices.product_dtype`) float32 copies of
parts are multiplied, which is also more exact: a result is rounded to 16 bits once. With matrix units a product may
read past the end of a row, so rows are followed by zeros (`guarded`).
"""

from __future__ import annotations

import torch

from calm_fast.core import native_library
from calm_fast.core.devices import product_dtype

# Elements of a float32 copy or of a float32 sum at a time: 1 MiB, which stay in a core's caches.
_COPIED = 1 << 18
# Most rows for which copies do not pay: with few of them, making a copy of the other factor takes longer than torch's
# product (d 576, V 8192, AVX2: one row 1.6 ms against 3.1 with copies, 16 rows 20 against 7).
_FEW_ROWS = 2
# Columns that a product with matrix units may read past the end of a row.
_READ = 32


def guarded(a: torch.Tensor) -> torch.Tensor:
    """Return a (m, k), or a copy whose rows are followed by zeros, for a product on a CPU with matrix units.

    oneDNN reads such rows in whole blocks of 32 columns and multiplies what lies past the end by 0. Where the next row
    holds a NaN or an infinity, that is NaN in this one too (torch 2.13, bfloat16 and float16).
    """
    m, k = a.shape
    if a.device.type != "cpu" or a.dtype.itemsize != 2 or k % _READ == 0 or a.stride(1) != 1:
        return a
    if native_library.slowness(a.dtype) is None:
        return a
    padded = a.new_zeros((m, -(-k // _READ) * _READ))
    padded[:, :k] = a
    return padded[:, :k]


def _copies_pay(a: torch.Tensor) -> bool:
    return a.shape[0] > _FEW_ROWS and product_dtype(a.device.type, a.dtype) != a.dtype


def _add_copies(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Add a @ b to `out`, float32, from float32 copies of parts of a (m, k) and b (k, n)."""
    (m, k), n = a.shape, b.shape[1]
    rows = max(1, min(m, _COPIED // max(1, n)))
    depth = max(1, min(k, _COPIED // max(rows, n)))
    for i in range(0, m, rows):
        for j in range(0, k, depth):
            out[i : i + rows].addmm_(a[i : i + rows, j : j + depth].float(), b[j : j + depth].float())
    return out


def multiply_into(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scratch: torch.Tensor | None = None
) -> torch.Tensor:
    """Write a (m, k) @ b (k, n) into `out` (m, n), all in one dtype, rounded once. Return `out`.

    scratch: (m, n) float32, memory for sums that the caller has anyway.
    """
    if not _copies_pay(a):
        return torch.mm(guarded(a), b, out=out)
    if scratch is not None:
        return out.copy_(_add_copies(scratch.zero_(), a, b))
    rows = max(1, _COPIED // max(1, b.shape[1]))
    for i in range(0, a.shape[0], rows):
        out[i : i + rows] = unrounded_copies(a[i : i + rows], b)
    return out


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a (m, k) @ b (k, n) in the inputs' dtype, rounded once, whatever autocast says."""
    if _copies_pay(a):
        return multiply_into(a.new_empty((a.shape[0], b.shape[1])), a, b)
    a = guarded(a)
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return torch.mm(a, b)
    return torch.mm(a, b)


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b in float32 where that costs nothing (16-bit inputs on a GPU, copies), else in the inputs' dtype."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return unrounded_copies(a, b) if _copies_pay(a) else torch.mm(guarded(a), b)


def unrounded_copies(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b in float32 from float32 copies of parts."""
    return _add_copies(a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.float32), a, b)


def exact_product(dlogits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return dlogits (t, V) @ weight (V, d) in the compute dtype, rounded to 16 bits at most once."""
    if weight.device.type == "cpu" and weight.dtype == torch.float16:
        # float16 cannot hold a sum beyond 65504, and most CPUs multiply it more slowly than its float32 copy
        return unrounded_copies(dlogits, weight)
    return wide_product(dlogits, weight).to(torch.promote_types(weight.dtype, torch.float32))
