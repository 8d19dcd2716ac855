"""Adaptive stopping against exact sums and numerical integration; any@k against every subset listed."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from calm_fast.consistency import any_at_k, leader_probability, should_stop


def by_sum(top, second):
    """P(a Binomial(n, 1/2) is at most top), n = top + second + 1, in exact integers."""
    n = top + second + 1
    return float(Fraction(sum(math.comb(n, i) for i in range(top + 1)), 2**n))


def by_integral(top, second, steps=20_000):
    """Share of the Beta(top + 1, second + 1) density above one half, by Simpson's rule."""

    def integral(low, high):
        x = torch.linspace(low, high, steps + 1, dtype=torch.float64)
        weight = torch.full_like(x, 2.0)
        weight[1::2], weight[0], weight[-1] = 4.0, 1.0, 1.0
        return float((x**top * (1 - x) ** second * weight).sum() * (high - low) / steps / 3)

    return integral(0.5, 1) / integral(0, 1)


@pytest.mark.parametrize(("top", "second"), [(0, 0), (1, 0), (1, 1), (3, 1), (8, 7), (40, 3), (64, 0), (30, 29)])
def test_leader_probability_is_the_beta_posterior(top, second):
    found = leader_probability(torch.tensor([top]), torch.tensor([second])).item()
    assert found == pytest.approx(by_sum(top, second), rel=1e-13)
    assert found == pytest.approx(by_integral(top, second), rel=1e-9)


def test_leader_probability_of_thousands_of_votes():
    pairs = [(1000, 990), (1000, 0), (5000, 4900), (2000, 2000)]
    top, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    expected = torch.tensor([by_sum(*pair) for pair in pairs], dtype=torch.float64)
    # lgamma(n) is about n log n: its rounding is what remains
    torch.testing.assert_close(leader_probability(top, second), expected, rtol=1e-10, atol=0)


def test_leader_probability_grows_with_the_lead_and_keeps_shapes():
    top = torch.arange(5, 15).view(2, 5)
    found = leader_probability(top, torch.full_like(top, 5))
    assert found.shape == (2, 5) and found.dtype == torch.float64
    assert found[0, 0] == 0.5 and (found.flatten().diff() > 0).all()
    assert leader_probability(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert leader_probability(torch.tensor(3), torch.tensor(1)).shape == ()


def test_should_stop():
    top, second = torch.tensor([4, 3, 4, 10, 0]), torch.tensor([0, 0, 1, 9, 0])
    # 1 - 2^-(top + 1) for second = 0: 0.96875, 0.9375
    assert should_stop(top, second).tolist() == [True, False, False, False, False]
    assert should_stop(top, second, 0.9).tolist() == [True, True, False, False, False]


def test_stops_read_off_a_vote():
    from calm_fast.ops import vote

    answers = torch.tensor([[0, 0, 0, 0, 1], [0, 1, 0, 1, 2], [3, 3, 3, 3, 3]])
    found = vote(answers)
    top, second = found.weight.long(), (found.weight - found.margin).long()
    assert (top.tolist(), second.tolist()) == ([4, 2, 5], [1, 2, 0])
    assert should_stop(top, second, 0.9).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("top", "second", "error", "message"),
    [
        (torch.tensor([1.0]), torch.tensor([0]), TypeError, "`top`.*float32"),
        (torch.tensor([1]), [0], TypeError, "`second`.*list"),
        (torch.tensor([1]), torch.tensor([0, 1]), ValueError, r"`second`.*\(1,\).*\(2,\)"),
        (torch.tensor([1]), torch.tensor([2]), ValueError, "`second`.*second <= top"),
        (torch.tensor([1]), torch.tensor([-1]), ValueError, "`second`.*second <= top"),
    ],
)
def test_bad_votes(top, second, error, message):
    with pytest.raises(error, match=f"leader_probability: {message}"):
        leader_probability(top, second)


@pytest.mark.parametrize("threshold", [0.5, 0.0, 1.01, float("nan")])
def test_bad_thresholds(threshold):
    with pytest.raises(ValueError, match="should_stop: `threshold`"):
        should_stop(torch.tensor([1]), torch.tensor([0]), threshold)


# ---- any@k ----------------------------------------------------------------------------------------------------------


def test_any_at_k_equals_all_subsets_listed():
    g = torch.Generator().manual_seed(0)
    answers, correct = torch.randint(0, 3, (12, 7), generator=g), torch.randint(0, 4, (12,), generator=g)
    valid = torch.rand(12, 7, generator=g) < 0.7
    valid[3] = False
    ks = [1, 5, 2, 7, 9]
    found = any_at_k(answers, correct, ks=ks, valid=valid)
    for at, k in enumerate(ks):
        hits = []
        for row, right, votes in zip(answers.tolist(), correct.tolist(), valid.tolist(), strict=True):
            samples = [a for a, v in zip(row, votes, strict=True) if v]
            subsets = list(itertools.combinations(samples, min(k, len(samples))))
            hits.append(sum(right in subset for subset in subsets) / len(subsets))
        hits = torch.tensor(hits, dtype=torch.float64)
        assert found.accuracy[at].item() == pytest.approx(float(hits.mean()), rel=1e-13)
        assert found.stderr[at].item() == pytest.approx(float(hits.std() / 12**0.5), rel=1e-12)


def test_any_at_k_of_thousands_of_samples():
    n, c, k = 3000, 7, 500
    answers = (torch.arange(n) >= c).long().unsqueeze(0)
    found = any_at_k(answers, torch.tensor([0]), ks=[k]).accuracy.item()
    assert found == pytest.approx(1 - float(Fraction(math.comb(n - c, k), math.comb(n, k))), rel=1e-12)


def test_any_at_k_checks_its_arguments():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="any_at_k: `ks`"):
        any_at_k(ids, ids[:, 0], ks=[0])
    with pytest.raises(ValueError, match="any_at_k: `correct`"):
        any_at_k(ids, ids[0], ks=[1])
    assert any_at_k(ids[:0], ids[:0, 0], ks=[1]).accuracy.tolist() == [0.0]
