"""Code that vote and maj_at_k share: rules, weights of samples, ordered sums."""
