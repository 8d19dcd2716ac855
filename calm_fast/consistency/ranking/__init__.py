"""A ranking model over any encoder: inputs, losses, training and files."""
