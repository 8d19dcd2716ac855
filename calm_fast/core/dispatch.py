"""The choice of an implementation: the Decision of an op, what can run here, and explain().

The api.py of every public op has `decide(*args, **kwargs) -> Decision`. It reads the device, dtype, shape and
requires_grad of the arguments, grad mode and active transforms, and computes nothing. The ops read one environment
variable, Triton's own TRITON_INTERPRET, and read it here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

IMPLS = ("auto", "reference", "torch", "triton", "native")
# return values of active_transform()
VMAP, FORWARD = "torch.func.vmap", "forward-mode differentiation"


@dataclass(frozen=True)
class Decision:
    """The implementation that a call runs, and the reason. `str()` gives one readable line.

    costly: True if "auto" had to fall back to an implementation much slower than the one it prefers.
    """

    op: str
    impl: str
    reason: str
    costly: bool = False

    def __str__(self) -> str:
        return f"{self.op}: {self.impl} ({self.reason})"


class DecisionCache(dict[Hashable, Decision]):
    """Decisions by call signature, for an op whose checks cost more than a lookup; emptied when it is full.

    A signature holds everything that `decide` reads for the calls that share it: equal signatures, equal decisions.
    """

    def __init__(self, limit: int = 256) -> None:
        super().__init__()
        self.limit = limit

    def keep(self, signature: Hashable, decision: Decision) -> None:
        """Store what `decide` returned for a call of this signature."""
        if len(self) >= self.limit:
            self.clear()
        self[signature] = decision


def check_impl(op: str, impl: str) -> None:
    """Raise ValueError unless `impl` is one of IMPLS."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: `impl` must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")


def refuse(op: str, impl: str, why: str) -> RuntimeError:
    """Return the error for an explicit `impl` that cannot run. An explicit choice is never replaced by another."""
    return RuntimeError(f"{op}: impl={impl!r} cannot run here: {why}. Use impl='auto' to let the op choose.")


def active_transform() -> str | None:
    """Return the name of the active torch.func transform or of forward-mode differentiation, or None.

    Both trace torch's own ops only, so a compiled kernel would break the chain.
    """
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        kinds = {level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()}
        if "Jvp" not in kinds and forward_ad._current_level < 0:
            return VMAP if kinds <= {"Vmap", "Functionalize"} else "a torch.func transform"
        return FORWARD
    return FORWARD if forward_ad._current_level >= 0 else None


def transform_decision(op: str, impl: str) -> Decision | None:
    """Return the Decision forced by an active transform, else None.

    Raises:
        RuntimeError: `impl` names a kernel, and forward-mode differentiation is active.
    """
    transform = active_transform()
    if transform == FORWARD and impl in ("triton", "native"):
        raise refuse(op, impl, f"{transform} follows torch's own ops only")
    if transform and impl == "auto":
        return Decision(op, "torch", f"inside {transform}, which follows torch's own ops")
    return None


def triton_interpreted() -> bool:
    """Return True if Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def _triton_missing() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module has no spec
        found = False
    return None if found else "the package `triton` is not installed"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _triton_obstacle(device_type: str, index: int) -> str | None:
    if missing := _triton_missing():
        return missing
    if device_type == "cuda":
        if triton_interpreted():
            return None
        if torch.version.hip is None and _capability(index) < (8, 0):
            return f"Triton kernels need compute capability 8.0 or newer, this GPU has {_capability(index)}"
        return None
    if device_type == "cpu":
        return None if triton_interpreted() else "CPU tensors need TRITON_INTERPRET=1 in the environment"
    return f"no Triton kernels for device type {device_type!r}"


# torch.compiler.assume_constant_result sets this mark. Calling it here would import dynamo, and with it Triton.
_triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_obstacle(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on `device`, or None if they can.

    A CUDA device without an index is the current one, as everywhere in torch.
    """
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" and not triton_interpreted() else 0
    return _triton_obstacle(device.type, index)


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """Return the Decision that `calm_fast.ops.<op>(*args, **kwargs)` would take, without running it.

    Args:
        op: name of a public op, for instance "cross_attention".
        *args, **kwargs: the arguments of the op's own call.
    Returns:
        Decision(op, impl, reason).
    Raises:
        ValueError: unknown op.
        TypeError: an argument is missing, or the op does not have it.
        The op's own errors for these arguments.
    """
    known = importlib.import_module("calm_fast.ops").OPS
    if op not in known:
        raise ValueError(f"explain: `op` must be one of {', '.join(map(repr, known))}, got {op!r}")
    decide = importlib.import_module(f"calm_fast._ops.{op}.api").decide
    try:
        inspect.signature(decide).bind(*args, **kwargs)
    except TypeError as problem:  # the caller knows the op, not decide()
        raise TypeError(f"explain: {op}: {problem}") from None
    decision: Decision = decide(*args, **kwargs)
    return decision


@functools.cache
def warn_once(message: str) -> None:
    """Issue the warning `message`, once per process."""
    warnings.warn(message, stacklevel=3)


def autograd_records(*tensors: torch.Tensor | None) -> bool:
    """Return True where autograd records what is computed from `tensors`."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
