"""Triton kernels of linear_logprob: a sweep over the vocabulary, and logit gradients."""
