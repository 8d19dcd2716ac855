"""Representative launches of the linear_nce kernels for `make codegen`."""

from __future__ import annotations

import torch

from calm_fast.kernels.common.codegen import ARCHS, CodegenSpec
from calm_fast.kernels.linear_nce.bwd import _linear_nce_dlogits_kernel
from calm_fast.kernels.linear_nce.configs import CALIBRATE, COMBINE, DLOGITS, SWEEP, dz_config, stats_config
from calm_fast.kernels.linear_nce.fwd import (
    _linear_nce_calibrate_kernel,
    _linear_nce_combine_kernel,
    _linear_nce_sweep_kernel,
)
from calm_fast.kernels.linear_nce.rows import _linear_nce_dz_kernel, _linear_nce_stats_kernel
from calm_fast.kernels.vocabulary.codegen import Constants, make_spec, tile_constants
from calm_fast.kernels.vocabulary.configs import table_size

_POINTERS = {"targets_ptr": "*i64", "seq_ids_ptr": "*i64"} | {
    f"{name}_ptr": "*fp32"
    for name in ("part", "at_target", "norms", "terms", "coefficients", "dloss", "stats", "losses")
}


def codegen_specs() -> list[CodegenSpec]:
    """Return every kernel with the default config of each architecture.

    bfloat16 must use the tensor cores, float32 must not.
    """
    specs = []
    for arch in ARCHS:
        for dtype in (torch.bfloat16, torch.float32):
            for plain in (True, False):
                suffix, size = "" if plain else "_full", table_size(plain)
                sweep = SWEEP.default(arch, dtype, size)
                constants = tile_constants(sweep, dtype, plain) | {"TAU_IS_1": plain}
                name, fn = "linear_nce_sweep" + suffix, _linear_nce_sweep_kernel
                specs.append(make_spec(name, fn, dtype, constants, sweep, True, _POINTERS, (arch,)))
                dlogits = DLOGITS.default(arch, dtype, size)
                constants = tile_constants(dlogits, dtype, plain) | {"TAU_IS_1": plain}
                name, fn = "linear_nce_dlogits" + suffix, _linear_nce_dlogits_kernel
                specs.append(make_spec(name, fn, dtype, constants, dlogits, True, _POINTERS, (arch,)))
    for plain in (True, False):
        constants = {"TAU_IS_1": plain, "BLOCK_T": COMBINE.block_t}
        name, fn = "linear_nce_combine" + ("" if plain else "_full"), _linear_nce_combine_kernel
        specs.append(make_spec(name, fn, torch.float32, constants, COMBINE, False, _POINTERS))
    constants = {"BLOCK_T": CALIBRATE.block_t, "BLOCK_J": CALIBRATE.block_j}
    name, fn = "linear_nce_calibrate", _linear_nce_calibrate_kernel
    specs.append(make_spec(name, fn, torch.float32, constants, CALIBRATE, False, _POINTERS))
    return specs + _row_specs()


def _row_specs() -> list[CodegenSpec]:
    """Return the row kernels of the one-pass step: plain, and with a temperature, a bias and a softcap."""
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        for plain in (True, False):
            shared: Constants = {"TAU_IS_1": plain, "HAS_BIAS": not plain, "HAS_SOFTCAP": not plain}
            shared |= {"bias_ptr": None} if plain else {}
            suffix = "" if plain else "_full"
            stats = stats_config(dtype, interpreted=False)
            constants = shared | {"LANES": stats.lanes, "WIDTH": stats.width}
            name, fn = f"linear_nce_stats{suffix}", _linear_nce_stats_kernel
            specs.append(make_spec(name, fn, dtype, constants, stats, False, _POINTERS))
            for parts in (False, True):
                dz = dz_config(interpreted=False)
                constants = shared | {"BLOCK_J": dz.block_j, "BLOCK": dz.block_v, "PARTS": parts}
                name, fn = "linear_nce_dz" + ("_parts" if parts else "") + suffix, _linear_nce_dz_kernel
                specs.append(make_spec(name, fn, dtype, constants, dz, False, _POINTERS))
    return specs
