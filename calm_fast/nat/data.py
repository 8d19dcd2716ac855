"""Split rows of sampled rationales into right and wrong ones, and encode them as training examples."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.consistency.answers.gold import gold_answer
from calm_fast.consistency.answers.grouping import group_answers
from calm_fast.consistency.sampling.boundary import Continuation
from calm_fast.consistency.sampling.prompt import Prompt, prompt_form
from calm_fast.consistency.voting.samples import read_rows
from calm_fast.core.checks import check_whole_text
from calm_fast.core.token_ids import last_tokens

__all__ = ["Example", "Graded", "IGNORE", "RationaleDataset", "RightPadding", "grade", "read_rows", "split_rationales"]

IGNORE = -100


@dataclass(frozen=True)
class Example:
    """A question and one rationale to learn."""

    question: str
    rationale: str


@dataclass(frozen=True)
class Graded:
    """Right and wrong rationales. left_out: reason -> number of rows that gave no rationale for this reason."""

    right: list[Example]
    wrong: list[Example]
    left_out: dict[str, int]


def split_rationales(rows: Iterable[dict[str, Any]], *, progress: bool = True) -> tuple[list[Example], list[Example]]:
    """Return (right, wrong) rationales: a right one reaches the gold answer, a wrong one does not.

    A row's `answer` is a solution that ends in the gold answer, or the gold answer itself, as in `calm-fast vote`.
    Answers are compared as `group_answers` does. A rationale without an answer is wrong. Equal rationales of a
    question are taken once, and blank ones never: they would teach the end token alone. A row without a gold answer
    or without rationales is left out, and a UserWarning counts such rows.
    """
    graded = grade(rows, progress=progress)
    if graded.left_out:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in graded.left_out.items())
        warnings.warn(f"split_rationales: left out {sum(graded.left_out.values())} rows: {reasons}", stacklevel=2)
    return graded.right, graded.wrong


def grade(rows: Iterable[dict[str, Any]], *, progress: bool = True) -> Graded:
    """Return the rationales of `split_rationales`, with a count of the rows that are left out and no warning."""
    graded = []
    left_out: Counter[str] = Counter()
    for row in rows:
        gold = gold_answer(row["answer"])
        if gold is None:
            left_out["a blank `answer`"] += 1
        elif not (rationales := [text for text in dict.fromkeys(row["generated_answer"]) if text.strip()]):
            left_out["an empty `generated_answer`"] += 1
        else:
            for rationale in rationales:
                graded.append((Example(row["question"], rationale), (extract_answer(rationale), gold)))
    # each pair is a question of its own, because nothing depends on equality between wrong answers
    pairs = list(dict.fromkeys(pair for _, pair in graded))
    groups = group_answers([[answer] for answer, _ in pairs], gold=[gold for _, gold in pairs], progress=progress)
    reached = dict(zip(pairs, groups.right.any(1).tolist(), strict=True))
    right = [example for example, pair in graded if reached[pair]]
    wrong = [example for example, pair in graded if not reached[pair]]
    return Graded(right, wrong, dict(left_out))


class RationaleDataset(Dataset[dict[str, list[int]]]):
    """Examples as token ids. The loss covers the rationale and the end token, not the question.

    A long question loses its beginning, so that at least half of `max_length` is left for the rationale.

    Args:
        prompt, system, chat_template_kwargs: form of the prompts, as in `SelfConsistency`: by default the tokenizer's
            chat template, or the question and a newline without one. `form` keeps it, and the stages record it on the
            model that they train.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        max_length: int = 512,
        *,
        prompt: Prompt = None,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not examples:
            raise ValueError("RationaleDataset: `examples` must hold at least one rationale, got none")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "RationaleDataset: `tokenizer` must have an end-of-sequence token, got none; set eos_token"
            )
        self.form = prompt_form(
            prompt, tokenizer, "RationaleDataset", system=system, chat_template_kwargs=chat_template_kwargs
        )
        after = Continuation(tokenizer)
        for place, example in enumerate(examples):
            check_whole_text("RationaleDataset", f"examples[{place}]", example.question)
            check_whole_text("RationaleDataset", f"examples[{place}]", example.rationale)
        self.items = [self._encode(e, tokenizer, after, max_length) for e in examples]

    def _encode(self, example: Example, tokenizer: Any, after: Continuation, max_length: int) -> dict[str, list[int]]:
        prompt = self.form.ids(tokenizer, example.question)
        answer = after.ids(example.rationale, None, prompt) + [tokenizer.eos_token_id]
        room = max(max_length - len(answer), max_length // 2)
        if self.form.chat is not None and len(prompt) > room:
            prompt = self._shortened(example.question, tokenizer, room)
        prompt = last_tokens(tokenizer, prompt, room)
        ids = (prompt + answer)[:max_length]
        return {"input_ids": ids, "labels": ([IGNORE] * len(prompt) + answer)[:max_length]}

    def _shortened(self, question: str, tokenizer: Any, room: int) -> list[int]:
        """Return the prompt of the longest end of a question that fits; the words of the template stay whole."""
        low, high = 0, len(question)  # the end from `high` on fits, or nothing does
        while low < high:
            middle = (low + high) // 2
            if len(self.form.ids(tokenizer, question[middle:])) <= room:
                high = middle
            else:
                low = middle + 1
        prompt = self.form.ids(tokenizer, question[high:])
        if len(prompt) > room:
            raise ValueError(
                f"RationaleDataset: `max_length` must leave room for the chat template, {len(prompt)} tokens without a "
                f"question, beside a rationale, got room for {room}; raise it, or use prompt='plain'"
            )
        return prompt

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


@dataclass(frozen=True)
class RightPadding:
    """Collates examples into a batch: input_ids, attention_mask and labels (B, longest) int64."""

    pad_id: int

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(item["input_ids"]) for item in items)

        def pad(key: str, value: int) -> torch.Tensor:
            return torch.tensor([item[key] + [value] * (longest - len(item[key])) for item in items])

        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "input_ids": pad("input_ids", self.pad_id),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "labels": pad("labels", IGNORE),
        }
