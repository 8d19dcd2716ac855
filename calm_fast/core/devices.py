"""Devices: the one that an argument names, and what a CPU multiplies fast."""

from __future__ import annotations

import functools
from typing import Any

import torch

from calm_fast.core.checks import bad_type, bad_value


def usable_device(where: str, device: Any) -> torch.device:
    """Return the device that argument `device` of `where` names; of None a GPU if there is one, else the CPU.

    Raises TypeError, or ValueError with torch's reason if a tensor cannot be made there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, (str, torch.device)):
        raise bad_type(where, "device", "a name such as 'cuda:1' or 'cpu', a torch.device, or None", device)
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as problem:  # the latter where torch is built without CUDA
        reason = str(problem).splitlines()[0]
        raise bad_value(where, "device", "one that torch can use here", f"{str(device)!r}: {reason}") from problem


@functools.cache
def _find_product_dtype(dtype: torch.dtype) -> torch.dtype:
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    says = getattr(torch.ops.mkldnn, name, None) if name else None
    return dtype if says is None or says() else torch.float32


def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which torch should multiply tensors of `dtype` on such a device: mostly their own.

    float32 for 16 bits on a CPU without instructions for their products. torch multiplies them there without vectors, 5
    to 50 times more slowly (AVX2: 128 tokens, d 576, 8,192 columns; bfloat16 169 and 1133 ms, float32 25 and 38).
    """
    return _find_product_dtype(dtype) if device_type == "cpu" else dtype


product_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]
