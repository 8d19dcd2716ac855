"""Code that linear_nce and linear_logprob share: logits of a vocabulary, never stored as a whole."""
