"""What the implementations of an op share where loss and gradient are made in one pass."""
