"""The cases, one file per op: contestants, costs and targets."""
