"""maj_at_k: bad arguments, what auto chooses, and the op as torch sees it."""

from __future__ import annotations

import pytest
import torch

import calm_fast
from calm_fast._ops.maj_at_k.api import maj_at_k
from calm_fast.core import native_library

IDS = torch.zeros(3, 4, dtype=torch.int64)


def good():
    return {"answers": IDS.clone(), "correct": IDS[:, 0].clone(), "ks": [1, 2]}


BAD = {
    "answers is a list": ({"answers": [[0]]}, TypeError, "`answers`.*list"),
    "answers is float": ({"answers": IDS.float()}, TypeError, "`answers`.*float32"),
    "answers is 1-dimensional": ({"answers": IDS[0]}, ValueError, "`answers`.*2-dimensional"),
    "answers is negative": ({"answers": IDS - 1}, ValueError, "`answers`.*-1"),
    "correct is int32": ({"correct": IDS[:, 0].int()}, TypeError, "`correct`.*int32"),
    "correct has another size": ({"correct": IDS[:2, 0]}, ValueError, r"`correct`.*\(3,\).*\(2,\)"),
    "correct is 2-dimensional": ({"correct": IDS}, ValueError, "`correct`.*1-dimensional"),
    "ks is a number": ({"ks": 4}, TypeError, "`ks`.*sequence"),
    "ks is a tensor": ({"ks": torch.tensor([1])}, TypeError, "`ks`.*sequence"),
    "ks is empty": ({"ks": []}, ValueError, "`ks`.*at least one"),
    "ks holds 0": ({"ks": [1, 0]}, ValueError, "`ks`.*from 1.*got 0"),
    "ks holds a float": ({"ks": [1, 2.0]}, TypeError, "`ks`.*float"),
    "ks holds a bool": ({"ks": [True]}, TypeError, "`ks`.*bool"),
    "ks beyond 64 bits": ({"ks": [2**63]}, ValueError, "`ks`"),
    "method is unknown": ({"method": "bootstrap"}, ValueError, "`method`.*'exact', 'resample'.*bootstrap"),
    "exact with weights": ({"scores": torch.ones(3, 4), "rule": "weighted"}, ValueError, "`rule`.*resample"),
    "weights without scores": ({"method": "resample", "rule": "adaptive"}, ValueError, "`scores`"),
    "scores are infinite": (
        {"method": "resample", "rule": "weighted", "scores": torch.full((3, 4), float("inf"))},
        ValueError,
        "`scores`.*finite",
    ),
    "scores are log-probabilities": (
        {"method": "resample", "rule": "weighted", "scores": torch.full((3, 4), -0.5)},
        ValueError,
        r"`scores`.*scores >= 0.*exp\(\)\), got -0.5 at \(0, 0\)",
    ),
    "resamples is 0": ({"method": "resample", "resamples": 0}, ValueError, "`resamples`.*got 0"),
    "resamples is a float": ({"resamples": 10.0}, TypeError, "`resamples`.*float"),
    "seed is None": ({"seed": None}, TypeError, "`seed`.*None"),
    "seed beyond 64 bits": ({"seed": 2**64}, ValueError, "`seed`"),
    "seed below 64 bits": ({"seed": -(2**63) - 1}, ValueError, "`seed`"),
    "valid has another shape": ({"valid": torch.ones(3, 3, dtype=torch.bool)}, ValueError, "`valid`"),
    "lam is NaN": ({"lam": float("nan")}, ValueError, "`lam`.*finite"),
    "rule is unknown": ({"rule": "borda"}, ValueError, "`rule`.*borda"),
    "impl is unknown": ({"impl": "cuda"}, ValueError, "`impl`.*'cuda'"),
}


def test_the_good_arguments_are_good():
    assert maj_at_k(**good()).accuracy.tolist() == [1.0, 1.0]
    assert maj_at_k(**good() | {"ks": range(1, 3)}).accuracy.shape == (2,)
    assert maj_at_k(**good() | {"correct": IDS[:, 0] - 1}).accuracy.tolist() == [0.0, 0.0]  # nobody knows it


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=f"maj_at_k: .*{message}"):
        maj_at_k(**good() | changes)


def test_triton_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: there is no Triton kernel"):
        maj_at_k(**good(), impl="triton")


@pytest.mark.parametrize("method", ["exact", "resample"])
def test_auto_takes_the_compiled_library_where_it_runs(method):
    decision = calm_fast.explain("maj_at_k", **good(), method=method)
    obstacle = native_library.obstacle(f"maj_at_k_{method}")
    assert decision.impl == ("torch" if obstacle else "native")
    if obstacle:
        with pytest.raises(RuntimeError, match="impl='native' cannot run here"):
            maj_at_k(**good(), method=method, impl="native")


def op_arguments(method, rule):
    g = torch.Generator().manual_seed(0)
    answers, scores = torch.randint(0, 3, (5, 9), generator=g), torch.rand(5, 9, generator=g)
    valid = torch.rand(5, 9, generator=g) < 0.8
    scores = None if rule == "count" else scores
    return answers, torch.zeros(5, dtype=torch.int64), scores, valid, [1, 4, 2], method, 7, rule, 1.0, 3


@pytest.mark.parametrize("impl", ["reference", "torch", "native"])
@pytest.mark.parametrize(("method", "rule"), [("exact", "count"), ("resample", "count"), ("resample", "adaptive")])
def test_opcheck(method, rule, impl):
    if impl == "native" and native_library.obstacle(f"maj_at_k_{method}"):
        pytest.skip(native_library.obstacle(f"maj_at_k_{method}"))
    torch.library.opcheck(getattr(torch.ops.calm_fast, f"maj_at_k_{impl}_fwd"), op_arguments(method, rule))


@pytest.mark.parametrize("method", ["exact", "resample"])
def test_compiles_into_one_graph(method):
    def both(answers, correct):
        found = maj_at_k(answers, correct, ks=(1, 3), method=method, resamples=20)
        return found.accuracy * 2, found.stderr

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for q in (4, 7):
        answers = torch.arange(q * 6).view(q, 6).remainder(4)
        correct = torch.zeros(q, dtype=torch.int64)
        for one, two in zip(both(answers, correct), compiled(answers, correct), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-14, atol=0)  # sums in another order


def test_scores_get_no_gradient():
    scores = torch.rand(3, 4, requires_grad=True)
    found = maj_at_k(**good(), scores=scores, method="resample", rule="weighted", resamples=5)
    assert not found.accuracy.requires_grad
