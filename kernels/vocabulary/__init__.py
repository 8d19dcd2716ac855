"""Triton code that linear_nce and linear_logprob share: tiles of logits and running sums over them."""
