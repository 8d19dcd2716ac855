"""The compiled maj_at_k: every SIMD lane and any number of threads return the same bits, direct calls are checked."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.maj_at_k.cases import CASES
from calm_fast._ops.maj_at_k.native import maj_at_k_native
from calm_fast._ops.maj_at_k.reference import maj_at_k_reference
from calm_fast._ops.maj_at_k.torch_impl import maj_at_k_torch
from calm_fast.core import native_library
from calm_fast.core.numerics import Case
from calm_fast.verify.emulated import maj_at_k as emulated

OBSTACLE = native_library.obstacle("maj_at_k_exact")
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=str(OBSTACLE))
LANES = {"scalar": 0, "avx2": 1, "avx512": 2}


def arguments(inputs):
    seed = (inputs["seed"] + 2**63) % 2**64 - 2**63
    names = ("answers", "correct", "scores", "valid", "ks", "method", "resamples", "rule", "lam")
    return (*(inputs[name] for name in names), seed)


def run(inputs, lane=-1):
    return maj_at_k_native(*arguments(inputs), lane)


@pytest.fixture(params=LANES)
def lane(request):
    try:
        run(CASES.build(CASES.case("single", torch.float32), torch.device("cpu")), LANES[request.param])
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    return LANES[request.param]


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_every_lane_returns_the_same_bits(case: Case, lane):
    inputs = CASES.build(case, torch.device("cpu"))
    assert torch.equal(run(inputs, lane), run(inputs))


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 63, 64, 65, 254, 255, 256, 257])
@pytest.mark.parametrize("classes", [2, 300])
def test_resampled_bits_are_the_definition_s(k, classes, lane):
    """At the edges of groups of 16 resamples, rows of 64 and what fits into bytes; credits are added in one order."""
    g = torch.Generator().manual_seed(k)
    answers, correct = torch.randint(0, classes, (2, k), generator=g), torch.zeros(2, dtype=torch.int64)
    answers[:, ::3] = 0
    ks = sorted({1, 2, 3, max(1, k // 2), max(1, k - 1), k, k + 1})
    for resamples in (1, 16, 17, 33, 65) if k < 100 else (17,):
        options = (answers, correct, None, None, ks, "resample", resamples, "count", 1.0, -7)
        assert torch.equal(maj_at_k_native(*options, lane), maj_at_k_reference(*options))


def test_weighted_bits_are_the_definition_s(lane):
    for name in ("weighted", "weighted-ties", "adaptive", "adaptive-ties", "everything"):
        inputs = CASES.build(CASES.case(name, torch.float32, k=40, resamples=35), torch.device("cpu"))
        assert torch.equal(run(inputs, lane), maj_at_k_reference(*arguments(inputs)))


@pytest.mark.parametrize("k", [1, 17, 63, 64, 65, 255, 256])
@pytest.mark.parametrize("classes", [3, 300])
def test_weighted_bits_are_the_definition_s_at_every_size(k, classes, lane):
    """At the size limits of traced draws (64), byte swaps (255) and the plain loop; sums of either sign,
    equal sums, infinite ones."""
    g = torch.Generator().manual_seed(k)
    answers, correct = torch.randint(0, classes, (3, k), generator=g), torch.zeros(3, dtype=torch.int64)
    answers[:, ::3] = 0
    scores = torch.randn(3, k, generator=g)
    scores[1] = scores[1].round()
    scores[2, k // 2] = float("inf")
    ks = sorted({1, 2, max(1, k // 2), max(1, k - 1), k})
    for resamples in (1, 17, 65) if k < 100 else (17,):
        options = (answers, correct, scores, None, ks, "resample", resamples, "weighted", 1.0, 11)
        assert torch.equal(maj_at_k_native(*options, lane), maj_at_k_reference(*options))


@pytest.mark.parametrize("rule", ["count", "weighted"])
@pytest.mark.parametrize("k", [250, 300, 400])
def test_what_votes_decides_not_what_is_there(k, rule, lane):
    """More samples than fit into bytes, of which 3, 40, 255 or 256 vote: each question goes the way of its size."""
    g = torch.Generator().manual_seed(k)
    answers, correct = torch.randint(0, 40, (4, k), generator=g), torch.zeros(4, dtype=torch.int64)
    answers[:, ::3] = 0
    scores = torch.randn(4, k, generator=g) if rule == "weighted" else None
    valid = torch.stack([torch.randperm(k, generator=g) < n for n in (3, 40, 255, 256)])
    options = (answers, correct, scores, valid, [1, 2, 20, 254], "resample", 17, rule, 1.0, 3)
    torch.testing.assert_close(maj_at_k_native(*options, lane), maj_at_k_reference(*options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ragged", "doubling", "resample", "everything"])
def test_threads_do_not_matter(name):
    inputs = CASES.build(CASES.case(name, torch.float32, q=200), torch.device("cpu"))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_questions_do_not_know_each_other():
    inputs = CASES.build(CASES.case("ragged", torch.float32, q=40), torch.device("cpu"))
    whole = run(inputs)
    for q in (0, 17, 39):
        one = {**inputs, **{n: inputs[n][q : q + 1] for n in ("answers", "correct", "valid")}}
        assert torch.equal(run(one)[0], whole[q])


def test_direct_calls_with_wrong_tensors_are_refused():
    answers, correct = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    exact, resample = (getattr(torch.ops.calm_fast, f"_maj_at_k_native_{m}") for m in ("exact", "resample"))
    for bad in (answers.int(), answers.t(), answers[0], answers[:, ::2]):
        with pytest.raises(RuntimeError, match="answers"):
            exact(bad, correct, None, [1])
    with pytest.raises(RuntimeError, match="correct"):
        exact(answers, correct[:2], None, [1])
    with pytest.raises(RuntimeError, match="valid"):
        exact(answers, correct, answers, [1])
    for ks in ([], [0], [1, -3]):
        with pytest.raises(RuntimeError, match="ks"):
            exact(answers, correct, None, ks)
    with pytest.raises(RuntimeError, match="resamples"):
        resample(answers, correct, None, None, [1], 0, False, 1.0, 0)
    with pytest.raises(RuntimeError, match="scores"):
        resample(answers, correct, torch.zeros(3, 3), None, [1], 5, False, 1.0, 0)
    with pytest.raises(RuntimeError, match="lane"):
        exact(answers, correct, None, [1], 99)


@pytest.mark.parametrize(("method", "rule"), [("exact", "count"), ("resample", "count"), ("resample", "adaptive")])
def test_an_unchecked_negative_answer_does_not_vote(method, rule, lane):
    """Under torch.compile and on a GPU nobody reads the answers: every engine takes the others alone."""
    g = torch.Generator().manual_seed(3)
    answers, correct = torch.randint(0, 3, (6, 20), generator=g), torch.tensor([0, 1, 2, 0, -1, 1])
    scores = torch.randn(6, 20, generator=g).masked_fill(torch.rand(6, 20, generator=g) < 0.2, float("nan"))
    wrong, valid = (torch.rand(6, 20, generator=g) < share for share in (0.3, 0.8))
    given = answers.masked_fill(wrong, -(2**63)).masked_fill(wrong & (scores > 0), -1)
    scores = None if rule == "count" else scores
    for mask in (None, valid):
        rest = ([1, 3, 8, 20], method, 50, rule, 2.0, 7)
        clean = ~wrong if mask is None else mask & ~wrong
        expected = maj_at_k_reference(answers, correct, scores, clean, *rest)
        found = [
            maj_at_k_native(given, correct, scores, mask, *rest, lane),
            maj_at_k_torch(given, correct, scores, mask, *rest),
            maj_at_k_reference(given, correct, scores, mask, *rest),
        ]
        for credit in found:
            torch.testing.assert_close(credit, expected, rtol=1e-12, atol=1e-12)
        names = ("answers", "correct", "scores", "valid", "ks", "method", "resamples", "rule", "lam", "seed")
        inputs = dict(zip(names, (given, correct, scores, mask, *rest), strict=True))
        if (values := emulated.run(inputs)) is not None:
            torch.testing.assert_close(values["accuracy"], expected.mean(0), rtol=1e-12, atol=1e-12)
