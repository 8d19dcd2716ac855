"""maj_at_k: the exact curve against every subset by hand, the resampled one against it, all implementations agree."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from calm_fast._ops.maj_at_k import torch_impl
from calm_fast._ops.maj_at_k.api import Curve, decide, maj_at_k
from calm_fast._ops.maj_at_k.cases import CASES
from calm_fast._ops.maj_at_k.reference import maj_at_k_reference, philox
from calm_fast.core.numerics import Case, check, unit_roundoff

U = unit_roundoff(torch.float64)
NONE = torch.zeros(1, 1, dtype=torch.int64)


@pytest.fixture(params=["reference", "torch", "native"])
def impl(request):
    try:
        decide(NONE, NONE[0], ks=[1], impl=request.param)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    return request.param


def credit(answers, correct, ks, valid=None, scores=None, impl="torch", **options):
    """Per question: `maj_at_k` of each alone."""
    own = {"valid": valid, "scores": scores}
    rows = []
    for q in range(answers.shape[0]):
        one = {name: None if t is None else t[q : q + 1] for name, t in own.items()}
        rows.append(maj_at_k(answers[q : q + 1], correct[q : q + 1], ks=ks, impl=impl, **one, **options).accuracy)
    return torch.stack(rows)


def by_hand(samples, right, k):
    """The mean credit over every subset, each listed."""
    credits = []
    for subset in itertools.combinations(samples, min(k, len(samples))):
        votes = [subset.count(c) for c in set(subset)]
        won = subset.count(right) == max(votes)
        credits.append(Fraction(won, votes.count(max(votes))))
    return float(sum(credits) / len(credits))


def test_exact_equals_all_subsets_listed(impl):
    rng = random.Random(0)
    for n in range(1, 9):
        for classes in (1, 2, 3, 5, 8):
            samples = [rng.randrange(classes) for _ in range(n)]
            ks = list(range(1, n + 2))
            found = maj_at_k(torch.tensor([samples]), torch.tensor([0]), ks=ks, impl=impl).accuracy
            expected = torch.tensor([by_hand(samples, 0, k) for k in ks], dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=20 * n * U, atol=0)


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_equals_the_definition(case: Case, impl):
    if impl == "reference":
        pytest.skip("it is the definition")
    wrong = [row for row in check(CASES, case, impl) if not row.ok]
    assert not wrong


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.cases(), ids=str)
@pytest.mark.parametrize("impl_name", ["torch", "native"])
def test_equals_the_definition_on_a_gpu(case: Case, impl_name):
    inputs = CASES.build(case, torch.device("cuda"))
    try:
        decide(**inputs, impl=impl_name)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    wrong = [row for row in check(CASES, case, impl_name, "cuda") if not row.ok]
    assert not wrong


def test_thousands_of_samples_neither_overflow_nor_vanish(impl):
    """Two classes: the winner is a hypergeometric tail, in exact integers. C(1100, 550) is above 1e308."""
    n, right = 1100, 560
    if impl == "reference":
        pytest.skip("minutes in plain Python")
    answers = torch.cat([torch.zeros(right), torch.ones(n - right)]).long().unsqueeze(0)
    ks = [1, 2, 3, 50, 549, 550, 551, 1001, 1098, 1099, 1100]
    found = maj_at_k(answers, torch.tensor([0]), ks=ks, impl=impl).accuracy
    for k, value in zip(ks, found.tolist(), strict=True):
        ways = 0
        for w in range(max(0, k - (n - right)), min(k, right) + 1):
            share = 2 * (2 * w > k) + (2 * w == k)
            ways += share * math.comb(right, w) * math.comb(n - right, k - w)
        assert value == pytest.approx(ways / (2 * math.comb(n, k)), rel=10 * n * U)


def test_exact_at_the_ends(impl):
    g = torch.Generator().manual_seed(1)
    answers, correct = torch.randint(0, 4, (30, 12), generator=g), torch.randint(0, 5, (30,), generator=g)
    found = maj_at_k(answers, correct, ks=[1, 2, 12], impl=impl).accuracy
    share = (answers == correct.unsqueeze(1)).double().mean(1)
    torch.testing.assert_close(found[0], share.mean(), rtol=100 * U, atol=0)
    torch.testing.assert_close(found[1], found[0], rtol=100 * U, atol=0)  # two samples, credit shared: no gain
    from calm_fast.ops import vote

    votes = torch.nn.functional.one_hot(answers, 5).sum(1)
    won = votes.gather(1, correct.unsqueeze(1)).squeeze(1) == votes.amax(1)
    torch.testing.assert_close(found[2], (won / vote(answers).ties.double()).mean(), rtol=100 * U, atol=0)


def test_invalid_samples_and_absent_answers(impl):
    answers = torch.tensor([[0, 0, 1], [0, 1, 1], [2, 2, 2], [0, 0, 0]])
    valid = torch.tensor([[True, False, True], [True, True, True], [True] * 3, [False] * 3])
    found = credit(answers, torch.zeros(4, dtype=torch.int64), [1, 2, 3, 9], valid, impl=impl)
    third = 1 / 3
    expected = [[0.5] * 4, [third, third, 0, 0], [0] * 4, [0] * 4]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=9 * U, atol=0)


def test_curve_is_mean_and_standard_error_over_questions(impl):
    answers = torch.tensor([[0, 0], [1, 1], [0, 1], [0, 0]])
    found = maj_at_k(answers, torch.zeros(4, dtype=torch.int64), ks=[2, 1], impl=impl)
    credits = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    assert isinstance(found, Curve) and found.accuracy.dtype == found.stderr.dtype == torch.float64
    torch.testing.assert_close(found.accuracy, credits.mean().expand(2), rtol=9 * U, atol=0)
    torch.testing.assert_close(found.stderr, (credits.std() / 2).expand(2), rtol=9 * U, atol=0)
    alone = maj_at_k(answers[:1], torch.tensor([0]), ks=[1], impl=impl)
    assert alone.accuracy.item() == 1.0 and alone.stderr.isnan().all()
    none = maj_at_k(answers[:0], torch.zeros(0, dtype=torch.int64), ks=[1, 2], impl=impl)
    assert none.accuracy.tolist() == none.stderr.tolist() == [0.0, 0.0]


# ---- resample -------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    known = {
        (0, (0, 0, 0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (-1, (ones, ones, ones, ones)): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (seed, counter), words in known.items():
        assert " ".join(f"{word:08x}" for word in philox(seed, counter)) == words


def test_philox_of_torch_is_the_same():
    resample, question = torch.arange(7).unsqueeze(0), torch.tensor([[0], [3], [2**32 - 1]])
    for seed in (0, -1, 2**63 - 1, -(2**63), 12345678901234567):
        words = torch.stack(torch_impl.philox(seed, 9, resample, question), -1)
        for q, r in itertools.product(range(3), range(7)):
            assert words[q, r].tolist() == list(philox(seed, (9, r, int(question[q, 0]), 0)))


def test_resampled_curve_agrees_with_the_exact_one(impl):
    g = torch.Generator().manual_seed(3)
    q, resamples, ks = 8, 400, [1, 2, 3, 5, 10, 11]
    answers, correct = torch.randint(0, 4, (q, 12), generator=g), torch.zeros(q, dtype=torch.int64)
    exact = credit(answers, correct, ks)
    found = maj_at_k(answers, correct, ks=ks, method="resample", resamples=resamples, impl=impl).accuracy
    # a credit lies within 0 and 1, so its variance is at most p (1 - p)
    sigma = (exact * (1 - exact) / resamples).sum(0).sqrt() / q
    assert ((found - exact.mean(0)).abs() <= 4 * sigma).all()
    assert (found != exact.mean(0)).any()


def test_weights_decide_resampled_votes(impl):
    answers, correct = torch.tensor([[0, 1, 1, 1]]), torch.tensor([0])
    scores = torch.tensor([[10.0, 1.0, 1.0, 1.0]])
    found = maj_at_k(answers, correct, scores, ks=[4, 1], method="resample", rule="weighted", impl=impl).accuracy
    share = maj_at_k(answers, correct, ks=[1], method="resample", impl=impl).accuracy
    assert found[0] == 1.0 and found[1] == share[0]
    # weights of 0: a class without a sample in the subset must not tie with its 0
    found = maj_at_k(answers, correct, 0 * scores, ks=[1], method="resample", rule="weighted", impl=impl).accuracy
    assert found[0] == share[0]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1, 2**63])
def test_every_64_bit_seed_is_a_seed(seed, impl):
    answers, correct = torch.arange(10).remainder(3).expand(4, 10), torch.zeros(4, dtype=torch.int64)
    options = {"ks": [1, 4], "method": "resample", "resamples": 40, "impl": impl}
    one = maj_at_k(answers, correct, seed=seed, **options)
    assert torch.equal(
        one.accuracy, maj_at_k(answers, correct, seed=(seed + 2**63) % 2**64 - 2**63, **options).accuracy
    )
    assert not torch.equal(one.accuracy, maj_at_k(answers, correct, seed=5, **options).accuracy)


def test_a_question_draws_by_its_place_alone(impl):
    """Not by how many questions, resamples or larger ks there are beside it."""
    g = torch.Generator().manual_seed(5)
    answers, correct = torch.randint(0, 3, (3, 20), generator=g), torch.zeros(3, dtype=torch.int64)
    options = {"method": "resample", "resamples": 31, "seed": 7, "impl": impl}
    every = maj_at_k(answers, correct, ks=[2, 5, 16, 20], **options).accuracy
    fewer = maj_at_k(answers, correct, ks=[5, 2], **options).accuracy
    assert every[:2].tolist() == fewer.flip(0).tolist()
    first = maj_at_k(answers[:1], correct[:1], ks=[5], **options).accuracy
    reference = maj_at_k_reference(answers, correct, None, None, [5], "resample", 31, seed=7)
    torch.testing.assert_close(first[0], reference[0, 0], rtol=31 * U, atol=0)


def test_chunks_do_not_matter(monkeypatch):
    g = torch.Generator().manual_seed(6)
    answers, correct = torch.randint(0, 5, (9, 14), generator=g), torch.randint(0, 5, (9,), generator=g)
    valid = torch.rand(9, 14, generator=g) < 0.8
    for options in ({}, {"method": "resample", "resamples": 50}):
        whole = maj_at_k(answers, correct, valid=valid, ks=[1, 4, 9], impl="torch", **options)
        for chunk in (1, 100):
            monkeypatch.setitem(torch_impl._CHUNK, "cpu", chunk)
            parts = maj_at_k(answers, correct, valid=valid, ks=[1, 4, 9], impl="torch", **options)
            torch.testing.assert_close(parts.accuracy, whole.accuracy, rtol=200 * U, atol=0)
        monkeypatch.undo()


def test_runs_are_equal(impl):
    inputs = CASES.build(CASES.case("everything", torch.float32), torch.device("cpu"))
    exact = CASES.build(CASES.case("ragged", torch.float32), torch.device("cpu"))
    for arguments in (inputs, exact):
        first = maj_at_k(**arguments, impl=impl)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, maj_at_k(**arguments, impl=impl), strict=True))


@pytest.mark.parametrize("nodes", [1, 2, 5, 40, 300])
def test_quadrature_integrates_what_it_promises(nodes):
    x, share = torch_impl.quadrature(nodes)
    for degree in {0, 1, nodes, 2 * nodes - 1}:
        assert (x**degree * share).sum().item() == pytest.approx(1 / (degree + 1), rel=2e-13)
