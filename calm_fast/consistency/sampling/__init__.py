"""Sampling rationales from a model and scoring them: prompts read once, log-probabilities, early stopping."""
