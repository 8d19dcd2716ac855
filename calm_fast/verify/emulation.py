"""Runs the CUDA kernels of csrc/ on a CPU: g++ compiles them against the emulation, ctypes calls them.

Slow and watchful: every access to memory is checked (csrc/emulation/cuda_emulation.hpp says for what). One shared
library per op, from csrc/<op>/<part>_emulated.cpp, built once per process. It needs g++ and csrc/, which a source
checkout and an sdist have, and a wheel has not: emulation proves the sources, not an installation.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++20", "-O1", "-g", "-fPIC", "-shared", "-Wall", "-Wextra", "-ffp-contract=off", "-DCALM_FAST_EMULATED")
ORDERS = {"forward": 0, "reverse": 1, "random": 2}


class EmulationError(RuntimeError):
    """The emulation found a bug in a kernel, or could not launch it."""


@dataclass(frozen=True)
class Schedule:
    """In which order threads run: "forward", "reverse", or "random" from `seed`; `resident` blocks at a time."""

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
    """Why the CUDA kernels of `op` cannot be emulated here; None where they can."""
    if not CSRC.is_dir():
        return "no csrc/ in this installation: the kernels are emulated from a source checkout"
    if not source(op).is_file():
        return f"{op} has no CUDA kernel in csrc/"
    if shutil.which("g++") is None:
        return "g++ is not on the PATH"
    return None


def source(op: str, csrc: Path = CSRC) -> Path:
    """The file that is compiled for the emulation; csrc/<op>/<op>_emulated.cpp, which is absent, if there is none."""
    return next((csrc / op).glob("*_emulated.cpp"), csrc / op / f"{op}_emulated.cpp")


def kernels(op: str, csrc: Path = CSRC) -> Path:
    """The device code that `source` includes: <part>.cuh beside <part>_emulated.cpp."""
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
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="calm_fast_emulated_")


@functools.cache
def library_of(op: str, csrc: Path = CSRC) -> ctypes.CDLL:
    """The compiled emulation of `op`, built on first use."""
    file = Path(_folder().name) / f"{op}_{abs(hash(csrc)):x}.so"
    compile_emulated(op, csrc, file)
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
        tensors: contiguous CPU tensors (None where optional) in the order csrc/<op>/<part>_emulated.cpp names.
        integers, floats: the other arguments, likewise.
    Raises:
        EmulationError: what the emulation found, with block and thread, array and index.
    """
    for i, t in enumerate(tensors):
        if t is not None and (t.device.type != "cpu" or not t.is_contiguous()):
            raise ValueError(f"{op}: tensor {i} must be contiguous and on the CPU")
    # an empty tensor has no address, and a null pointer stands for None
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


def has_adapter(op: str) -> bool:
    """Whether `op` has CUDA kernels that can be emulated where csrc/ is."""
    return importlib.util.find_spec(f"calm_fast.verify.emulated.{op}") is not None


def adapter(op: str) -> ModuleType:
    """calm_fast/verify/emulated/<op>.py: the op's arguments in, the op's results out."""
    return importlib.import_module(f"calm_fast.verify.emulated.{op}")
