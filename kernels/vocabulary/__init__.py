"""Code that the Triton kernels of linear_nce and linear_logprob share: tiles of logits and running sums over them."""
