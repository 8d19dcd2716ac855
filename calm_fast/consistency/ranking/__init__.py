"""A ranking model over any encoder: its inputs, losses, training and files."""
