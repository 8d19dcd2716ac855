"""Triton kernels of dual_lora: gate, rank update and their gradients."""
