"""Representative launches of op_name, compiled and checked without a GPU (`make codegen`)."""

from __future__ import annotations

import torch

from calm_fast.kernels.common.launching import CodegenSpec, make_spec, short_name
from calm_fast.kernels.op_name.configs import DEFAULT
from calm_fast.kernels.op_name.fwd import _op_name_fwd_kernel


def codegen_specs() -> list[CodegenSpec]:
    """Return the kernel with its default config in bf16 and fp32; it has no product, so no tensor cores."""
    return [
        make_spec(
            f"op_name_fwd_{short_name(dtype)}", _op_name_fwd_kernel, dtype, {"BLOCK": DEFAULT.block}, DEFAULT,
            tensor_core=False, aligned=("size",),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]  # fmt: skip
