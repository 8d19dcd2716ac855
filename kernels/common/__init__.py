"""Code that the Triton kernels of every op share: launching, device arithmetic, code generation specs."""
