"""Adapters of the CPU emulation, one file per op with CUDA kernels. For source checkouts: wheels do not hold them.

`run(inputs, schedule)` fills the outputs with poison, runs the emulated kernels, and returns the quantities of a case;
None for a case that the kernels leave to another implementation.
"""
