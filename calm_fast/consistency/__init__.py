"""Self-consistency: answers of sampled rationales, which of them are equal, their scores and the vote."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that defines it; loaded on first use, so that no name costs another's imports
_LAZY = {
    "Groups": "answers.grouping",
    "Ranker": "ranking.ranker",
    "RankerHead": "ranking.ranker",
    "RankerSettings": "ranking.training",
    "SelfConsistency": "self_consistency",
    "SelfConsistencyResult": "voting.consensus",
    "SequenceScores": "sampling.scoring",
    "any_at_k": "voting.curves",
    "equivalent": "answers.equality",
    "extract_answer": "answers.equality",
    "group_answers": "answers.grouping",
    "leader_probability": "sampling.stopping",
    "pair_accuracy": "ranking.losses",
    "ranking_loss": "ranking.losses",
    "score_sequences": "sampling.scoring",
    "should_stop": "sampling.stopping",
    "train_ranker": "ranking.training",
    "read_rows": "voting.samples",
    "write_rows": "voting.samples",
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
