"""One file per op with CUDA kernels: `run(inputs, schedule)` computes the quantities of a case with them, emulated.

It returns None for a case that the kernels leave to another implementation. Outputs are poisoned beforehand.
"""
