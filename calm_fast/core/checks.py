"""Argument checks shared by every public op: name the argument, what was expected, what came."""

from __future__ import annotations

import contextlib
import contextvars
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_validate_gpu_values: contextvars.ContextVar[bool] = contextvars.ContextVar("validate_values", default=False)


@contextlib.contextmanager
def validate_values() -> Iterator[None]:
    """Within this block, checks that must read tensor values also run on GPU tensors (each one synchronises)."""
    token = _validate_gpu_values.set(True)
    try:
        yield
    finally:
        _validate_gpu_values.reset(token)


def readable(tensor: torch.Tensor) -> bool:
    """True where the values of `tensor` may be read cheaply: a real CPU tensor, and nothing is being traced."""
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu"


def values_checked(tensor: torch.Tensor) -> bool:
    """True where checks that read the values of `tensor` should run."""
    if readable(tensor):
        return True
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type != "meta" and _validate_gpu_values.get()


def describe(value: Any) -> str:
    """A short description of an argument for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, dtype {value.dtype}, on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def bad_value(op: str, name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{op}: `{name}` must be {expected}, got {got}")


def bad_type(op: str, name: str, expected: str, value: Any) -> TypeError:
    return TypeError(f"{op}: `{name}` must be {expected}, got {describe(value)}")


def check_tensor(
    op: str, name: str, value: Any, dims: str, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    """Check that `value` is a dense tensor with the dimensions named in `dims`, a dtype of `dtypes`, on `device`.

    Raises:
        TypeError: not a tensor, or a dtype outside `dtypes`. ValueError: wrong rank, layout or device.
    """
    if not isinstance(value, torch.Tensor):
        raise bad_type(op, name, f"a tensor {dims}", value)
    if value.layout != torch.strided:
        raise bad_value(op, name, "a dense (strided) tensor", f"layout {value.layout}")
    rank = len(dims.strip("(,)").split(","))  # "(T,)" has one
    if value.dim() != rank:
        raise bad_value(op, name, f"{rank}-dimensional {dims}", f"shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: `{name}` must have dtype {names}, got {value.dtype}")
    if device is not None and value.device != device:
        raise bad_value(op, name, f"on {device} like the other tensors", f"device {value.device}")


def check_finite_number(op: str, name: str, value: Any) -> None:
    """Check that `value` is a finite real number (bool is not one)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise bad_type(op, name, "a finite number", value)
    # comparisons, not math.isfinite: a float that torch.compile took for a symbol can be compared only
    if not isinstance(value, torch.SymFloat) and not -math.inf < value < math.inf:
        raise bad_value(op, name, "finite", str(value))


def check_pair(op: str, name: str, value: Any, halves: str) -> tuple[float, float]:
    """`value` as a pair: two finite numbers, or one for both. halves: what the two are, for the message."""
    expected = f"a number or a pair ({halves})"
    if not isinstance(value, (tuple, list)):
        if not isinstance(value, numbers.Real):
            raise bad_type(op, name, expected, value)
        check_finite_number(op, name, value)
        return float(value), float(value)
    if len(value) != 2:
        raise bad_value(op, name, expected, f"{len(value)} entries")
    for i, number in enumerate(value):
        check_finite_number(op, f"{name}[{i}]", number)
    return float(value[0]), float(value[1])


def check_bool(op: str, name: str, value: Any) -> None:
    """Check that `value` is a bool."""
    if not isinstance(value, bool):
        raise bad_type(op, name, "True or False", value)
