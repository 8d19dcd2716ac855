"""What linear_nce and linear_logprob share: logits of a vocabulary that are never stored as a whole."""
