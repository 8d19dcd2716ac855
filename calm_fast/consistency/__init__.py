"""Self-consistency: answers of sampled rationales, which of them are equal, their scores and the vote."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that defines it; loaded on first use, so that no name costs another's imports
_LAZY = {
    "Groups": "grouping",
    "Ranker": "ranker",
    "RankerHead": "ranker",
    "RankerSettings": "ranker_training",
    "SelfConsistency": "self_consistency",
    "SelfConsistencyResult": "consensus",
    "SequenceScores": "scoring",
    "any_at_k": "curves",
    "equivalent": "answers",
    "extract_answer": "answers",
    "group_answers": "grouping",
    "leader_probability": "stopping",
    "pair_accuracy": "ranker_losses",
    "ranking_loss": "ranker_losses",
    "score_sequences": "scoring",
    "should_stop": "stopping",
    "train_ranker": "ranker_training",
    "read_rows": "samples",
    "write_rows": "samples",
}

__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'calm_fast.consistency' has no attribute {name!r}")
    from calm_fast.core.compatibility import importing

    with importing("transformers"):
        value = getattr(importlib.import_module(f"calm_fast.consistency.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
