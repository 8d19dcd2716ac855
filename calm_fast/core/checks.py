"""Argument checks shared by every public function.

Errors have one grammar: "<where>: `<argument>` must be <what>, got <what came>". `bad_value` and `bad_type` write it.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import numbers
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_validate_gpu_values: contextvars.ContextVar[bool] = contextvars.ContextVar("validate_values", default=False)


@contextlib.contextmanager
def validate_values() -> Iterator[None]:
    """Within this block, run the checks that read tensor values on GPU tensors too. Each one synchronises the GPU."""
    token = _validate_gpu_values.set(True)
    try:
        yield
    finally:
        _validate_gpu_values.reset(token)


def readable(tensor: torch.Tensor) -> bool:
    """Return True if reading the values of `tensor` is cheap: it is a real CPU tensor, and nothing is being traced.

    A tensor that torch.func batches or differentiates stands for others, whose values cannot be read.
    """
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type == "cpu"


def values_checked(tensor: torch.Tensor) -> bool:
    """Return True if checks that read the values of `tensor` should run: see `readable` and `validate_values`."""
    if readable(tensor):
        return True
    if torch.compiler.is_compiling() or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.device.type != "meta" and _validate_gpu_values.get()


def require_async(condition: torch.Tensor, message: str) -> None:
    """Assert a bool scalar on its device, without waiting for it and inside traced graphs too.

    On a CPU a false condition raises RuntimeError with `message`. On a CUDA device it stops the process's work there (a
    device-side assert): use it only where reading the value would cost a synchronisation per step. Other devices may
    have no such assertion and are read, except in a traced graph.
    """
    if condition.device.type in ("cpu", "cuda", "meta") or torch.compiler.is_compiling():
        torch._assert_async(condition, message)  # torch has no public name for it
    elif not bool(condition):
        raise RuntimeError(message)


def describe(value: Any) -> str:
    """Return a short description of an argument for an error message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, dtype {value.dtype}, on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def bad_value(where: str, name: str, expected: str, got: str) -> ValueError:
    """Return the ValueError for argument `name` of `where`, a function or a class."""
    return ValueError(f"{where}: `{name}` must be {expected}, got {got}")


def bad_type(where: str, name: str, expected: str, value: Any) -> TypeError:
    """Return the TypeError for argument `name` of `where`; it describes `value`."""
    return TypeError(f"{where}: `{name}` must be {expected}, got {describe(value)}")


@contextlib.contextmanager
def errors_of(where: str) -> Iterator[None]:
    """Re-raise argument errors of inner functions under the name of `where`, whose arguments have the same names."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        if match := re.match(r"[\w.]+: (?=`)", str(problem)):
            raise type(problem)(f"{where}: {str(problem)[match.end() :]}") from problem
        raise


def check_tensor(
    where: str, name: str, value: Any, dims: str, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> None:
    """Check that `value` is a dense tensor with the dimensions that `dims` names, one of `dtypes`, on `device`.

    dims: for instance "(B, M, H, D)". device: None accepts any.

    Raises:
        TypeError: `value` is not a tensor, or its dtype is not in `dtypes`.
        ValueError: wrong rank, layout or device.
    """
    if not isinstance(value, torch.Tensor):
        raise bad_type(where, name, f"a tensor {dims}", value)
    if value.layout != torch.strided:
        raise bad_value(where, name, "a dense (strided) tensor", f"layout {value.layout}")
    rank = len(dims.strip("(,)").split(","))  # "(T,)" has one
    if value.dim() != rank:
        raise bad_value(where, name, f"{rank}-dimensional {dims}", f"shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{where}: `{name}` must have dtype {names}, got {value.dtype}")
    if device is not None and value.device != device:
        raise bad_value(where, name, f"on {device} like the other tensors", f"device {value.device}")


def check_finite_number(where: str, name: str, value: Any) -> None:
    """Check that `value` is a finite real number. A bool is not a number."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise bad_type(where, name, "a finite number", value)
    # comparisons instead of math.isfinite: torch.compile may trace a float as a symbol, which can only be compared
    if not isinstance(value, torch.SymFloat) and not -math.inf < value < math.inf:  # type: ignore[operator]  # Real
        raise bad_value(where, name, "finite", str(value))


def check_whole_text(where: str, name: str, text: Any) -> None:
    """Raise TypeError unless `text` is a string, ValueError if it holds half a character, as JSON can.

    No tokenizer takes half a character.
    """
    if not isinstance(text, str):
        raise bad_type(where, name, "a string", text)
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise bad_value(where, name, "text", "half a character (one of \\ud800 to \\udfff)") from problem


def check_pair(where: str, name: str, value: Any, halves: str) -> tuple[float, float]:
    """Return `value` as a pair of floats: two finite numbers, or one number for both.

    halves: the names of the two, for the message.
    """
    expected = f"a number or a pair ({halves})"
    if not isinstance(value, (tuple, list)):
        if not isinstance(value, numbers.Real):
            raise bad_type(where, name, expected, value)
        check_finite_number(where, name, value)
        return float(value), float(value)
    if len(value) != 2:
        raise bad_value(where, name, expected, f"{len(value)} entries")
    for i, number in enumerate(value):
        check_finite_number(where, f"{name}[{i}]", number)
    return float(value[0]), float(value[1])


def check_bool(where: str, name: str, value: Any) -> None:
    """Check that `value` is a bool."""
    if not isinstance(value, bool):
        raise bad_type(where, name, "True or False", value)
