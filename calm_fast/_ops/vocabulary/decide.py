"""Checks and the choice of implementation that linear_nce and linear_logprob share."""

from __future__ import annotations

import torch

from calm_fast.core import native_library
from calm_fast.core.checks import bad_type, bad_value, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import VMAP, Decision, active_transform, refuse, triton_obstacle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# With fewer tokens than this and a weight of at least this many elements, reading the weight once takes most of the
# time, and torch's products read it without packing (d 576, V 49152, bfloat16: native 14.3 ms against torch 12.1 for
# 1 token, 13.8 against 16.4 for 16).
_FEW_TOKENS, _LARGE_WEIGHT = 16, 1 << 20


def native_obstacle(op: str, hidden: torch.Tensor) -> str | None:
    """Return why the compiled library cannot run `op` on these hidden states, or None."""
    if hidden.dtype == torch.float64:
        return "the compiled library computes in float32, the hidden states are float64"
    return native_library.obstacle(op, hidden.device.type)


def choose(op: str, impl: str, hidden: torch.Tensor, weight: torch.Tensor) -> Decision:
    """Return the requested implementation, or for "auto" native on a CPU, Triton on a GPU, torch where they cannot run.

    Raises:
        RuntimeError: an explicit `impl` cannot run here, or an active torch.func transform needs impl="reference".
    """
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
        if obstacle := native_obstacle(op, hidden) or native_library.slowness(hidden.dtype):
            return Decision(op, "torch", f"CPU tensors: blocked products; {obstacle}")
        if hidden.shape[0] < _FEW_TOKENS and weight.numel() >= _LARGE_WEIGHT:
            return Decision(op, "torch", f"CPU tensors: under {_FEW_TOKENS} tokens torch reads a large weight faster")
        return Decision(op, "native", "CPU tensors: products and running sums in one pass, in vector registers")
    if obstacle:
        return Decision(op, "torch", f"Triton cannot run: {obstacle}")
    return Decision(op, "triton", "a GPU: products and running sums in one kernel")


def check_dtype(op: str, name: str, tensor: torch.Tensor, like: str, dtype: torch.dtype) -> None:
    """Check that `tensor` has the dtype of the argument called `like`."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: `{name}` must have {like}'s dtype {dtype}, got {tensor.dtype}")


def check_head(op: str, name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check rank, dtype, device and sizes of the hidden states (T, d), weight (V, d) and bias (V,) or None.

    name: the name of the argument that holds the hidden states.
    """
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


def _check_positive(op: str, name: str, value: float) -> None:
    check_finite_number(op, name, value)
    if not value > 0:
        raise bad_value(op, name, "positive", str(value))


def check_numbers(op: str, temperature: float, softcap: float | None, ignore_index: int) -> None:
    """Check that temperature and softcap (unless None) are positive and finite, and that ignore_index is an int."""
    _check_positive(op, "temperature", temperature)
    if softcap is not None:
        _check_positive(op, "softcap", softcap)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise bad_type(op, "ignore_index", "an int", ignore_index)


def check_indices(op: str, name: str, indices: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Check that `indices` is an int64 tensor (T,) on `device`."""
    check_tensor(op, name, indices, "(T,)", (torch.int64,), device)
    if indices.shape[0] != tokens:
        raise bad_value(op, name, f"of shape (T,) = ({tokens},)", f"shape {tuple(indices.shape)}")


def check_targets(op: str, targets: torch.Tensor, hidden: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Check that `targets` is an int64 tensor (T,) whose values are token ids or `ignore_index`."""
    check_indices(op, "targets", targets, hidden.shape[0], hidden.device)
    if not targets.numel() or not values_checked(targets):
        return
    used = targets[targets != ignore_index]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= vocabulary):
        expected = f"ignore_index ({ignore_index}) or within 0 <= target < V = {vocabulary}"
        raise bad_value(op, "targets", expected, f"values from {int(used.min())} to {int(used.max())}")
