"""Final answers: extraction, equality, groups of equal answers."""
