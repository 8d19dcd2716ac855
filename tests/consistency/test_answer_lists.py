"""The labelled lists of texts and pairs in tests/consistency/data; docs/consistency.md has their scores."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from calm_fast.consistency import extract_answer, group_answers

DATA = Path(__file__).parent / "data"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_the_lists_are_as_large_as_the_docs_say() -> None:
    texts, pairs = rows("answers_in_texts.jsonl"), rows("equal_answers.jsonl")
    assert len(texts) >= 300 and len(pairs) >= 350
    assert len({row["style"] for row in texts}) == 12 and min(Counter(row["style"] for row in texts).values()) >= 25
    assert len({row["text"] for row in texts}) == len(texts)
    assert len({(row["left"], row["right"]) for row in pairs}) == len(pairs)


@pytest.mark.parametrize("name", ["answers_in_texts.jsonl", "awkward_texts.jsonl"])
def test_every_answer_is_found(name) -> None:
    texts = rows(name)
    found = [extract_answer(row["text"]) for row in texts]
    groups = group_answers([[text] for text in found], gold=[row["answer"] for row in texts], workers=1)
    wrong = [
        (row["text"], text, row["answer"])
        for row, text, right in zip(texts, found, groups.right[:, 0].tolist(), strict=True)
        if (text is not None if row["answer"] is None else not right)
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["equal_answers.jsonl", "awkward_pairs.jsonl"])
def test_pairs_are_equal_where_they_are_labelled_so(name) -> None:
    """In both orders."""
    pairs = rows(name)
    for left, right in (("left", "right"), ("right", "left")):
        groups = group_answers([[row[right]] for row in pairs], gold=[row[left] for row in pairs], workers=1)
        found = groups.right[:, 0].tolist()
        wrong = [
            (row["left"], row["right"]) for row, same in zip(pairs, found, strict=True) if same is not row["equal"]
        ]
        assert wrong == [] and groups.timeouts == 0
