"""Representative launches of the linear_logprob kernels for `make codegen`."""

from __future__ import annotations

import torch

from calm_fast.kernels.common.codegen import ARCHS, CodegenSpec
from calm_fast.kernels.linear_logprob.configs import COMBINE, DLOGITS, SWEEP, TARGET
from calm_fast.kernels.linear_logprob.kernels import (
    _linear_logprob_combine_kernel,
    _linear_logprob_dlogits_kernel,
    _linear_logprob_sweep_kernel,
    _linear_logprob_target_kernel,
)
from calm_fast.kernels.vocabulary.codegen import Constants, make_spec, tile_constants
from calm_fast.kernels.vocabulary.configs import table_size

_POINTERS = {"targets_ptr": "*i64", "rank_ptr": "*i64", "above_ptr": "*i32"} | {
    f"{name}_ptr": "*fp32"
    for name in ("part", "at_target", "threshold", "norms", "entropy", "logprob", "dlogprob", "dentropy")
}


def codegen_specs() -> list[CodegenSpec]:
    """Return every kernel with the default config of each architecture.

    bfloat16 must use the tensor cores, float32 must not.
    """
    specs = []
    constants: Constants
    for arch in ARCHS:
        for dtype in (torch.bfloat16, torch.float32):
            for plain in (True, False):
                suffix, size = "" if plain else "_full", table_size(plain)
                flags = {"HAS_ENTROPY": not plain, "HAS_RANK": not plain, "HAS_DENTROPY": not plain}
                absent = dict.fromkeys(("threshold_ptr", "above_ptr", "dentropy_ptr")) if plain else {}
                sweep = SWEEP.default(arch, dtype, size)
                constants = tile_constants(sweep, dtype, plain) | flags | absent
                name, fn = "linear_logprob_sweep" + suffix, _linear_logprob_sweep_kernel
                specs.append(make_spec(name, fn, dtype, constants, sweep, True, _POINTERS, (arch,)))
                dlogits = DLOGITS.default(arch, dtype, size)
                constants = tile_constants(dlogits, dtype, plain) | flags | absent
                name, fn = "linear_logprob_dlogits" + suffix, _linear_logprob_dlogits_kernel
                specs.append(make_spec(name, fn, dtype, constants, dlogits, True, _POINTERS, (arch,)))
    for plain in (True, False):
        constants = {"HAS_ENTROPY": not plain, "HAS_RANK": not plain, "BLOCK_T": COMBINE.block_t}
        constants |= {"above_ptr": None} if plain else {}
        name, fn = "linear_logprob_combine" + ("" if plain else "_full"), _linear_logprob_combine_kernel
        specs.append(make_spec(name, fn, torch.float32, constants, COMBINE, False, _POINTERS))
    constants = {
        "D": 4096, "BLOCK_T": TARGET.block_t, "BLOCK_D": TARGET.block_d, "HAS_BIAS": True, "HAS_SOFTCAP": True,
    }  # fmt: skip
    name, fn = "linear_logprob_target", _linear_logprob_target_kernel
    specs.append(make_spec(name, fn, torch.bfloat16, constants, TARGET, False, _POINTERS))
    return specs
