"""Baselines of maj_at_k: resampled curves in numpy, in torch and in plain Python.

Shapes: answers (Q, K) class ids below 256, correct (Q,) class ids; every k is at most K. Every function returns the
accuracy at each k and its standard error over questions, float64.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import numpy as np

COLUMNS = 8192  # resamples at a time: their samples and votes fit in the caches


def numpy_curve(
    answers: np.ndarray[Any, Any], correct: np.ndarray[Any, Any], ks: Sequence[int], resamples: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return the curve from thousands of resamples at a time.

    A column is a resample. Its rows are drawn one after another by swapping (Fisher-Yates), up to the largest k that
    leaves a sample out, and votes are counted on the way. All data is one byte wide, addressed by flat indices. This is
    twice as fast as sorting 32-bit keys that carry the class, which is twice as fast as argsort and four times as fast
    as Generator.permuted.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    (q, samples), classes = answers.shape, int(max(answers.max(), correct.max())) + 1
    sizes = sorted(set(ks))
    last = max((k for k in sizes if k < samples), default=0)
    left, place = np.arange(samples, samples - last, -1, dtype=np.float32)[:, None], np.arange(last)[:, None]
    small, credit = answers.astype(np.uint8), np.empty((q, len(ks)))
    step = max(1, COLUMNS // resamples)
    for begin in range(0, q, step):
        own, right = small[begin : begin + step], correct[begin : begin + step]
        columns = len(own) * resamples
        each, index = np.arange(columns), np.empty(columns, dtype=np.intp)
        deck = np.repeat(own.T, resamples, axis=1)
        drawn = (rng.random((last, columns), dtype=np.float32) * left).astype(np.intp)
        drawn += place
        drawn *= columns
        drawn += each
        flat_deck, votes = deck.ravel(), np.zeros((classes, columns), dtype=np.uint8)
        flat_votes, at_right = votes.ravel(), np.repeat(right, resamples) * columns + each
        found: dict[int, Any] = {}
        counted = 0
        for k in sizes:
            if k == samples:  # nothing to draw: every resample has all samples
                votes = np.repeat(np.stack([(own == c).sum(1) for c in range(classes)]), resamples, axis=1)
            else:
                for j in range(counted, k):
                    np.multiply(flat_deck.take(drawn[j]), columns, out=index, dtype=np.intp, casting="unsafe")
                    index += each
                    flat_deck[drawn[j]] = deck[j]
                    flat_votes[index] += 1
                counted = k
            top = votes.max(0)
            won = votes.ravel()[at_right] == top
            found[k] = np.where(won, 1.0 / (votes == top).sum(0), 0.0).reshape(-1, resamples).mean(1)
        credit[begin : begin + step] = np.stack([found[k] for k in ks], 1)
    return _curve(torch.from_numpy(credit))


def torch_curve(
    answers: torch.Tensor, correct: torch.Tensor, ks: Sequence[int], resamples: int, seed: int, columns: int
) -> dict[str, torch.Tensor]:
    """Return the curve of the same algorithm in torch's gather and scatter, `columns` resamples at a time."""
    device = answers.device
    g = torch.Generator(device).manual_seed(seed)
    samples, classes = answers.shape[1], int(max(answers.max(), correct.max())) + 1
    sizes = sorted(set(ks))
    last = max((k for k in sizes if k < samples), default=0)
    place = torch.arange(last, device=device).unsqueeze(1)
    credit = []
    for own, right in zip(*(t.split(max(1, columns // resamples)) for t in (answers, correct)), strict=True):
        deck = own.T.repeat_interleave(resamples, 1)
        drawn = torch.rand(last, deck.shape[1], generator=g, device=device)
        drawn = drawn.mul_(samples - place).long().add_(place)
        for j in range(last):
            picked = deck.gather(0, drawn[j : j + 1])
            deck.scatter_(0, drawn[j : j + 1], deck[j : j + 1].clone())
            deck[j] = picked[0]
        one, votes = torch.ones_like(deck), deck.new_zeros(classes, deck.shape[1])
        at_right = right.repeat_interleave(resamples).unsqueeze(0)
        found: dict[int, torch.Tensor] = {}
        counted = 0
        for k in sizes:
            votes.scatter_add_(0, deck[counted:k], one)
            counted, top = k, votes.amax(0)
            won = votes.gather(0, at_right)[0] == top
            found[k] = (won / (votes == top).sum(0)).view(-1, resamples).mean(1, dtype=torch.float64)
        credit.append(torch.stack([found[k] for k in ks], 1))
    return {name: values.cpu() for name, values in _curve(torch.cat(credit)).items()}


def python_curve(
    rows: Sequence[Sequence[int]], correct: Sequence[int], ks: Sequence[int], resamples: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return the curve as a script computes it: random.sample once for all ks, a dict of votes that grows with k."""
    rng = random.Random(seed)
    sizes = set(ks)
    credit = []
    for row, right in zip(rows, correct, strict=True):
        total = dict.fromkeys(ks, 0.0)
        for _ in range(resamples):
            votes: dict[int, int] = {}
            for drawn, answer in enumerate(rng.sample(row, max(ks)), 1):
                votes[answer] = votes.get(answer, 0) + 1
                if drawn in sizes:
                    top = max(votes.values())
                    if votes.get(right) == top:
                        total[drawn] += 1 / list(votes.values()).count(top)
        credit.append([total[k] / resamples for k in ks])
    columns = list(zip(*credit, strict=True))
    stderr = [statistics.stdev(c) / math.sqrt(len(c)) for c in columns]
    as_tensor = [torch.tensor(v, dtype=torch.float64) for v in ([statistics.fmean(c) for c in columns], stderr)]
    return dict(zip(("accuracy", "stderr"), as_tensor, strict=True))


def _curve(credit: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"accuracy": credit.mean(0), "stderr": credit.std(0) / math.sqrt(credit.shape[0])}
