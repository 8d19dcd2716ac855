"""How an op chooses its implementation, and how a user asks why.

An op module in `calm_fast.ops` offers `decide(*args, **kwargs) -> Decision`, a pure function of device,
dtype and shape. The only environment variable the package reads is Triton's own TRITON_INTERPRET, here.
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
# names that active_transform() returns
VMAP, FORWARD = "torch.func.vmap", "forward-mode differentiation"


@dataclass(frozen=True)
class Decision:
    """The implementation that a call runs, and why; `str()` gives one readable line.

    costly: "auto" had to fall back to something much slower than what it would have chosen.
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
    """The error for an explicit `impl` that cannot run: it is never replaced by another one."""
    return RuntimeError(f"{op}: impl={impl!r} cannot run here: {why}. Use impl='auto' to let the op choose.")


def active_transform() -> str | None:
    """Name of the active torch.func transform or of forward-mode differentiation, or None.

    Both see torch's own ops only; a compiled kernel would break the chain.
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
    """True where Triton runs its kernels in the CPU interpreter (TRITON_INTERPRET=1)."""
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


# what torch.compiler.assume_constant_result sets; calling that here would import dynamo, and Triton with it
_triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can."""
    index = device.index if device.index is not None else 0
    return _triton_obstacle(device.type, index)


def explain(op: str, *args: Any, **kwargs: Any) -> Decision:
    """What `calm_fast.ops.<op>(*args, **kwargs)` would run, and why.

    Args:
        op: name of a public op, for instance "cross_attention".
        *args, **kwargs: exactly what the op would be called with.
    Returns:
        a Decision(op, impl, reason).
    Raises:
        ValueError for an unknown op, TypeError for arguments that the op does not have or that are missing, and
        whatever the op itself would raise for these arguments.
    """
    known = importlib.import_module("calm_fast.ops").OPS
    if op not in known:
        raise ValueError(f"explain: `op` must be one of {', '.join(map(repr, known))}, got {op!r}")
    decide = importlib.import_module(f"calm_fast._ops.{op}.api").decide
    try:
        inspect.signature(decide).bind(*args, **kwargs)
    except TypeError as problem:  # in the words of the op, which the caller knows
        raise TypeError(f"explain: {op}: {problem}") from None
    return decide(*args, **kwargs)


@functools.cache
def warn_once(message: str) -> None:
    """Warn with `message`, once per process."""
    warnings.warn(message, stacklevel=3)
