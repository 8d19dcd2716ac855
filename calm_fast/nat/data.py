"""Rows of sampled rationales, split into right and wrong ones, as training examples."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from calm_fast.consistency.answers.equality import extract_answer
from calm_fast.consistency.answers.grouping import group_answers
from calm_fast.consistency.voting.consensus import solution
from calm_fast.consistency.voting.samples import read_rows

__all__ = ["Example", "Graded", "IGNORE", "RationaleDataset", "RightPadding", "grade", "read_rows", "split_rationales"]

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """A question and one rationale to learn."""

    question: str
    rationale: str


@dataclass(frozen=True)
class Graded:
    """Right and wrong rationales, and how many rows gave none: reason -> rows, only where there are any."""

    right: list[Example]
    wrong: list[Example]
    left_out: dict[str, int]


def split_rationales(rows: Iterable[dict[str, Any]], *, progress: bool = True) -> tuple[list[Example], list[Example]]:
    """(right, wrong) rationales: right ones reach the gold answer (math-verify after cheaper tests), wrong ones do not.

    A row's `answer` is a solution that ends in the gold answer, or the answer itself, as in `calm-fast vote`. A
    rationale without an answer is wrong. Each question's rationales are kept once. A row whose `answer` is blank, or
    that has no rationale, is left out; a UserWarning counts them.
    """
    graded = grade(rows, progress=progress)
    if graded.left_out:
        told = ", ".join(f"{count} with {reason}" for reason, count in graded.left_out.items())
        warnings.warn(f"split_rationales: left out {sum(graded.left_out.values())} rows: {told}", stacklevel=2)
    return graded.right, graded.wrong


def grade(rows: Iterable[dict[str, Any]], *, progress: bool = True) -> Graded:
    """What `split_rationales` finds, the rows it leaves out counted and not warned of."""
    graded = []
    left_out: Counter[str] = Counter()
    for row in rows:
        gold = solution(row["answer"], None)
        if gold is None:
            left_out["a blank `answer`"] += 1
        elif not row["generated_answer"]:
            left_out["an empty `generated_answer`"] += 1
        else:
            for rationale in dict.fromkeys(row["generated_answer"]):
                graded.append((Example(row["question"], rationale), (extract_answer(rationale), gold)))
    # each pair is a question of its own: whether two wrong answers are equal does not matter here
    pairs = list(dict.fromkeys(pair for _, pair in graded))
    groups = group_answers([[answer] for answer, _ in pairs], gold=[gold for _, gold in pairs], progress=progress)
    same = groups.valid & (groups.answers == groups.correct[:, None])
    reached = dict(zip(pairs, same.any(1).tolist(), strict=True))
    right = [example for example, pair in graded if reached[pair]]
    wrong = [example for example, pair in graded if not reached[pair]]
    return Graded(right, wrong, dict(left_out))


class RationaleDataset(Dataset):
    """Examples as token ids; the loss covers the rationale and the end token, not the question."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any, max_length: int = 512) -> None:
        if not examples:
            raise ValueError("RationaleDataset: `examples` must hold at least one rationale")
        if tokenizer.eos_token_id is None:
            raise ValueError("RationaleDataset: `tokenizer` must have an end-of-sequence token")
        self.items = [self._encode(e, tokenizer, max_length) for e in examples]

    @staticmethod
    def _encode(example: Example, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
        prompt = tokenizer(f"{example.question}\n", add_special_tokens=True)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
        answer = tokenizer(example.rationale, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        # a long question loses its beginning, so that at least half of the window is left for the rationale
        prompt = prompt[-max(max_length - len(answer), max_length // 2) :]
        ids = (prompt + answer)[:max_length]
        return {"input_ids": ids, "labels": ([IGNORE] * len(prompt) + answer)[:max_length]}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


@dataclass(frozen=True)
class RightPadding:
    """Collate examples to a batch: input_ids, attention_mask, labels (B, longest) int64."""

    pad_id: int

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)

        def padded(key: str, value: int) -> torch.Tensor:
            return torch.tensor([item[key] + [value] * (longest - len(item[key])) for item in items])

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "labels": padded("labels", IGNORE),
        }
