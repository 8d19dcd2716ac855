"""Modes for tests of code that must not wait for a GPU, on machines without one.

`values_unread` makes CPU tensors pass for tensors of a GPU, whose values must not be read, and `NoReading` fails where
a value is read all the same. `FakeCuda` runs shapes through the code's CUDA branches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from calm_fast.core import checks

_READS = frozenset(
    "tolist item numpy cpu nonzero equal is_nonzero __bool__ __int__ __float__ __index__ __array__".split()
)
_READING_OPS = frozenset("_local_scalar_dense nonzero equal is_nonzero masked_select unique_consecutive".split())


class NoReading(TorchFunctionMode):
    """Raises AssertionError where Python reads a tensor's value: methods, and the ops below them."""

    def __enter__(self) -> NoReading:
        self.ops = _NoReadingOps()
        self.ops.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.ops.__exit__(*args)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        assert name not in _READS, f"a value is read by {name}"
        return function(*args, **(kwargs or {}))


class _NoReadingOps(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in _READING_OPS, f"a value is read by aten::{name}"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index: its shape is data"
        return function(*args, **(kwargs or {}))


@contextmanager
def values_unread() -> Iterator[None]:
    """Make every function of calm_fast believe that values of tensors are not to be read, as those of a GPU."""
    originals = (checks.readable, checks.values_checked)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("calm_fast"):
                for original in originals:
                    if getattr(module, original.__name__, None) is original:
                        patch.setattr(module, original.__name__, lambda tensor: False)
        yield


class FakeCuda(TorchFunctionMode):
    """Makes new tensors fake ones on "cuda", also with a torch that was built without CUDA.

    Such a torch has no device guard, which these methods of a tensor ask for. They are replaced by ops that need none,
    and methods that write in place by nothing, since there are no values. Autograd cannot record there.
    """

    _CASTS = {"long": torch.int64, "int": torch.int32, "float": torch.float32, "bool": torch.bool}

    def __enter__(self) -> FakeCuda:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(nn.Module, "to", lambda module, *args, **kwargs: module)
        self.patch.setattr("calm_fast._ops.cross_attention.api.triton_obstacle", lambda device: None)
        self.modes = (FakeTensorMode(), torch.device("cuda"))
        for mode in self.modes:
            mode.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for mode in reversed(self.modes):
            mode.__exit__(*args)
        self.patch.undo()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        first = args[0] if args else kwargs.get("tensor")  # functions of torch.nn.init are called by keyword
        if not isinstance(first, torch.Tensor) or first.device.type != "cuda":
            return function(*args, **kwargs)
        aten = torch.ops.aten
        if name == "__getitem__":
            return _index(*args)
        if name == "__setitem__":
            return None
        if name == "__invert__":
            return aten.bitwise_not(first)
        if name == "contiguous":
            return first if first.is_contiguous() else aten.clone(first, memory_format=torch.contiguous_format)
        if name == "to" or name in self._CASTS:
            given = [*args[1:], *kwargs.values()]
            devices = [torch.device(one).type for one in given if isinstance(one, (str, torch.device))]
            assert "cpu" not in devices, "a tensor leaves the GPU"
            found = (one if isinstance(one, torch.dtype) else one.dtype for one in given if not _is_device(one))
            dtype = self._CASTS.get(name) or next(found, first.dtype)
            return first if first.dtype == dtype else aten._to_copy(first, dtype=dtype)
        if name.endswith("_") and not name.startswith("_") and name != "requires_grad_":
            return first
        return function(*args, **kwargs)


def _is_device(value: Any) -> bool:
    return not isinstance(value, (torch.dtype, torch.Tensor))


def _index(t: torch.Tensor, key: Any) -> torch.Tensor:
    """Return t[key] by ops that ask for no device guard."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if not any(one is Ellipsis for one in keys):
        keys.append(Ellipsis)
    dim, tensors = 0, {}
    for place, one in enumerate(keys):
        if one is Ellipsis:
            dim = t.dim() - sum(later is not None for later in keys[place + 1 :])
        elif one is None:
            t = t.unsqueeze(dim)
            dim += 1
        elif isinstance(one, slice):
            t = torch.ops.aten.slice(t, dim, one.start, one.stop, one.step or 1)
            dim += 1
        elif isinstance(one, int):
            t = t.select(dim, one)
        else:
            tensors[dim] = one
            dim += 1
    return torch.ops.aten.index(t, [tensors.get(i) for i in range(max(tensors) + 1)]) if tensors else t
