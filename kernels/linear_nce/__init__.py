"""Triton kernels of linear_nce: sweeps over the vocabulary, and the one-pass training step for a frozen head."""
