"""Implementations from torch's own ops: the fast path on a CPU, the fallback everywhere."""
