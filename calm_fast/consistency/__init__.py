"""Answers of sampled rationales: extraction and equivalence."""

from calm_fast.consistency.answers import equivalent, extract_answer

__all__ = ["equivalent", "extract_answer"]
