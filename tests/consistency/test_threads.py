"""Scoring and sampling leave alone what other threads run on the same model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, character_tokenizer, rows

from calm_fast.consistency import SelfConsistency, score_sequences

IDS = torch.tensor(rows(7, 7))


def score(model: Any) -> Any:
    return [result.sum.tolist() for result in score_sequences(model, rows(9, 4), [rows(5, 3), rows(2, 4)])]


def sample(model: Any) -> Any:
    settings = {"n": 2, "temperature": 0, "max_new_tokens": 4, "rule": "count", "progress": False}
    return [result.rationales for result in SelfConsistency(model, character_tokenizer(), **settings)(["3+4?"])]


@pytest.mark.seam(
    attach="another thread that runs the model meanwhile",
    to="SelfConsistency",
    result="works",
    why="scoring and sampling read and change their own thread's calls only",
)
@pytest.mark.parametrize("work", [score, sample])
def test_other_threads_get_the_models_own_logits(work: Callable[[Any], Any]) -> None:
    model, seen = FAMILIES["llama"].model(0), []
    with torch.no_grad():
        expected, alone = model(IDS, use_cache=False).logits, work(model)

    def run_beside() -> None:
        with torch.no_grad():
            seen.append(model(IDS, use_cache=False).logits)

    def beside(_module: Any, _args: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=run_beside)
            other.start()
            other.join()

    with model.model.layers[0].register_forward_pre_hook(beside):
        assert work(model) == alone
    assert seen and all(torch.equal(logits, expected) for logits in seen)
