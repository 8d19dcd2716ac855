"""`calm-fast vote --compare`: accuracy against the number of samples, for votes, best-of-n and early stopping."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calm_fast._ops.maj_at_k.api import credit_at
from calm_fast.consistency.answers.grouping import Groups
from calm_fast.consistency.voting.orders import (
    Floats,
    Integers,
    Prefixes,
    confidence_stops,
    count_prefixes,
    draw_orders,
    window_stops,
)

WINDOWS = (2, 3, 4, 5, 8)
CONFIDENCES = (0.7, 0.8, 0.9, 0.95, 0.99)
MAJORITY, BEST = "majority", "best of n"
STOPPING = ("ESC", "Adaptive-Consistency")
_BOOTSTRAPS = 2000
_CELLS = 2**22  # weights of a piece of the bootstrap: 32 MiB


@dataclass(frozen=True)
class Method:
    """A way to choose an answer, with one number that sets its cost.

    setting: k samples, the window, or the confidence. samples, credit: (Q,), the samples that it draws for each
    question and its credit, both means over subsets or orders. exact: these are means over all subsets or orders.
    """

    name: str
    setting: float
    samples: Floats
    credit: Floats
    exact: bool


@dataclass(frozen=True)
class Point:
    """The result of a method over all questions; accuracies are fractions, intervals 95 %, None for one question.

    samples: mean number drawn. gain: accuracy minus that of the majority at the same mean number of samples.
    """

    name: str
    setting: float
    samples: float
    accuracy: float
    interval: tuple[float, float] | None
    gain: float
    gain_interval: tuple[float, float] | None
    exact: bool

    @property
    def stops_early(self) -> bool:
        """True for a method that decides itself how many samples it draws."""
        return self.name in STOPPING

    def to_json(self) -> dict[str, Any]:
        """Return the point as results.json has it."""
        return {
            "method": self.name, "setting": self.setting, "samples": self.samples, "accuracy": self.accuracy,
            "interval": self.interval, "gain": self.gain, "gain_interval": self.gain_interval, "exact": self.exact,
        }  # fmt: skip


def compare(
    groups: Groups,
    counts: Iterable[int],
    scores: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    lam: float = 1.0,
    orders: int = 1000,
    seed: int = 0,
    windows: Iterable[int] = WINDOWS,
    confidences: Iterable[float] = CONFIDENCES,
) -> list[Point]:
    """Return accuracy and cost of every method at every setting.

    Samples are drawn without replacement from all samples of a question, so one without an answer costs as much as
    any, and does not vote. A question that has fewer samples than a method asks for gives all.

        majority             of k samples; exact
        best of n            the answer of the sample with the highest score among k, of equal ones a random one; exact
        weighted, adaptive   votes of k samples by scores, see `ops.vote`; over `orders` random subsets
        ESC                  windows of samples until one agrees with itself, then the majority of all drawn
        Adaptive-Consistency one sample at a time until the leader's posterior probability is high enough

    The last two are means over `orders` random orders of each question's samples, or over all orders if there are no
    more than that. The samples of a question are grouped once; nothing is asked of a model.

    Args:
        groups: of the samples' answers, with gold answers. counts: samples of each question, those without an answer
            included. scores: (Q, K) float64, NaN = none; None leaves the methods by scores out. weights: (Q, K), the
            scores as weights >= 0, for the two votes. lam: of the adaptive vote.
        orders, seed: number of random orders and subsets of a question's samples, and their seed.
        windows: of ESC, at least 2; those of all samples or more are left out. confidences: above 1/2, at most 1.
    Raises:
        ValueError: a window or a confidence is out of range; the message says which.
    """
    sizes = np.array(list(counts), dtype=np.int64)
    most = int(sizes.max(initial=1))
    methods = list(_votes(groups, sizes, scores, weights, lam, orders, seed))
    methods += _stopping(groups, sizes, [w for w in windows if w < most], list(confidences), orders, seed)
    return _points(methods, seed)


def _votes(
    groups: Groups,
    sizes: Integers,
    scores: torch.Tensor | None,
    weights: torch.Tensor | None,
    lam: float,
    orders: int,
    seed: int,
) -> Iterator[Method]:
    """Yield the methods that draw k samples, for every k."""
    ks = range(1, int(sizes.max(initial=1)) + 1)
    valid = groups.valid.sum(1).numpy()
    sums = {MAJORITY: credit_at(groups.answers, groups.correct, ks=list(ks), valid=groups.valid).numpy()}
    if scores is not None:
        right = groups.valid & (groups.answers == groups.correct[:, None])
        sums[BEST] = best_of(scores.numpy(), right.numpy(), groups.valid.numpy(), len(ks))
    if weights is not None:
        for rule in ("weighted", "adaptive"):
            sums[rule] = credit_at(
                groups.answers, groups.correct, weights, ks=list(ks), valid=groups.valid, method="resample",
                resamples=orders, rule=rule, lam=lam, seed=seed,
            ).numpy()  # fmt: skip
    for name, credit in sums.items():
        drawn = of_all_samples(credit, valid, sizes)
        for k in ks:
            yield Method(name, k, np.minimum(k, sizes).astype(float), drawn[:, k - 1], name in (MAJORITY, BEST))


def best_of(
    scores: Floats, right: np.ndarray[Any, np.dtype[np.bool_]], valid: np.ndarray[Any, np.dtype[np.bool_]], most: int
) -> Floats:
    """Return (Q, most), the probability that the best of m valid samples is right, at m = 1, 2, ..., most.

        P(m) = sum of groups g of equal scores:  share of g that is right  x  (C(v - a, m) - C(v - b, m)) / C(v, m)

    with a samples above g and b - a in it, of v valid ones: g has the best score unless all m are below it or one is
    above. A sample without a score (NaN) is below all others. An m beyond v takes all.
    """
    credit = np.zeros((len(scores), most))
    for q in range(len(scores)):
        mine = np.where(np.isnan(scores[q]), -np.inf, scores[q])[valid[q]]
        v, good = len(mine), right[q][valid[q]]
        for value in np.unique(mine):
            above, until = int((mine > value).sum()), int((mine >= value).sum())
            share = good[mine == value].mean()
            if share:
                below = _all_within(v, most)
                credit[q] += share * (below[v - above] - below[v - until])
    return credit


@functools.cache
def _all_within(v: int, most: int) -> Floats:
    """Return (v + 1, most), the probability that m = 1 to `most` of v samples are all among x given ones."""
    taken = [min(m, v) for m in range(1, most + 1)]
    return np.array([[math.comb(x, m) / math.comb(v, m) for m in taken] for x in range(v + 1)])


def of_all_samples(credit: Floats, valid: Integers, sizes: Integers) -> Floats:
    """Return the credit of k = 1, 2, ... of all samples from that of m of the valid ones; both (Q, largest size).

        credit(k) = sum_m  C(v, m) C(n - v, k - m) / C(n, k)  credit of m valid samples

    for n samples of which v are valid; without a valid sample the credit is 0.
    """
    drawn = np.zeros_like(credit)
    for n, v in {(int(n), int(v)) for n, v in zip(sizes, valid, strict=True)}:
        mine = (sizes == n) & (valid == v)
        shares = np.zeros((credit.shape[1], v))
        for k in range(1, credit.shape[1] + 1):
            taken = min(k, n)
            for m in range(max(1, taken - (n - v)), min(v, taken) + 1):
                shares[k - 1, m - 1] = math.comb(v, m) * math.comb(n - v, taken - m) / math.comb(n, taken)
        drawn[mine] = credit[mine, :v] @ shares.T
    return drawn


def _stopping(
    groups: Groups, sizes: Integers, windows: list[int], confidences: list[float], orders: int, seed: int
) -> list[Method]:
    """Return the methods that stop early."""
    answers = groups.answers.masked_fill(~groups.valid, -1).numpy()
    names = [(STOPPING[0], float(w)) for w in windows] + [(STOPPING[1], c) for c in confidences]
    samples, credit = np.zeros((2, len(names), len(sizes)))
    for q, n in enumerate(sizes.tolist()):
        order = draw_orders(n, orders, seed, q)
        seen = count_prefixes(answers[q, :n][order], np.full(len(order), int(groups.correct[q])))
        stops = [window_stops(seen.drawn, w) for w in windows]
        stops += [confidence_stops(seen.top, seen.second, c) for c in confidences]
        for place, stop in enumerate(stops):
            samples[place, q], credit[place, q] = stop.mean(), _credit_where(seen, stop)
    exact = math.factorial(min(int(sizes.max(initial=0)), 20)) <= orders
    return [Method(*name, samples[i], credit[i], exact) for i, name in enumerate(names)]


def _credit_where(seen: Prefixes, stop: Integers) -> float:
    """Return the mean credit of orders that stop after `stop` samples."""
    if not seen.drawn.shape[1]:
        return 0.0
    return float(seen.credit[np.arange(len(stop)), stop - 1].mean())


def _points(methods: list[Method], seed: int) -> list[Point]:
    """Return means over questions with bootstrap intervals, in which methods share the questions drawn."""
    credit, samples = (np.stack([getattr(m, name) for m in methods], 1) for name in ("credit", "samples"))
    base = [place for place, method in enumerate(methods) if method.name == MAJORITY]
    questions = len(credit)

    def gains(accuracy: Floats, cost: Floats) -> Floats:
        # between k and k + 1 samples: the majority of k for some of the questions and of k + 1 for the others
        return accuracy - np.interp(cost, cost[base], accuracy[base])

    mean, cost = credit.mean(0), samples.mean(0)
    gain = gains(mean, cost)
    generator = np.random.default_rng(seed)
    drawn: list[Floats] = []
    drawn_gains: list[Floats] = []
    step = max(1, _CELLS // questions)
    for start in range(0, _BOOTSTRAPS, step):
        count = min(step, _BOOTSTRAPS - start)
        shares = generator.multinomial(questions, np.full(questions, 1 / questions), size=count) / questions
        means, costs = shares @ credit, shares @ samples
        drawn.append(means)
        drawn_gains += [gains(a, c) for a, c in zip(means, costs, strict=True)]
    ends, gain_ends = _ends(np.concatenate(drawn), questions), _ends(np.stack(drawn_gains), questions)
    return [
        Point(m.name, m.setting, float(cost[i]), float(mean[i]), ends[i], float(gain[i]), gain_ends[i], m.exact)
        for i, m in enumerate(methods)
    ]


def _ends(drawn: Floats, questions: int) -> list[tuple[float, float] | None]:
    """Return the 95 % percentile interval of each column; None for a single question, whose spread is unknown."""
    if questions == 1:
        return [None] * drawn.shape[1]
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0).tolist()
    return list(zip(low, high, strict=True))
