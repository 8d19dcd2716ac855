"""Keep released CPU memory in the process while something is timed, or return it to the system.

glibc maps a large block anew for every allocation and unmaps it on release. The kernel must then find and clear the
pages again, at a cost that depends on what the process freed before and, in a virtual machine, on the load of the host.
CUDA's caching allocator keeps released memory for the next call, and on a CPU so do jemalloc and tcmalloc. Keeping it
is therefore the default here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

KEPT, SYSTEM = "kept", "system"
CHOICES = (KEPT, SYSTEM)
LABEL = "memory from the system"  # added to the device's name in every row; kept memory is not mentioned
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
_OPTIONS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # map no block on its own; never return released memory
_kept = False


class RefusedError(ValueError):
    """The requested memory policy is impossible; the message gives the reason."""


def obstacle() -> str | None:
    """Return the reason why this process cannot keep its memory, or None if it can."""
    library = _c_library()
    if library is None or not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return "only glibc can be told to keep released memory (mallopt), and this Python runs on another C library"
    return None


def keep() -> None:
    """Keep all memory that a call releases in this process, for the rest of its life.

    Raises:
        RefusedError: the C library has no such option, or refuses it.
    """
    global _kept
    library, reason = _c_library(), obstacle()
    if library is None or reason:
        raise RefusedError(reason)
    for name, value in _OPTIONS.items():
        if library.mallopt(name, value) != 1:
            raise RefusedError(f"glibc refuses mallopt({name}, {value})")
    _kept = True


def reserve(size: int) -> None:
    """Grow the heap by `size` bytes of touched pages, at most a quarter of the available memory, if memory is kept.

    In every round a call finds the gaps of earlier calls in another order. If none is large enough, the heap grows in
    the middle of a timed call: new pages took half a second of a call of 2.5 s (scores of 403 MB).
    """
    if _kept:
        torch.empty(min(size, _available() // 4), dtype=torch.uint8).fill_(1)


def _available() -> int:
    """Return the bytes this process could still allocate, container limits included; 0 if unknown."""
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
    """Apply the memory policy to this process, once, before anything is timed.

    Args:
        device: a GPU needs no change. wanted: "kept", "system", or None for kept where possible.
    Returns:
        the remark that rows add to the device's name: LABEL, or "" for kept memory and for a GPU.
    Raises:
        RefusedError: "kept" is impossible, or "system" was requested after this process had begun to keep its memory.
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
    """Return the C library of this process, or None if the system has none to load."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # not a POSIX system
        return None
