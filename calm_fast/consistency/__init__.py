"""Self-consistency: the answers of sampled rationales, their equality and scores, and a vote over them."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# public name -> the module that defines it; loaded on first use, so that no name pays for another's imports
_LAZY = {
    "Endpoint": "endpoint.client",
    "Groups": "answers.grouping",
    "Ranker": "ranking.ranker",
    "RankerHead": "ranking.ranker",
    "RankerSettings": "ranking.training",
    "SelfConsistency": "self_consistency",
    "SelfConsistencyResult": "voting.consensus",
    "SequenceScores": "sampling.scoring",
    "any_at_k": "voting.curves",
    "end_workers": "answers.math_pool",
    "equivalent": "answers.equality",
    "extract_answer": "answers.extraction",
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
    if name == "math_pool":
        warnings.warn(
            "calm_fast.consistency.math_pool is deprecated; calm_fast.consistency.end_workers() ends the idle workers",
            DeprecationWarning,
            stacklevel=2,
        )
        return importlib.import_module("calm_fast.consistency.answers.math_pool")
    if name not in _LAZY:
        raise AttributeError(f"module 'calm_fast.consistency' has no attribute {name!r}")
    from calm_fast.core.compatibility import importing

    with importing("transformers"):
        value = getattr(importlib.import_module(f"calm_fast.consistency.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
