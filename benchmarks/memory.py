"""Whether a CPU's tensors get memory that the process kept, or fresh from the system, while something is timed.

glibc maps a large block anew for every allocation and gives it back on release; the pages must then be found and
cleared again, at a price that depends on what the process freed before and, in a virtual machine, on the host's hour.
CUDA's caching allocator keeps what was released for the next call, and on a CPU so do jemalloc and tcmalloc. Kept is
therefore the default here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

KEPT, SYSTEM = "kept", "system"
CHOICES = (KEPT, SYSTEM)
LABEL = "memory from the system"  # beside the device's name in every row; kept memory needs no word
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of mallopt's parameters in glibc's malloc.h
_OPTIONS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # no block is mapped on its own; released memory is never given back
_kept = False


class RefusedError(ValueError):
    """Why the memory cannot be what was asked for."""


def obstacle() -> str | None:
    """Why this process cannot keep its memory; None where it can."""
    library = _c_library()
    if library is None or not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return "only glibc can be told to keep released memory (mallopt), and this Python runs on another C library"
    return None


def keep() -> None:
    """Let whatever a call releases stay with this process for the next call, for as long as the process lives.

    Raises:
        RefusedError: this C library cannot do it, or refuses to.
    """
    global _kept
    reason = obstacle()
    if reason:
        raise RefusedError(reason)
    for name, value in _OPTIONS.items():
        if _c_library().mallopt(name, value) != 1:
            raise RefusedError(f"glibc refuses mallopt({name}, {value})")
    _kept = True


def reserve(size: int) -> None:
    """Where memory is kept: have `size` bytes that were used before, at most a quarter of what the machine has left.

    The blocks of a call meet the gaps that others left in another order every round; where none is large enough the
    heap grows in the middle of a timed call, and new pages took half a second of a call of 2.5 (scores of 403 MB).
    """
    if _kept:
        torch.empty(min(size, _available() // 4), dtype=torch.uint8).fill_(1)


def _available() -> int:
    """Bytes that this process could still get, also in a container; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    except OSError:
        return 0
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # another system, or "max"
        return free
    return max(0, min(free, limit - used))


def settle(device: torch.device, wanted: str | None = None) -> str:
    """Make this process's memory what is wanted on `device`, once, before anything is timed.

    Args:
        device: on a GPU nothing is changed. wanted: "kept", "system", or None: kept where that is possible.
    Returns:
        what rows must say beside the device's name: LABEL, or "" for kept memory and for a GPU.
    Raises:
        RefusedError: kept memory is asked for and impossible, or the process keeps its memory already.
    """
    if device.type != "cpu":
        return ""
    if wanted == SYSTEM or (wanted is None and obstacle()):
        if _kept:
            raise RefusedError("this process keeps its memory already, and that cannot be undone: start another one")
        return LABEL
    keep()
    return ""


def _c_library() -> ctypes.CDLL | None:
    """The C library that this process runs on."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # a system without that notion
        return None
