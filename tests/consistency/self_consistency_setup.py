"""The run that the tests of SelfConsistency repeat, also in a process of its own."""

from __future__ import annotations

from typing import Any

from tiny_models import FAMILIES, character_tokenizer

from calm_fast import SelfConsistency

QUESTIONS = [f"{a}+{b}?" for a, b in ((1, 2), (33, 4), (5, 66), (7, 8), (9, 99), (12, 3), (4, 4), (0, 1))]
REFERENCES = ["3", None, "\\boxed{71}", "15", "108", "15", "8", "1"]


def consistency(model: Any = None, **changes: Any) -> SelfConsistency:
    """Two questions at a time, six samples each; the last digit of a sample is its answer."""
    settings = {
        "n": 6, "batch_size": 12, "max_new_tokens": 24, "temperature": 1.2, "pattern": r"\d", "progress": False,
        "prompt": "{question}",
    }  # fmt: skip
    model = FAMILIES["llama"].model(0) if model is None else model
    return SelfConsistency(model, character_tokenizer(), **(settings | changes))
