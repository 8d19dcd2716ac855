"""The seam for the compiled library: why it is not there.

The library itself (C++ for the CPU, CUDA for latency) is not part of this version; every op therefore
refuses impl="native" with the reason below, and impl="auto" never chooses it.
"""

from __future__ import annotations


def obstacle(name: str) -> str | None:
    """Why the compiled implementation `name` cannot run; None where it can."""
    return f"this version of calm_fast has no compiled library (no native `{name}`)"
