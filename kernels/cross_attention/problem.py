"""One call of cross_attention as its Triton kernels take it: the arguments that the launchers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from calm_fast.core.launch_config import Config
from calm_fast.kernels.common import hardware
from calm_fast.kernels.common.arithmetic import LOG2_E
from calm_fast.kernels.common.config_table import ConfigTable, padded, target
from calm_fast.kernels.common.launching import addressable, describe, float32_precision, interpreted
from calm_fast.kernels.cross_attention.configs import column_parts, table_size
from calm_fast.kernels.cross_attention.fwd import _cross_attention_fwd_kernel

__all__ = ["NO_BOXES", "Problem", "boxes_of", "make_problem"]

NO_BOXES = (None, None)  # in place of `boxes_of`, where a kernel reads through pointers
_MAX_HEAD_DIM = 256
_INTERPRETED = interpreted(_cross_attention_fwd_kernel)


@dataclass(frozen=True)
class Problem:
    """One call's inputs as the kernels take them; shape letters as in the op."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lo: torch.Tensor | None
    hi: torch.Tensor | None
    causal: bool
    scale: float

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """B, M, N, H, Hkv, D."""
        batch, m, heads, d = self.q.shape
        return batch, m, self.k.shape[1], heads, self.k.shape[2], d

    @property
    def strides(self) -> tuple[int, ...]:
        """(b, row, head) strides of q, k and v."""
        return tuple(s for t in (self.q, self.k, self.v) for s in t.stride()[:3])

    @property
    def interval_strides(self) -> tuple[int, ...]:
        """(b, m) strides of lo and hi, 0 for an absent one."""
        return tuple(s for t in (self.lo, self.hi) for s in (t.stride() if t is not None else (0, 0)))

    def scalars(self) -> dict[str, Any]:
        """Run-time sizes that every attention kernel takes."""
        _, m, n, heads, kv_heads, _ = self.sizes
        return {"scale_log2": self.scale * LOG2_E.value, "M": m, "N": n, "H": heads, "GROUP": heads // kv_heads}

    def constants(self) -> dict[str, Any]:
        """Compile-time arguments that every attention kernel takes."""
        return {
            "D": self.q.shape[3],
            "HAS_LO": self.lo is not None,
            "HAS_HI": self.hi is not None,
            "CAUSAL": self.causal,
            "PRECISION": float32_precision(self.q.dtype),
            "INTERPRET": _INTERPRETED,
        }

    @property
    def target(self) -> str:
        """What does the products; in the interpreter the forms are those of sm_90."""
        return target(90 if _INTERPRETED else hardware.gpu(self.q.device).arch, self.q.dtype)

    def column_parts(self, kernel: str) -> tuple[int, int]:
        """Return the columns of the parts of the head dim, see configs.py."""
        return column_parts(self.q.shape[3], kernel, self.target)

    @property
    def interpreted(self) -> bool:
        """Whether the interpreter runs the kernels."""
        return _INTERPRETED

    def config(self, table: ConfigTable[int, Config], measured: bool = True) -> Config:
        """Return the launch config of a kernel for this call; measured: prefer one that was measured on this GPU."""
        _, m, n, heads, kv_heads, d = self.sizes
        shape, block_d = {"M": m, "N": n, "H": heads, "Hkv": kv_heads}, padded(d)
        return table.pick(self.q.device, self.q.dtype, table_size(block_d), block_d, shape, _INTERPRETED, measured)


def boxes_of(t: torch.Tensor, rows: int, parts: tuple[int, int]) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Return a descriptor of t (B, rows, heads, D) for each part of its columns, loaded in boxes of rows of one head.

    It describes t as (B, heads, rows, D): only if dims of size 1 lead, a box becomes a matrix in shared memory at once.
    """
    wide, rest = parts
    t = t.transpose(1, 2)
    return describe(t, [1, 1, rows, wide]), describe(t, [1, 1, rows, rest]) if rest else None


def make_problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> Problem:
    """Return the problem of a call, with strides that the kernels can address.

    Raises:
        ValueError: the head dim is above 256 or the scale is not positive.
    """
    if q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(f"cross_attention: `q` must have a head dim of at most {_MAX_HEAD_DIM}, got {q.shape[3]}")
    if not scale > 0:
        raise ValueError(f"cross_attention: `scale` must be positive in the Triton kernels, got {scale}")
    q, k, v = (addressable(t, rows=1) for t in (q, k, v))
    return Problem(q, k, v, lo, hi, causal, scale)
