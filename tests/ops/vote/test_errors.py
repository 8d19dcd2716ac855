"""vote: bad input raises before anything runs and names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

import calm_fast
from calm_fast._ops.vote.api import decide, vote

Q, K = 3, 4
ANSWERS = torch.arange(Q * K).view(Q, K) % 3
SCORES = torch.linspace(0, 1, Q * K).view(Q, K)
VALID = torch.ones(Q, K, dtype=torch.bool)
INF = float("inf")


def changed(tensor, value):
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("function", [vote, decide])
@pytest.mark.parametrize(
    ("problem", "wrong", "words"),
    [
        (TypeError, {"answers": [[1, 2]]}, "`answers` must be a tensor .Q, K., got list"),
        (TypeError, {"answers": ANSWERS.int()}, "`answers` must have dtype int64, got torch.int32"),
        (TypeError, {"answers": ANSWERS.double()}, "`answers` must have dtype int64, got torch.float64"),
        (TypeError, {"answers": ANSWERS.bool()}, "`answers` must have dtype int64, got torch.bool"),
        (ValueError, {"answers": ANSWERS[0]}, r"`answers` must be 2-dimensional .Q, K., got shape \(4,\)"),
        (ValueError, {"answers": ANSWERS.to_sparse()}, "`answers` must be a dense"),
        (ValueError, {"answers": changed(ANSWERS, -1)}, "`answers` must be class ids >= 0 .*`valid`.*, got -1"),
        (TypeError, {"scores": 0.5}, "`scores` must be a tensor .Q, K., got float 0.5"),
        (
            TypeError,
            {"scores": ANSWERS},
            "`scores` must have dtype float32, float64, bfloat16, float16, got torch.int64",
        ),
        (ValueError, {"scores": SCORES[:2]}, r"`scores` must be of answers' shape \(3, 4\), got shape \(2, 4\)"),
        (ValueError, {"scores": SCORES[:, :1]}, r"`scores` must be of answers' shape \(3, 4\), got shape \(3, 1\)"),
        (ValueError, {"scores": SCORES.to("meta")}, "`scores` must be on cpu like the other tensors, got device meta"),
        (ValueError, {"scores": changed(SCORES, INF)}, r"`scores` must be finite.*, got inf at \(1, 2\)"),
        (ValueError, {"scores": changed(SCORES.half(), -INF)}, r"`scores` must be finite.*, got -inf at \(1, 2\)"),
        (ValueError, {"scores": None}, "`scores` must be given with rule='weighted', got None"),
        (ValueError, {"scores": None, "rule": "adaptive"}, "`scores` must be given with rule='adaptive', got None"),
        (TypeError, {"valid": VALID.long()}, "`valid` must have dtype bool, got torch.int64"),
        (ValueError, {"valid": VALID[:, :3]}, r"`valid` must be of answers' shape \(3, 4\), got shape \(3, 3\)"),
        (ValueError, {"valid": VALID.to("meta")}, "`valid` must be on cpu like the other tensors, got device meta"),
        (ValueError, {"rule": "majority"}, "`rule` must be one of 'count', 'weighted', 'adaptive', got 'majority'"),
        (TypeError, {"lam": "1"}, "`lam` must be a finite number, got str"),
        (TypeError, {"lam": True}, "`lam` must be a finite number, got bool"),
        (ValueError, {"lam": float("nan")}, "`lam` must be finite, got nan"),
        (ValueError, {"impl": "cuda"}, "`impl` must be one of .*, got 'cuda'"),
    ],
)
def test_bad_arguments(problem, wrong, words, function):
    arguments = {"answers": ANSWERS, "scores": SCORES, "valid": VALID, "rule": "weighted"} | wrong
    answers, scores = arguments.pop("answers"), arguments.pop("scores")
    with pytest.raises(problem, match=f"^vote: {words}"):
        function(answers, scores, **arguments)


def test_samples_that_do_not_vote_may_hold_anything():
    valid = changed(VALID, False)
    expected = vote(ANSWERS, SCORES, valid=valid, rule="weighted")
    for value in (INF, -INF, float("nan")):
        found = vote(changed(ANSWERS, -3), changed(SCORES, value), valid=valid, rule="weighted")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_negative_weights_are_refused_and_the_message_says_what_to_do():
    answers, logp = torch.tensor([[0, 0, 0, 1]]), torch.tensor([[-0.5, -0.25, float("nan"), -0.75]])
    with pytest.raises(ValueError, match=r"`scores` must be scores >= 0.*log-probabilities.*exp.*got -0.5 at \(0, 0\)"):
        vote(answers, logp, rule="weighted")
    with pytest.raises(ValueError, match=r"1 \+ lam \* score >= 0 with lam 2.*got -0.75 at \(0, 3\)"):
        vote(answers, logp.double(), rule="adaptive", lam=2.0)
    assert vote(answers, logp, rule="adaptive").winner.item() == 0  # 1 + s is positive
    assert vote(answers, logp).winner.item() == 0  # a count reads no scores
    weights = (logp - logp.nan_to_num(-torch.inf).amax(1, keepdim=True)).exp()
    assert vote(answers, weights, rule="weighted").winner.item() == 0


def test_samples_that_do_not_vote_may_have_negative_weights():
    scores, valid = torch.tensor([[1.0, -5.0, 2.0]]), torch.tensor([[True, False, True]])
    assert vote(torch.tensor([[0, 1, 1]]), scores, valid=valid, rule="weighted").winner.item() == 1


def test_sums_beyond_float64_are_refused():
    scores = torch.tensor([[1.0, 1.0], [1.5e308, 1.5e308]], dtype=torch.float64)
    with pytest.raises(ValueError, match="`scores` must be small enough to be summed in float64.*question 1"):
        vote(torch.tensor([[0, 1], [0, 1]]), scores, rule="weighted")
    assert vote(torch.tensor([[0, 1]]), scores[1:] / 2, rule="weighted").ties.item() == 2


def test_large_finite_scores_are_not_taken_for_infinite_ones():
    scores = torch.full((Q, K), 60000.0, dtype=torch.float16)
    assert vote(ANSWERS, scores, rule="weighted").total.tolist() == [240000.0] * Q


def test_meta_tensors_give_shapes():
    found = vote(ANSWERS.to("meta"), SCORES.to("meta"), valid=VALID.to("meta"), rule="adaptive")
    assert [x.shape for x in found] == [(Q,)] * 5 and found.winner.device.type == "meta"


def test_explain_says_what_runs_and_why():
    text = str(calm_fast.explain("vote", ANSWERS, SCORES, rule="weighted", impl="torch"))
    assert text == "vote: torch (asked for)"
    with pytest.raises(ValueError, match="`scores`"):
        calm_fast.explain("vote", ANSWERS, rule="weighted")
    with pytest.raises(TypeError, match="explain: vote: missing a required argument: 'answers'"):
        calm_fast.explain("vote")


@pytest.mark.gpu
def test_values_are_read_on_a_gpu_only_on_request():
    bad = changed(ANSWERS, -1).cuda()
    vote(bad)
    with calm_fast.validate_values(), pytest.raises(ValueError, match="`answers`"):
        vote(bad)
