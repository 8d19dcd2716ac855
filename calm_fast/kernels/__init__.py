"""Triton kernels: one subpackage per op; `common` and `vocabulary` are shared.

They are installed from ``kernels/<op>`` at the repository root (see setup.py).

Importing this package imports nothing. Only ``calm_fast.kernels.<op>.*`` imports Triton, and ``calm_fast.ops`` imports
that on an op's first launch, so a machine without Triton never notices.
"""
