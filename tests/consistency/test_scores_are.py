"""Log-probabilities as scores of existing samples, and the old place of read_rows."""

from __future__ import annotations

import importlib
import json
import math
import sys
from typing import Any

import pytest
import torch

from calm_fast import SelfConsistency, consistency

SAMPLES = [rf"\boxed{{{n}}}" for n in (7, 7, 7, 7, 7, 9)]
LOGS = [-0.5, -0.6, -0.4, -0.5, -0.5, -0.9]
ROW = {"question": "?", "answer": "7", "generated_answer": SAMPLES, "scores": LOGS}


def voted(rule: str, row: dict[str, Any] = ROW, **options: Any) -> Any:
    (result,) = SelfConsistency(rule=rule, progress=False).from_samples([row], **options)
    return result


@pytest.mark.parametrize(("rule", "plus"), [("weighted", 0.0), ("adaptive", 1.0)])
def test_log_probabilities_are_weights_relative_to_the_largest(rule, plus) -> None:
    result = voted(rule, scores_are="log")
    weights = [plus + math.exp(log - max(LOGS)) for log in LOGS]
    assert (result.answer, result.credit, result.scores) == ("7", 1.0, LOGS)
    assert result.weight == pytest.approx(sum(weights[:5])) and result.total == pytest.approx(sum(weights))


def test_tiny_probabilities_and_samples_that_do_not_vote() -> None:
    """Sums over long texts underflow, and a sample without an answer is not the largest."""
    row = {**ROW, "generated_answer": [*SAMPLES, "no answer here"], "scores": [*(x - 5000 for x in LOGS), -1.0]}
    assert voted("weighted", row, scores_are="log").total == pytest.approx(sum(math.exp(x + 0.4) for x in LOGS))
    missing = voted("weighted", {**ROW, "scores": [*LOGS[:5], None]}, scores_are="log")
    assert missing.total == pytest.approx(sum(math.exp(x + 0.4) for x in LOGS[:5]) * 6 / 5)  # the mean of the others
    none = voted("weighted", {**ROW, "scores": [None] * 6}, scores_are="log")
    assert (none.answer, none.total) == ("7", 6.0)


@pytest.mark.parametrize("rule", ["weighted", "adaptive"])
def test_negative_weights_are_refused_with_a_way_out(rule) -> None:
    row = {**ROW, "scores": [4 * log for log in LOGS]}
    with pytest.raises(ValueError, match=r"SelfConsistency: `scores` must be weights .* in row 0 .*scores_are='log'"):
        voted(rule, row)
    assert voted("count", row).answer == "7"  # counts no score


def test_what_scores_are_is_checked_and_belongs_to_the_run(tmp_path) -> None:
    with pytest.raises(ValueError, match="SelfConsistency: `scores_are` must be 'weights' or 'log', got 'logits'"):
        voted("weighted", scores_are="logits")

    class Ranker:
        def score(self, questions: Any, rationales: Any) -> Any:
            return [torch.ones(len(group)) for group in rationales]

    with pytest.raises(ValueError, match="`scores_are` must be 'weights' with a ranker"):
        SelfConsistency(ranker=Ranker(), progress=False).from_samples([ROW], scores_are="log")
    out = tmp_path / "votes.jsonl"
    first = voted("weighted", out=out, scores_are="log")
    assert voted("weighted", out=out, scores_are="log") == first
    with pytest.raises(ValueError, match="other settings .*scores_are: 'log'"):
        voted("weighted", {**ROW, "scores": [1.0] * 6}, out=out)
    (again,) = SelfConsistency(rule="weighted", progress=False).from_samples(out, scores_are="log")
    assert again == first


def test_rows_can_be_read_under_the_old_name(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    sys.modules.pop("calm_fast.consistency.samples", None)
    with pytest.warns(DeprecationWarning, match="import read_rows and write_rows from calm_fast.consistency"):
        old = importlib.import_module("calm_fast.consistency.samples")
    assert old.read_rows is consistency.read_rows and old.write_rows is consistency.write_rows
    assert old.read_rows(tmp_path / "rows.jsonl") == [ROW]
