"""What the Triton kernels of every op share."""
