"""Random texts of an anchor and of augmenters with tokens of their own, whose rows grow at different rates."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from families import EOS

from calm_fast.hf import ComposedForCausalLM

# Roundings on the way to a logit, each of at most half an epsilon of the largest one: three layers of three products
# (attention, MLP, cross-attention) and the head, each a sum of about 32 terms. A batch and a row alone may add them in
# another order, and on some CPUs do.
ROUNDINGS = (3 * 3 + 1) * 32


def rounding(expected: torch.Tensor) -> float:
    """Return how far logits (or states) may be from `expected` by rounding alone."""
    return ROUNDINGS * torch.finfo(expected.dtype).eps / 2 * float(expected.detach().abs().max())


class Reader:
    """What one augmenter reads: 0 to 3 tokens per row in a step, often none, anywhere in the block."""

    def __init__(self, seed: int, rows: int, prompt: int, steps: int, even: bool = False) -> None:
        self.random = random.Random(seed)
        self.texts = [[self.random.randrange(2, EOS) for _ in range(4 + 3 * steps)] for _ in range(rows)]
        most = self.random.randrange(4)
        self.first = [most if even else self.random.randrange(4) for _ in range(rows)]
        self.added = [self._step(rows, even) for _ in range(steps)]
        # how many tokens exist after each token of the anchor: the prompt's read their own part of the first ones
        self.seen = [[min(n, self.random.randrange(5)) for _ in range(prompt - 1)] + [n] for n in self.first]
        for row in self.seen:
            row[:] = sorted(row)
        for step in self.added:
            for row, n in zip(self.seen, step, strict=True):
                row.append(row[-1] + n)
        self.slots: list[list[int]] = [[] for _ in range(rows)]
        self.masks: list[torch.Tensor] = []

    def _step(self, rows: int, even: bool) -> list[int]:
        if even:
            return [self.random.randrange(3)] * rows
        return [self.random.choice((0, 0, 1, 2, 3)) for _ in range(rows)]

    def block(self, step: int, queries: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the new ids (B, N) of a step, the mask of all slots, and hi (B, M) in slots."""
        counts = self.first if step == 0 else self.added[step - 1]
        ragged = len(set(counts)) > 1
        width, past = max(counts) + (ragged and self.random.random() < 0.3), sum(m.shape[1] for m in self.masks)
        ids = torch.full((len(counts), width), self.random.randrange(EOS))  # whatever stands in the padding
        real = torch.zeros(len(counts), width, dtype=torch.int64)
        for row, n in enumerate(counts):
            places = sorted(self.random.sample(range(width), n)) if self.random.random() < 0.4 else range(n)
            for place in places:
                ids[row, place] = self.texts[row][len(self.slots[row])]
                real[row, place] = 1
                self.slots[row].append(past + place)
        self.masks.append(real)
        hi = [
            [s[row[q] - 1] + 1 if row[q] else 0 for q in queries] for s, row in zip(self.slots, self.seen, strict=True)
        ]
        return ids, torch.cat(self.masks, 1), torch.tensor(hi, dtype=torch.int32)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, as a cache does that is reordered."""
        self.texts, self.slots, self.seen = (
            [list(of[row]) for row in rows] for of in (self.texts, self.slots, self.seen)
        )
        self.masks = [mask[rows] for mask in self.masks]
        self.added = [[step[row] for row in rows] for step in self.added]


@dataclass
class Ragged:
    """A batch of texts: the anchor's, with padding on the left, and each augmenter's own (None reads the anchor's)."""

    ids: torch.Tensor
    mask: torch.Tensor
    readers: list[Reader | None]
    prompt: int
    steps: int

    @classmethod
    def of(
        cls, seed: int, rows: int = 3, steps: int = 6, readers: int = 1, padded: bool = True, even: bool = False
    ) -> Ragged:
        """Return random texts. even: every row of a step gets the same number of tokens."""
        generator, prompt = torch.Generator().manual_seed(seed), 4
        ids = torch.randint(2, EOS, (rows, prompt + steps), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(rows):
                mask[row, : row % 3] = 0
        return cls(
            ids, mask, [Reader(100 * seed + i, rows, prompt, steps, even) for i in range(readers)], prompt, steps
        )

    def columns(self, step: int) -> range:
        """Return the anchor's tokens of a step; step 0 is the prompt."""
        return range(self.prompt) if step == 0 else range(self.prompt + step - 1, self.prompt + step)

    def arguments(self, step: int) -> dict[str, Any]:
        """Return the arguments of a step of all rows."""
        columns = self.columns(step)
        blocks = [(None, None, None) if one is None else one.block(step, columns) for one in self.readers]
        ids, masks, bounds = ([block[i] for block in blocks] for i in range(3))
        full = bool(self.mask.all())
        return {
            "input_ids": self.ids[:, columns.start : columns.stop],
            "attention_mask": None if full else self.mask[:, : columns.stop],
            "augmenter_input_ids": ids,
            "augmenter_attention_mask": masks,
            "hi": bounds,
        }

    def alone(self, model: ComposedForCausalLM, row: int, steps: int) -> torch.Tensor:
        """Return the logits of a row by itself, without a cache, after `steps` steps: (tokens, vocabulary)."""
        pads, end = int((self.mask[row] == 0).sum()), self.columns(steps).stop
        own = [
            (None, None) if one is None
            else (torch.tensor([one.texts[row][: one.seen[row][end - 1]]]).reshape(1, -1).long(),
                  torch.tensor([one.seen[row][pads:end]], dtype=torch.int32))
            for one in self.readers
        ]  # fmt: skip
        ids, bounds = [a for a, _ in own], [b for _, b in own]
        return model(self.ids[row : row + 1, pads:end], augmenter_input_ids=ids, hi=bounds, use_cache=False).logits[0]

    def check(self, model: ComposedForCausalLM, logits: torch.Tensor, steps: int, atol: float | None = None) -> None:
        """Compare the last logits (B, n, vocabulary) of a batch with those of every row by itself."""
        for row in range(len(self.ids)):
            want = self.alone(model, row, steps)
            n = min(logits.shape[1], len(want))
            torch.testing.assert_close(
                logits[row, -n:], want[-n:], rtol=0, atol=rounding(want) if atol is None else atol
            )

    def select(self, rows: list[int]) -> None:
        """Keep these rows."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        for one in self.readers:
            if one is not None:
                one.select(rows)
