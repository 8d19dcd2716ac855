"""`calm-fast verify`: run every implementation of every op against the float64 reference, and judge it."""
