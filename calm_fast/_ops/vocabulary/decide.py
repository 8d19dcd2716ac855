"""Checks and the choice of implementation that linear_nce and linear_logprob share."""

from __future__ import annotations

import functools

import torch

from calm_fast.core import native_library
from calm_fast.core.checks import bad_type, bad_value, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import VMAP, Decision, active_transform, refuse, triton_obstacle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# fewer tokens than this against a weight of at least this many elements: time goes into reading the weight once, which
# torch's products do without packing it (d 576, V 49152, bfloat16: 1 token 12.1 against 14.3 ms, 16 tokens 16.4, 13.8)
_FEW_TOKENS, _LARGE_WEIGHT = 16, 1 << 20
# the lane of the compiled library, see csrc/common/lanes.h: -1 = the best of this CPU; tests force others
LANE = -1


def _matrix_units() -> bool:
    """True where the CPU multiplies 16-bit matrices in tiles (AMX): torch's product uses them, ours does not."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"))


@functools.cache
def _no_vectors() -> bool:
    info = native_library.build_info()["_cpu"]
    return isinstance(info, dict) and info["best lane here"] == "scalar"


@functools.cache
def _slow_native(dtype: torch.dtype) -> str | None:
    """Why torch's own product is the better one on this CPU; None where the compiled library's is."""
    if _no_vectors():
        return "this CPU has neither AVX2 nor AVX-512"
    if dtype != torch.float32 and _matrix_units():
        return "this CPU has matrix units for 16-bit products, which torch uses"
    return None


# see core/dispatch.py: constants for the compiler
_slow_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def native_obstacle(op: str, hidden: torch.Tensor) -> str | None:
    """Why the compiled library cannot run `op` on these hidden states; None where it can."""
    if hidden.dtype == torch.float64:
        return "the compiled library computes in float32, the hidden states are float64"
    return native_library.obstacle(op, hidden.device.type)


def choose(op: str, impl: str, hidden: torch.Tensor, weight: torch.Tensor) -> Decision:
    """The compiled library on a CPU, Triton on a GPU, blocked torch where they cannot run; or what was asked for."""
    if impl != "reference" and (transform := active_transform()) not in (None, VMAP):
        raise RuntimeError(f"{op}: inside {transform} only impl='reference' has derivatives, got impl={impl!r}")
    if impl in ("reference", "torch"):
        return Decision(op, impl, "asked for")
    if impl == "native":
        if obstacle := native_obstacle(op, hidden):
            raise refuse(op, impl, obstacle)
        return Decision(op, impl, "asked for")
    obstacle = triton_obstacle(hidden.device)
    if hidden.dtype == torch.float64:
        obstacle = "the kernels compute in float32, the hidden states are float64"
    if impl == "triton":
        if obstacle:
            raise refuse(op, impl, obstacle)
        return Decision(op, impl, "asked for")
    if hidden.device.type == "cpu":
        if obstacle := native_obstacle(op, hidden) or _slow_native(hidden.dtype):
            return Decision(op, "torch", f"CPU tensors: blocked products; {obstacle}")
        if hidden.shape[0] < _FEW_TOKENS and weight.numel() >= _LARGE_WEIGHT:
            return Decision(op, "torch", f"CPU tensors: under {_FEW_TOKENS} tokens torch reads a large weight faster")
        return Decision(op, "native", "CPU tensors: products and running sums in one pass, in vector registers")
    if obstacle:
        return Decision(op, "torch", f"Triton cannot run: {obstacle}")
    return Decision(op, "triton", "a GPU: products and running sums in one kernel")


def check_dtype(op: str, name: str, tensor: torch.Tensor, like: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: `{name}` must have {like}'s dtype {dtype}, got {tensor.dtype}")


def check_head(op: str, name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check hidden (T, d), called `name`, weight (V, d) and bias (V,) or None: rank, dtype, device, sizes."""
    check_tensor(op, name, hidden, "(T, d)", DTYPES)
    check_tensor(op, "weight", weight, "(V, d)", DTYPES, hidden.device)
    check_dtype(op, "weight", weight, name, hidden.dtype)
    d = hidden.shape[1]
    if d < 1:
        raise bad_value(op, name, "of hidden size d >= 1", f"shape {tuple(hidden.shape)}")
    if weight.shape[0] < 1 or weight.shape[1] != d:
        raise bad_value(op, "weight", f"of shape (V, d) with V >= 1 and d = {d}", f"shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(op, "bias", bias, "(V,)", DTYPES, hidden.device)
        check_dtype(op, "bias", bias, name, hidden.dtype)
        if bias.shape[0] != weight.shape[0]:
            raise bad_value(op, "bias", f"of shape (V,) = ({weight.shape[0]},)", f"shape {tuple(bias.shape)}")


def check_numbers(op: str, temperature: float, softcap: float | None, ignore_index: int) -> None:
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is None and name == "softcap":
            continue
        check_finite_number(op, name, value)
        if not value > 0:
            raise bad_value(op, name, "positive", str(value))
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise bad_type(op, "ignore_index", "an int", ignore_index)


def check_indices(op: str, name: str, indices: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Check an int64 tensor (T,)."""
    check_tensor(op, name, indices, "(T,)", (torch.int64,), device)
    if indices.shape[0] != tokens:
        raise bad_value(op, name, f"of shape (T,) = ({tokens},)", f"shape {tuple(indices.shape)}")


def check_targets(op: str, targets: torch.Tensor, hidden: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    check_indices(op, "targets", targets, hidden.shape[0], hidden.device)
    if not targets.numel() or not values_checked(targets):
        return
    used = targets[targets != ignore_index]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= vocabulary):
        expected = f"ignore_index ({ignore_index}) or within 0 <= target < V = {vocabulary}"
        raise bad_value(op, "targets", expected, f"values from {int(used.min())} to {int(used.max())}")
