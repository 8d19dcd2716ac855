"""vote: a plain Counter on many random rows, every implementation against the definition, torch's own checks."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from calm_fast._ops.vote import torch_impl as vote_impl
from calm_fast._ops.vote.api import Vote, decide, vote
from calm_fast._ops.vote.cases import CASES
from calm_fast._ops.vote.native import vote_native as native_vote
from calm_fast._ops.vote.reference import vote_reference
from calm_fast.core import native_library
from calm_fast.core.numerics import Case, check
from calm_fast.verify.emulated import vote as emulated_vote

NAN = float("nan")
RULES = ("count", "weighted", "adaptive")


def build(name="everything", dtype=torch.float32, device="cpu", **changes):
    return CASES.build(CASES.case(name, dtype, **changes), torch.device(device))


# SIMD lanes of the compiled library that this CPU may lack: csrc/common/lanes.h
LANES = {"scalar": 0, "avx2": 1, "avx512": 2}


@pytest.fixture(params=LANES)
def lane(request):
    """A call of the compiled library that forces one lane."""
    if why := native_library.obstacle("vote"):
        pytest.skip(why)

    def call(answers, scores, valid, rule, lam):
        return Vote(*native_vote(answers, scores, valid, rule, lam, LANES[request.param]))

    try:
        call(torch.zeros(1, 1, dtype=torch.int64), None, None, "count", 1.0)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    return call


@pytest.fixture(params=["reference", "torch", "native"])
def impl(request):
    try:
        decide(torch.zeros(1, 1, dtype=torch.int64), impl=request.param)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    return request.param


def equal(a: Vote, b: Vote) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def by_counter(answers, scores, valid, rule, lam):
    """One question with a Counter of weights, as anybody would write it."""
    known = [s for s, ok in zip(scores, valid, strict=True) if ok and s == s]
    mean = sum_in_order(known) / len(known) if known else 1.0
    votes, total = Counter(), 0.0
    for answer, score, ok in zip(answers, scores, valid, strict=True):
        if ok:
            s = mean if math.isnan(score) else score
            weight = {"count": 1.0, "weighted": s, "adaptive": 1.0 + lam * s}[rule]
            votes[answer] += weight
            total += weight
    if not votes:
        return -1, 0.0, 0.0, 0.0, 0
    ranked = votes.most_common()  # heaviest first, in order of appearance among equals
    tied = {answer for answer, weight in ranked if weight >= ranked[0][1] * (1 - 1e-9)}
    winner = next(a for a, ok in zip(answers, valid, strict=True) if ok and a in tied)
    ahead = 0.0 if len(tied) > 1 else ranked[0][1] - (ranked[1][1] if len(ranked) > 1 else 0.0)
    return winner, votes[winner], total, ahead, len(tied)


def sum_in_order(values):
    total = 0.0
    for value in values:
        total += value
    return total


@pytest.mark.parametrize("rule", RULES)
def test_ten_thousand_random_rows_against_a_counter(rule, impl):
    g = torch.Generator().manual_seed(RULES.index(rule))
    q, k, lam = 10_000, 9, 0.5
    answers = torch.randint(0, 4, (q, k), generator=g) * 1000
    scores = torch.randint(0, 13, (q, k), generator=g) / 4  # quarters: many classes weigh exactly the same
    scores = torch.where(torch.rand(q, 1, generator=g) < 0.5, scores, torch.rand(q, k, generator=g))
    scores[torch.rand(q, k, generator=g) < torch.rand(q, 1, generator=g) * 0.8] = NAN
    valid = torch.rand(q, k, generator=g) < torch.rand(q, 1, generator=g) * 1.3
    found = vote(answers, scores, valid=valid, rule=rule, lam=lam, impl=impl)
    rows = (answers.tolist(), scores.double().tolist(), valid.tolist())
    expected = [by_counter(a, s, v, rule, lam) for a, s, v in zip(*rows, strict=True)]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
    assert (found.ties > 1).float().mean() > 0.05 and (found.ties == 0).any()  # the rows held what they should
    assert found.winner.dtype == found.ties.dtype == torch.int64
    assert found.weight.dtype == found.total.dtype == found.margin.dtype == torch.float64


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_equals_the_definition(case: Case, impl):
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


def one(answers, scores=None, valid=None, **options):
    """A single question; the vote as Python numbers."""
    scores = None if scores is None else torch.tensor([scores], dtype=torch.float64)
    valid = None if valid is None else torch.tensor([valid])
    return tuple(x.item() for x in vote(torch.tensor([answers]), scores, valid=valid, **options))


def test_examples_by_hand(impl):
    assert one([3, 5, 5, 3, 5], impl=impl) == (5, 3.0, 5.0, 1.0, 1)
    assert one([5, 3, 3, 5, 7], impl=impl) == (5, 2.0, 5.0, 0.0, 2)  # tied: the one that appears first
    assert one([4, 4], impl=impl) == (4, 2.0, 2.0, 2.0, 1)  # no other class: the margin is the weight
    assert one([9, 1, 1], [2.5, 1.0, 1.0], rule="weighted", impl=impl) == (9, 2.5, 4.5, 0.5, 1)
    assert one([9, 1, 1], [2.5, 1.0, 1.0], rule="adaptive", impl=impl) == (1, 4.0, 7.5, 0.5, 1)
    assert one([9, 1, 1], [2.5, 1.0, 1.0], rule="adaptive", lam=3.0, impl=impl) == (9, 8.5, 16.5, 0.5, 1)
    assert one([1, 2, 2], valid=[True, False, False], impl=impl) == (1, 1.0, 1.0, 1.0, 1)
    assert one([1, 2], valid=[False, False], impl=impl) == (-1, 0.0, 0.0, 0.0, 0)


def test_unscored_samples_take_the_mean_of_the_others(impl):
    assert one([0, 1, 1], [NAN, 0.5, 1.5], rule="weighted", impl=impl) == (1, 2.0, 3.0, 1.0, 1)
    # only valid scores count for the mean
    found = one([0, 1, 2], [NAN, 0.5, 100.0], [True, True, False], rule="weighted", impl=impl)
    assert found == (0, 0.5, 1.0, 0.0, 2)
    assert one([0, 1, 1], [NAN, NAN, NAN], rule="weighted", impl=impl) == (1, 2.0, 3.0, 1.0, 1)
    assert one([0, 1], [NAN, 5.0], [True, False], rule="adaptive", lam=0.5, impl=impl) == (0, 1.5, 1.5, 1.5, 1)


def test_weights_of_zero_and_unchecked_negative_ones(impl):
    """A public call refuses negative weights; where nobody reads them, every engine defines the same."""
    engine = getattr(torch.ops.calm_fast, f"vote_{impl}_fwd")
    for answers, expected in (([7, 8], [7, -1.0, -3.0, 1.0, 1]), ([7, 7], [7, -3.0, -3.0, -3.0, 1])):
        found = engine(torch.tensor([answers]), torch.tensor([[-1.0, -2.0]]), None, "weighted", 1.0)
        assert [x.item() for x in found] == expected
    assert one([7, 8], [0.0, 0.0], rule="weighted", impl=impl) == (7, 0.0, 0.0, 0.0, 2)


@pytest.mark.parametrize("size", [1.0, 1e-11, 1e-300, 1e15])
def test_ties_are_relative_to_the_top(size, impl):
    assert one([1, 2], [size, size * (1 + 2e-10)], rule="weighted", impl=impl)[::4] == (1, 2)
    assert one([1, 2], [size, size * (1 + 2e-9)], rule="weighted", impl=impl)[::4] == (2, 1)
    assert one([1, 2, 2], [3 * size, size, size], rule="weighted", impl=impl)[::4] == (1, 1)


def test_classes_within_1e_9_of_the_top_are_tied(impl):
    assert one([1, 2], [1.0, 1.0 + 2e-10], rule="weighted", impl=impl)[::4] == (1, 2)
    assert one([1, 2], [1.0, 1.0 + 2e-9], rule="weighted", impl=impl)[::4] == (2, 1)
    # near the top counts, not near one another: 0.8e-9 steps, three classes, the lowest is out
    scores = [1.0, 1.0 + 0.8e-9, 1.0 + 1.6e-9]
    assert one([1, 2, 3], scores, rule="weighted", impl=impl)[::4] == (2, 2)
    assert one([1, 1, 2], [0.1, 0.2, 0.3], rule="weighted", impl=impl) == (1, 0.1 + 0.2, 0.1 + 0.2 + 0.3, 0.0, 2)


def test_weights_are_summed_in_the_order_of_the_samples(impl):
    scores = [1.0, 2.0**-53, 2.0**-53, 2.0**-53, 2.0**-53]
    assert one([0] * 5, scores, rule="weighted", impl=impl)[1:3] == (1.0, 1.0)
    assert one([0] * 5, scores[::-1], rule="weighted", impl=impl)[1:3] == (1.0 + 2.0**-51,) * 2
    mean_first = [NAN, *scores]  # the mean is a sum in order as well
    assert one([0] * 6, mean_first, rule="weighted", impl=impl)[1] == sum_in_order([1.0 / 5, *scores])
    # 1 + lam s is two roundings: a fused multiply-add would keep the product's last bits
    s, lam = 1.0 + 2.0**-30, 1.0 - 2.0**-30
    assert lam * s == 1.0  # rounded; exactly it is 1 - 2^-60
    assert one([0], [s], rule="adaptive", lam=-lam, impl=impl)[1] == 0.0


def test_renaming_classes_only_renames_the_winner(impl):
    inputs = build("adaptive-ties")
    names = torch.tensor([50, 7, 2**60, 0])
    plain, renamed = vote(**inputs, impl=impl), vote(**inputs | {"answers": names[inputs["answers"]]}, impl=impl)
    assert torch.equal(renamed.winner, names[plain.winner])
    assert equal(renamed._replace(winner=plain.winner), plain)


def test_padding_with_invalid_samples_changes_nothing(impl):
    inputs = build("everything")
    q = inputs["answers"].shape[0]
    wide = {
        n: torch.cat((x, x.new_zeros(q, 30), x.new_zeros(q, 1)), 1) for n, x in inputs.items() if torch.is_tensor(x)
    }
    assert equal(vote(**inputs | wide, impl=impl), vote(**inputs, impl=impl))


def test_order_of_the_samples_decides_only_between_tied_classes(impl):
    inputs = build("ties", q=400)
    shuffled = inputs["answers"].gather(1, torch.rand(inputs["answers"].shape).argsort(1))
    plain, other = vote(**inputs, impl=impl), vote(**inputs | {"answers": shuffled}, impl=impl)
    assert equal(plain._replace(winner=other.winner), other)
    same = plain.winner == other.winner
    assert same[plain.ties == 1].all() and not same.all()


def test_an_unchecked_sum_beyond_float64_wins(impl):
    engine = getattr(torch.ops.calm_fast, f"vote_{impl}_fwd")
    scores = torch.tensor([[1.5e308, 1.5e308, 1.0]], dtype=torch.float64)
    found = engine(torch.tensor([[3, 3, 4]]), scores, None, "weighted", 1.0)
    assert [x.item() for x in found] == [3, math.inf, math.inf, math.inf, 1]


def test_a_question_does_not_depend_on_the_others(impl):
    inputs = build("long", q=9)
    whole = vote(**inputs, impl=impl)
    for rows in (slice(0, 1), slice(3, 8)):
        part = vote(**{n: x[rows] if torch.is_tensor(x) else x for n, x in inputs.items()}, impl=impl)
        assert equal(part, Vote(*(x[rows] for x in whole)))


def test_scores_are_not_looked_at_by_a_count(impl):
    inputs = build("count")
    scores = torch.full(inputs["answers"].shape, float("inf"))
    assert equal(vote(**inputs | {"scores": scores}, impl=impl), vote(**inputs, impl=impl))


def test_empty_and_expanded(impl):
    for q, k in ((0, 0), (0, 5), (4, 0)):
        found = vote(torch.zeros(q, k, dtype=torch.int64), torch.zeros(q, k), rule="weighted", impl=impl)
        assert [x.tolist() for x in found] == [[-1] * q, *[[0.0] * q] * 3, [0] * q]
    row = torch.tensor([[2, 1, 1]])
    found = vote(row.expand(5, 3), torch.ones(1, 1).expand(5, 3), valid=torch.tensor([[True]]).expand(5, 3),
                 rule="weighted", impl=impl)  # fmt: skip
    assert found.winner.tolist() == [1] * 5 and found.margin.tolist() == [1.0] * 5


def test_deterministic_whatever_the_threads(impl):
    inputs = build("long", q=64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            found.append(vote(**inputs, impl=impl))
    finally:
        torch.set_num_threads(before)
    assert all(equal(found[0], other) for other in found[1:])


def test_scores_that_require_grad_give_a_plain_vote(impl):
    inputs = build("weighted")
    found = vote(**inputs | {"scores": inputs["scores"].requires_grad_()}, impl=impl)
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("name", ["count", "everything", "no-samples", "strided"])
def test_opcheck(name, impl):
    inputs = build(name)
    arguments = (inputs["answers"], inputs["scores"], inputs["valid"], inputs["rule"], inputs["lam"])
    torch.library.opcheck(getattr(torch.ops.calm_fast, f"vote_{impl}_fwd").default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic, impl):
    torch._dynamo.reset()  # every implementation compiles the same function anew

    def step(answers, scores, valid):
        found = vote(answers, scores * 2, valid=valid, rule="adaptive", lam=0.5, impl=impl)
        return found.winner + 1, found.weight / found.total, found.margin, found.ties

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for sizes in ({"q": 33}, {"q": 21, "k": 9}):
        inputs = build("everything", **sizes)
        tensors = [inputs[n] for n in ("answers", "scores", "valid")]
        for a, b in zip(compiled(*tensors), step(*tensors), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_torch_as_it_runs_on_a_gpu(case: Case, monkeypatch):
    """There it reads no ids and lets no two additions meet; on a CPU that must give the same bits."""
    inputs = CASES.build(case, torch.device("cpu"))
    monkeypatch.setattr(vote_impl, "class_columns", lambda a, v: (vote_impl.class_slots(a, v), a.shape[1]))
    monkeypatch.setattr(
        vote_impl, "column_sums", lambda c, w, n: vote_impl.add_in_turns(w.new_zeros(w.shape[0], n + 1), c, w)
    )
    assert equal(vote(**inputs, impl="torch"), vote(**inputs, impl="reference"))


def test_memory_of_torch_grows_with_the_samples_not_their_square():
    from calm_fast.benchmarks.timing import peak_bytes

    answers = torch.randint(0, 50, (64, 1024))
    assert peak_bytes(lambda: vote(answers, impl="torch"), torch.device("cpu")) < 100 * answers.numel()


# ---- the compiled library --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_every_lane_equals_the_definition(case: Case, lane):
    inputs = CASES.build(case, torch.device("cpu"))
    assert equal(lane(**inputs), vote(**inputs, impl="reference"))


@pytest.mark.parametrize("rule", ["count", "weighted"])
@pytest.mark.parametrize("k", [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300])
def test_lanes_where_they_change_their_ways(k, rule, lane):
    """Blocks of 64 samples, ids of a byte, 40 classes, 256 samples: on both sides of each, with and without `valid`."""
    g = torch.Generator().manual_seed(k)
    scores = torch.randint(0, 5, (24, k), generator=g).double() / 4
    scores[torch.rand(24, k, generator=g) < 0.1] = NAN
    for classes in (1, 2, 7, 8, 9, 16, 17, 39, 40, 41, 256, 257):
        answers = torch.randint(0, classes, (24, k), generator=g)
        answers[:, k // 2] = classes - 1
        for valid in (None, torch.rand(24, k, generator=g) < torch.rand(24, 1, generator=g)):
            expected = vote(answers, scores, valid=valid, rule=rule, impl="reference")
            assert equal(lane(answers, None if rule == "count" else scores, valid, rule, 1.0), expected)


def test_lanes_with_exactly_so_many_classes(lane):
    """Every sample a class of its own, up to where the table takes over."""
    for k in (8, 39, 40, 41, 48, 256):
        answers = torch.arange(k).repeat(3, 1).flip(1)
        scores = torch.linspace(0, 1, k).repeat(3, 1)
        expected = vote(answers, scores, rule="adaptive", lam=2.0, impl="reference")
        assert equal(lane(answers, scores, None, "adaptive", 2.0), expected)


def test_any_int64_is_a_class_to_the_library(lane):
    """Colliding and extreme ids."""
    extreme = torch.tensor([2**63 - 1, 0, 2**62, 255, 256, 2**32, 2**32 + 255])
    g = torch.Generator().manual_seed(0)
    for ids in (extreme, torch.arange(100) * 2**56, torch.arange(200) << 40):
        answers = ids[torch.randint(0, len(ids), (40, 100), generator=g)]
        found = lane(answers, None, None, "count", 1.0)
        for row, winner, weight in zip(answers.tolist(), found.winner.tolist(), found.weight.tolist(), strict=True):
            assert (winner, weight) == Counter(row).most_common(1)[0]


@pytest.mark.parametrize("rule", RULES)
def test_an_unchecked_negative_answer_does_not_vote(rule, lane):
    """Under torch.compile and on a GPU nobody reads the answers: every engine takes the others alone."""
    g = torch.Generator().manual_seed(3)
    answers = torch.randint(0, 4, (30, 70), generator=g)
    scores = torch.rand(30, 70, generator=g).masked_fill(torch.rand(30, 70, generator=g) < 0.2, NAN)
    valid = torch.rand(30, 70, generator=g) < 0.8
    wrong = torch.rand(30, 70, generator=g) < 0.3
    given = answers.masked_fill(wrong, -(2**63)).masked_fill(wrong & (scores > 0.5), -1)
    scores = None if rule == "count" else scores
    for mask in (None, valid):
        expected = vote(answers, scores, valid=~wrong if mask is None else mask & ~wrong, rule=rule, impl="reference")
        arguments = (given, scores, mask, rule, 1.0)
        assert equal(lane(*arguments), expected)
        assert equal(Vote(*vote_impl.vote_torch(*arguments)), expected)
        assert equal(Vote(*vote_reference(*arguments)), expected)
        inputs = {"answers": given, "scores": scores, "valid": mask, "rule": rule, "lam": 1.0}
        emulated = emulated_vote.run(inputs)
        assert all(torch.equal(emulated[name], value.double()) for name, value in expected._asdict().items())


def test_the_library_refuses_wrong_tensors_of_a_direct_call():
    if why := native_library.obstacle("vote"):
        pytest.skip(why)
    answers, scores = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4)
    call = torch.ops.calm_fast._vote_native_fwd
    for arguments in (
        (answers.int(), None, None),
        (answers[0], None, None),
        (answers.t(), None, None),
        (answers, scores[:2], None),
        (answers, scores.half(), None),
        (answers, scores, answers),
    ):
        with pytest.raises(RuntimeError, match="vote: `"):
            call(*arguments, False, 1.0, -1)
    with pytest.raises(RuntimeError, match="`lane` must be -1 or at most .* got 9"):
        call(answers, None, None, False, 1.0, 9)


def test_auto_takes_the_library_where_it_is(monkeypatch):
    answers = torch.zeros(2, 3, dtype=torch.int64)
    monkeypatch.setattr(native_library, "obstacle", lambda op, device_type="cpu": None)
    assert (decide(answers).impl, decide(answers, impl="native").impl) == ("native", "native")
    monkeypatch.setattr(native_library, "obstacle", lambda op, device_type="cpu": "it was not built")
    assert decide(answers).impl == "torch" and "it was not built" in str(decide(answers))
    with pytest.raises(RuntimeError, match="it was not built"):
        vote(answers, impl="native")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: there is no Triton kernel"):
        vote(answers, impl="triton")
