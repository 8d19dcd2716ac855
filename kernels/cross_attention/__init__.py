"""Triton kernels of cross_attention: prefill and training (fwd, bwd_q, bwd_kv) and decode."""
