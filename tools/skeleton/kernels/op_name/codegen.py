"""Representative launches of the op_name kernel for `make codegen`."""

from __future__ import annotations

import torch

from calm_fast.kernels.common.codegen import CodegenSpec, make_spec, short_name
from calm_fast.kernels.op_name.configs import FWD
from calm_fast.kernels.op_name.fwd import _op_name_fwd_kernel

_ARCH = 80  # the defaults are the same on every architecture


def codegen_specs() -> list[CodegenSpec]:
    """Return the kernel with its default config in bf16 and fp32; it has no product, so no tensor cores."""
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        config = FWD.default(_ARCH, dtype, "any")
        name = f"op_name_fwd_{short_name(dtype)}"
        constants = {"BLOCK": config.block_size}
        specs.append(make_spec(name, _op_name_fwd_kernel, dtype, constants, config, False, aligned=("size",)))
    return specs
