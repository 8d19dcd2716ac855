"""Triton kernels of op_name."""
