"""Experiments that run the public API end to end; `calm-fast demo` is the first."""
