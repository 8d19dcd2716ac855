"""Definition of maj_at_k, in plain Python: the accuracy of a vote of k of a question's samples."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from calm_fast._ops.voting.reference import ordered_sum, sample_weights, tie_limit, voting_samples


def maj_at_k_reference(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    ks: list[int],
    method: str = "exact",
    resamples: int = 1000,
    rule: str = "count",
    lam: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Return the credit of each question at each k: the mean over subsets of k of its valid samples of

        1 / (number of tied classes)  if the gold answer's class is among the tied (see `vote`), else 0

    "exact": over all subsets; rule "count" only.   "resample": over `resamples` subsets drawn without replacement.

    Args:
        answers: (Q, K) int64, equal ids are equal answers. correct: (Q,) int64, the id of the gold answer.
        scores: (Q, K) float or None. valid: (Q, K) bool or None (all). rule, lam: see
            `voting.reference.sample_weights`.
        ks: sizes >= 1; a k beyond a question's valid samples takes all of them. seed: any 64 bits.
    Returns:
        (Q, len(ks)) float64; 0 for a question without a valid sample.
    Source: NAT (arXiv 2312.12832) section 3.4; for the subsets the pass@k estimator (arXiv 2107.03374).
    """
    q = answers.shape[0]
    every_score = [None] * q if scores is None else scores.double().tolist()
    every_valid = [None] * q if valid is None else valid.tolist()
    rows = []
    for question, (a, right) in enumerate(zip(answers.tolist(), correct.tolist(), strict=True)):
        weights = sample_weights(every_score[question], voting_samples(a, every_valid[question]), rule, lam)
        samples = [(c, w) for c, w in zip(a, weights, strict=True) if w is not None]
        if not samples:
            rows.append([0.0] * len(ks))
        elif method == "exact":
            rows.append(exact_credit([c for c, _ in samples], right, ks))
        else:
            rows.append(resampled_credit(samples, right, ks, resamples, seed, question))
    return torch.tensor(rows, dtype=torch.float64, device=answers.device).view(q, len(ks))


def exact_credit(samples: list[int], right: int, ks: list[int]) -> list[float]:
    """Return the credit at each k over ALL subsets, in exact integers.

    Count the subsets in which the right class has w samples, no other class has more and t others have as many; each
    such subset is worth 1 / (1 + t).
    """
    n, c = len(samples), samples.count(right)
    others = [samples.count(other) for other in sorted(set(samples) - {right})]
    sizes = [min(k, n) for k in ks]
    won = dict.fromkeys(sizes, Fraction(0))
    for w in range(1, c + 1):
        ways = {(0, 0): 1}  # (samples taken from the others, classes with exactly w of them) -> subsets
        for count in others:
            longer: dict[tuple[int, int], int] = {}
            for (size, ties), number in ways.items():
                for taken in range(min(count, w, max(sizes) - w - size) + 1):
                    at = (size + taken, ties + (taken == w))
                    longer[at] = longer.get(at, 0) + number * math.comb(count, taken)
            ways = longer
        for (size, ties), number in ways.items():
            if size + w in won:
                won[size + w] += Fraction(math.comb(c, w) * number, 1 + ties)
    return [float(won[size] / math.comb(n, size)) for size in sizes]


def resampled_credit(
    samples: list[tuple[int, float]], right: int, ks: list[int], resamples: int, seed: int, question: int
) -> list[float]:
    """Return the mean credit at each k over `resamples` shuffles of (class, weight) pairs; one shuffle serves every k.

    A partial Fisher-Yates shuffle: draw i swaps sample i with sample i + floor(u_i (n - i) / 2^32).
    """
    n = len(samples)
    credits: list[list[float]] = [[] for _ in ks]
    for resample in range(resamples):
        order = list(samples)
        for i in range(min(max(ks), n)):
            if i % 4 == 0:
                words = philox(seed, (i // 4, resample, question, 0))
            j = i + (words[i % 4] * (n - i) >> 32)
            order[i], order[j] = order[j], order[i]
        for at, k in enumerate(ks):
            credits[at].append(_credit(order[:k], right))
    return [ordered_sum(found) / resamples for found in credits]


def _credit(subset: list[tuple[int, float]], right: int) -> float:
    """Return 1 / (number of tied classes) if `right` is among the tied, else 0."""
    sums: dict[int, float] = {}
    for answer, weight in subset:
        sums[answer] = sums.get(answer, 0.0) + weight
    limit = tie_limit(max(sums.values()))
    tied = [answer for answer, weight in sums.items() if weight >= limit]
    return 1 / len(tied) if right in tied else 0.0


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Return four random 32-bit words: Philox4x32-10 of a 64-bit key and a counter of four words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    low = 0xFFFFFFFF
    key0, key1 = seed & low, seed >> 32 & low
    x0, x1, x2, x3 = counter
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = product1 >> 32 ^ x1 ^ key0, product1 & low, product0 >> 32 ^ x3 ^ key1, product0 & low
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return x0, x1, x2, x3
