"""NaN and Inf in rows that do not count (ignored targets, invalid samples), and in one row of a call among others."""

from __future__ import annotations

import math

import pytest
import torch

from calm_fast import ops
from calm_fast._ops.packed_linear.api import linear, pack
from calm_fast.core import native_library
from calm_fast.core.dispatch import triton_obstacle

BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
MISSING = {"triton": triton_obstacle(torch.device("cpu"))}
IMPLS = pytest.mark.parametrize("impl", ["reference", "torch", "native", "triton"])


def skip_without(op, impl):
    if why := native_library.obstacle(op) if impl == "native" else MISSING.get(impl):
        pytest.skip(str(why))


@BAD
@IMPLS
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_logprob_of_ignored_rows(impl, bad, softcap):
    skip_without("linear_logprob", impl)
    targets = torch.tensor([3, -100, 7, -100, 0])
    hidden, weight = torch.randn(5, 16), torch.randn(40, 16)
    results = []
    for filled in (0.0, bad):
        h = hidden.masked_fill((targets == -100)[:, None], filled).requires_grad_()
        w = weight.clone().requires_grad_()
        logprob = ops.linear_logprob(h, w, targets, softcap=softcap, impl=impl)
        upstream = torch.ones(5).masked_fill(targets == -100, filled)
        results.append((logprob, *torch.autograd.grad(logprob, (h, w), upstream)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@BAD
@IMPLS
def test_linear_nce_of_ignored_rows(impl, bad):
    skip_without("linear_nce", impl)
    targets = torch.tensor([3, -100, 7, -100, 0, 5])
    states, weight = torch.randn(3, 6, 16), torch.randn(40, 16)
    results = []
    for filled in (0.0, bad):
        student, nat, neg = states.masked_fill((targets == -100)[:, None], filled)
        student, w = student.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = ops.linear_nce(student, nat, neg, w, targets, torch.arange(6) // 3, impl=impl)
        results.append((loss, *torch.autograd.grad(loss.sum(), (student, w))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@BAD
@IMPLS
def test_dual_lora_rows_stay_apart(impl, bad):
    skip_without("dual_lora", impl)
    x, y = torch.randn(7, 16), torch.randn(7, 12)
    shapes = ((2, 16), (12, 2), (2, 16), (12, 2), (4, 16), (4, 12))
    rest = (*(torch.randn(shape) for shape in shapes), [torch.randn(12, 12)])
    results, clean = [], [0, 1, 2, 4, 6]
    for filled in (0.0, bad):
        a, b = x.clone(), y.clone()
        a[3], b[5] = filled, filled
        a.requires_grad_()
        out = ops.dual_lora(a, b.requires_grad_(), *rest, scaling=1.0, impl=impl)
        grads = torch.autograd.grad(out[clean].sum(), (a, b))
        results.append(tuple(t[clean] for t in (out, *grads)))
        assert filled == 0.0 or not bool(out[[3, 5]].isfinite().any())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@BAD
@pytest.mark.parametrize("impl", ["reference", "torch", "native"])
@pytest.mark.parametrize("rule", ["weighted", "adaptive"])
def test_scores_of_invalid_samples_do_not_count(impl, bad, rule):
    skip_without("vote", impl)
    answers, scores = torch.randint(0, 3, (4, 8)), torch.rand(4, 8)
    valid = torch.arange(8).expand(4, 8) % 3 != 0
    correct = torch.zeros(4, dtype=answers.dtype)
    found = []
    for filled in (0.5, bad):
        given = scores.masked_fill(~valid, filled)
        found.append(ops.vote(answers, given, valid=valid, rule=rule, impl=impl))
        found.append(
            ops.maj_at_k(answers, correct, given, ks=[1, 3], valid=valid, method="resample", rule=rule, impl=impl)
        )
    for one, two in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(tuple(one), tuple(two), rtol=0, atol=0)


@BAD
@pytest.mark.parametrize("rows", [2, 40])
def test_packed_linear_rows_stay_apart(bad, rows):
    x, weight = torch.randn(rows, 32), pack(torch.randn(48, 32))
    expected = linear(x, weight)
    x[1] = bad
    found = linear(x, weight)
    others = [i for i in range(rows) if i != 1]
    torch.testing.assert_close(found[others], expected[others], rtol=0, atol=0)
    assert not bool(found[1].isfinite().any())
