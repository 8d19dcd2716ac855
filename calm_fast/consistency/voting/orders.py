"""The votes after every sample of a question, for many orders of its samples, and where a stopping rule stops."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from calm_fast.consistency.sampling.stopping import leader_probability
from calm_fast.core.checks import bad_value

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_NAME = "vote --compare"


@dataclass(frozen=True)
class Prefixes:
    """The state of a plain count after each sample of an order; every array is (orders, n).

    drawn: class of the sample, -1 for one without an answer. top, second: votes of the leading answer and of the next
    one. credit: 1 / (number of tied answers) if the gold answer is among the tied, else 0.
    """

    drawn: Integers
    top: Integers
    second: Integers
    credit: Floats


def draw_orders(n: int, most: int, seed: int, question: int) -> Integers:
    """Return orders of n samples, (P, n): all n! of them if these are at most `most`, else `most` random ones.

    The orders are a function of (seed, question) alone.
    """
    every = math.factorial(n)
    if every <= most:
        return np.array(list(itertools.permutations(range(n))), dtype=np.int64).reshape(every, n)
    generator = np.random.default_rng([seed, question])
    return generator.permuted(np.tile(np.arange(n, dtype=np.int64), (most, 1)), axis=1)


def count_prefixes(drawn: Integers, gold: Integers) -> Prefixes:
    """Count the votes after each sample.

    Args:
        drawn: (P, n), classes in the order of drawing, -1 for a sample without an answer. gold: (P,), the class of the
            gold answer; -1 if no sample has it.
    """
    rows, n = np.arange(drawn.shape[0]), drawn.shape[1]
    counts = np.zeros((drawn.shape[0], int(drawn.max(initial=0)) + 1), dtype=np.int64)
    top, second, ties, right = (np.zeros(len(rows), dtype=np.int64) for _ in range(4))
    leader = np.full(len(rows), -1, dtype=np.int64)
    tops, seconds = np.empty((2, *drawn.shape), dtype=np.int64)
    credit = np.empty(drawn.shape)
    for place in range(n):
        votes = drawn[:, place] >= 0
        answer = np.where(votes, drawn[:, place], 0)
        counts[rows, answer] += votes
        now = counts[rows, answer]
        ahead, other = votes & (now > top), votes & (answer != leader)
        # an answer that takes the lead was tied before, so the next one has the old top
        second = np.where(ahead & other, top, np.where(other, np.maximum(second, now), second))
        ties = np.where(ahead, 1, ties + (votes & (now == top)))
        top, leader = np.where(ahead, now, top), np.where(ahead, answer, leader)
        right += votes & (answer == gold)
        tops[:, place], seconds[:, place] = top, second
        credit[:, place] = np.where((right == top) & (top > 0), 1 / np.maximum(ties, 1), 0.0)
    return Prefixes(drawn, tops, seconds, credit)


def window_stops(drawn: Integers, window: int) -> Integers:
    """Return the samples that are drawn in windows until all samples of a window have one and the same answer: (P,).

    A last window may be shorter, and ends the sampling anyway. A sample without an answer agrees with none.

    Source: early-stopping self-consistency, ESC (arXiv 2401.10480).
    """
    orders, n = drawn.shape
    if window < 2:
        raise bad_value(_NAME, "windows", "at least 2 samples", str(window))
    blocks = drawn[:, : n // window * window].reshape(orders, n // window, window)
    agree = ((blocks == blocks[:, :, :1]) & (blocks >= 0)).all(2)
    return _first(agree, (np.arange(n // window) + 1) * window, n)


def confidence_stops(top: Integers, second: Integers, threshold: float) -> Integers:
    """Return the samples that are drawn until `leader_probability` of the counts reaches `threshold`: (P,).

    Source: Adaptive-Consistency (arXiv 2305.11860), the Beta criterion.
    """
    n = top.shape[1]
    if not 0.5 < threshold <= 1:
        raise bad_value(_NAME, "confidences", "above 1/2 and at most 1", str(threshold))
    size = int(top.max(initial=0)) + 1
    leads, follows = torch.arange(size)[:, None].expand(size, size), torch.arange(size).expand(size, size)
    table = leader_probability(leads, torch.minimum(leads, follows)).numpy()
    return _first(table[top, second] >= threshold, np.arange(n) + 1, n)


def _first(stops: npt.NDArray[np.bool_], sizes: Integers, n: int) -> Integers:
    """Return for each order the size at its first True, n without one."""
    if not stops.shape[1]:
        return np.full(stops.shape[0], n, dtype=np.int64)
    return np.where(stops.any(1), sizes[stops.argmax(1)], n)
