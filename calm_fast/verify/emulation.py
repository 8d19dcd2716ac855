"""Runs the CUDA kernels of csrc/ on a CPU: g++ compiles them against the emulation, ctypes calls them.

Every memory access is checked, which is slow (csrc/emulation/cuda_emulation.hpp lists the checks). Each op has one
shared library, built from csrc/<op>/<part>_emulated.cpp once per process.

This needs g++ and csrc/. A source checkout and an sdist have csrc/ and the adapters in verify/emulated/; a wheel has
neither, because emulation verifies the sources and not an installation. There `obstacle` gives the reason.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from calm_fast.core.checks import bad_value, describe
from calm_fast.verify.cases import op_cases

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# no -g, which makes compiling half as long again to twice as long: the emulation names arrays and indices itself
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-ffp-contract=off", "-DCALM_FAST_EMULATED")
# csrc/ -> more flags for the sources in it; the tests compile mutants, which run once, without optimisation
MORE_FLAGS: dict[Path, tuple[str, ...]] = {}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class EmulationError(RuntimeError):
    """The emulation found a bug in a kernel, or could not launch it."""


@dataclass(frozen=True)
class Schedule:
    """The order in which threads run: "forward", "reverse", or "random" from `seed`; `resident` blocks at a time."""

    order: str = "forward"
    seed: int = 0
    resident: int = 1


SCHEDULES = (Schedule("forward"), Schedule("reverse", resident=2), Schedule("random", 1, 3), Schedule("random", 2))


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Call(ctypes.Structure):
    _fields_ = [
        ("tensors", ctypes.POINTER(_Tensor)),
        ("integers", ctypes.POINTER(ctypes.c_int64)),
        ("floats", ctypes.POINTER(ctypes.c_double)),
        ("order", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("resident", ctypes.c_int64),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_int64),
    ]


def obstacle(op: str) -> str | None:
    """Return the reason why the CUDA kernels of `op` cannot be emulated here, or None if they can."""
    if not CSRC.is_dir():
        return "no csrc/ in this installation: the kernels are emulated from a source checkout"
    if not source(op).is_file():
        return f"{op} has no CUDA kernel in csrc/"
    if shutil.which("g++") is None:
        return "g++ is not on the PATH"
    return None


def source(op: str, csrc: Path = CSRC) -> Path:
    """Return the file that is compiled for the emulation; a file that does not exist if `op` has no CUDA kernel."""
    return next((csrc / op).glob("*_emulated.cpp"), csrc / op / f"{op}_emulated.cpp")


def kernels(op: str, csrc: Path = CSRC) -> Path:
    """Return the device code that `source` includes: <part>.cuh beside <part>_emulated.cpp."""
    file = source(op, csrc)
    return file.with_name(file.name.replace("_emulated.cpp", ".cuh"))


def compile_emulated(op: str, csrc: Path, library: Path, extra: Sequence[str] = ()) -> None:
    """Compile the emulated kernels of `op` from `csrc` into the shared library `library`.

    Raises:
        EmulationError with the compiler's messages.
    """
    command = ["g++", *FLAGS, *extra, f"-I{csrc}", str(source(op, csrc)), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise EmulationError(f"{op}: g++ failed:\n{done.stderr.strip()}")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="calm_fast_emulated_")


@functools.cache
def library_of(op: str, csrc: Path = CSRC) -> ctypes.CDLL:
    """Return the compiled emulation of `op`, built on first use."""
    file = Path(_folder().name) / f"{op}_{abs(hash(csrc)):x}.so"
    compile_emulated(op, csrc, file, MORE_FLAGS.get(csrc, ()))
    return ctypes.CDLL(str(file))


def call(
    op: str,
    tensors: Sequence[torch.Tensor | None],
    integers: Sequence[int] = (),
    floats: Sequence[float] = (),
    schedule: Schedule = SCHEDULES[0],
    csrc: Path = CSRC,
) -> None:
    """Run the emulated kernel of `op`; the outputs are among `tensors`.

    Args:
        tensors: contiguous CPU tensors, None for an absent optional one, in the order of csrc/<op>/<part>_emulated.cpp.
        integers, floats: the other arguments, in the order of that file.
        schedule: the order in which threads run.
    Raises:
        EmulationError: a bug that the emulation found, with block and thread, array and index.
        ValueError: a tensor is not contiguous or not on the CPU.
    """
    for i, t in enumerate(tensors):
        if t is not None and (t.device.type != "cpu" or not t.is_contiguous()):
            raise bad_value(op, f"tensors[{i}]", "contiguous and on the CPU", describe(t))
    # an empty tensor has no address, but the null pointer means None
    nothing = ctypes.create_string_buffer(16)
    raw = [
        _Tensor(None, 0) if t is None else _Tensor(t.data_ptr() or ctypes.addressof(nothing), t.numel())
        for t in tensors
    ]
    message = ctypes.create_string_buffer(2048)
    arguments = _Call(
        (_Tensor * max(1, len(raw)))(*raw),
        (ctypes.c_int64 * max(1, len(integers)))(*integers),
        (ctypes.c_double * max(1, len(floats)))(*floats),
        ORDERS[schedule.order],
        schedule.seed,
        schedule.resident,
        ctypes.cast(message, ctypes.c_char_p),
        len(message),
    )
    if getattr(library_of(op, csrc), f"calm_fast_emulated_{op}")(ctypes.byref(arguments)):
        raise EmulationError(f"{op} ({schedule.order}): {message.value.decode(errors='replace')}")


def has_kernels(op: str) -> bool:
    """Return True if `op` has CUDA kernels, in an installation without csrc/ too."""
    return bool(getattr(op_cases(op), "cuda_kernels", False))


def adapter(op: str) -> ModuleType:
    """Return calm_fast/verify/emulated/<op>.py, whose `run` computes the quantities of a case with the kernels."""
    return importlib.import_module(f"calm_fast.verify.emulated.{op}")
