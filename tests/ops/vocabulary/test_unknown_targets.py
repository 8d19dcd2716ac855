"""Targets and sequence ids that nobody checked, as in a graph and on a GPU: NaN for the token, no read outside."""

from __future__ import annotations

import math

import pytest
import torch

import calm_fast._ops.linear_logprob.registered
import calm_fast._ops.linear_nce.registered  # noqa: F401  defines the torch.ops that are called here
from calm_fast._ops.linear_logprob.reference import linear_logprob_reference
from calm_fast._ops.linear_nce.reference import linear_nce_reference
from calm_fast._ops.linear_nce.triton_impl import linear_nce_triton_step
from calm_fast.core import native_library
from calm_fast.core.dispatch import triton_obstacle

T, D, V, BAD_ROW = 6, 8, 21, 1
KNOWN = torch.tensor([3, 0, 7, -100, 0, V - 1])
# just outside, in the last tile but outside, and far enough that any read would fail
OUTSIDE = pytest.mark.parametrize("target", [-1, V, V + 3, -(2**62), 2**62])
MISSING = {
    "native": native_library.obstacle("linear_nce") or native_library.obstacle("linear_logprob"),
    "triton": triton_obstacle(torch.device("cpu")),
}
IMPLS = pytest.mark.parametrize(
    "impl",
    [
        pytest.param(impl, marks=pytest.mark.skipif(MISSING.get(impl) is not None, reason=str(MISSING.get(impl))))
        for impl in ("reference", "torch", "native", "triton")
    ],
)


def with_target(target):
    return KNOWN.index_fill(0, torch.tensor(BAD_ROW), target)


def tensors(*shapes):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g) for shape in shapes]


def logprob(impl, targets, entropy=True):
    """Return logprob, entropy, rank and the gradients of hidden and weight, past the checks of the public op."""
    hidden, weight = (t.requires_grad_() for t in tensors((T, D), (V, D)))
    if impl == "reference":
        found = linear_logprob_reference(hidden, weight, targets)
    else:
        op = getattr(torch.ops.calm_fast, f"linear_logprob_{impl}_fwd")
        found = op(hidden, weight, None, targets, 1.0, None, -100, entropy, True)
    results = found[:2] if entropy else found[:1]
    grads = torch.autograd.grad(results, (hidden, weight), [torch.arange(1.0, T + 1)] * len(results))
    return *(t.detach() for t in found[:3]), *grads


@OUTSIDE
@IMPLS
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "plain"])
def test_logprob_of_an_unknown_target_is_nan(impl, target, entropy):
    found, expected = logprob(impl, with_target(target), entropy), logprob(impl, KNOWN, entropy)
    others = [i for i in range(T) if i != BAD_ROW]
    for one, two in zip((found[0], found[2], found[3]), (expected[0], expected[2], expected[3]), strict=True):
        torch.testing.assert_close(one[others], two[others], rtol=0, atol=0)
    if entropy:  # no target enters it
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    assert math.isnan(found[0][BAD_ROW]) and int(found[2][BAD_ROW]) == 0
    assert bool(found[3][BAD_ROW].isnan().all()) and bool(found[4].isnan().all())


def nce(impl, targets, seq_ids, form):
    """Return the loss and the student's gradient, in two passes or in a step; Triton's step has two forms."""
    student, nat, neg, weight = tensors((T, D), (T, D), (T, D), (V, D))
    student.requires_grad_()
    options = (0.5, 1.0, 0.5)
    if impl == "reference":
        loss = linear_nce_reference(student, nat, neg, weight, targets, seq_ids, *options)
        return loss.detach(), torch.autograd.grad(loss, student)[0]
    arguments = (student, nat, neg, weight, None, targets, seq_ids, *options, None, -100)
    if form == "sweep":
        loss = getattr(torch.ops.calm_fast, f"linear_nce_{impl}_fwd")(*arguments)[0]
        return loss.detach(), torch.autograd.grad(loss, student)[0]
    with torch.no_grad():
        if impl == "triton":
            return linear_nce_triton_step(*arguments, rows=4, whole=form == "step")
        return getattr(torch.ops.calm_fast, f"linear_nce_{impl}_step")(*arguments)


def engine(impl, form):
    why = MISSING.get(impl)
    return pytest.param(impl, form, id=f"{impl}-{form}", marks=pytest.mark.skipif(why is not None, reason=str(why)))


PAIRS = [engine(impl, form) for impl in ("torch", "native", "triton") for form in ("sweep", "step")]
ENGINES = [engine("reference", "sweep"), *PAIRS, engine("triton", "any-tokens")]
FORMS = pytest.mark.parametrize(("impl", "form"), ENGINES)


@OUTSIDE
@FORMS
def test_nce_with_an_unknown_target_is_nan(impl, target, form):
    seq_ids = torch.tensor([0, 0, 1, 1, 2, 2])
    loss, gradient = nce(impl, with_target(target), seq_ids, form)
    clean = nce(impl, KNOWN, seq_ids, form)
    others = [i for i in range(T) if i != BAD_ROW]
    assert math.isnan(loss) and bool(gradient[BAD_ROW].isnan().all()) and clean[0].isfinite()
    torch.testing.assert_close(gradient[others], clean[1][others], rtol=1e-5, atol=1e-7)


@FORMS
@pytest.mark.parametrize("seq_id", [-1, T, -(2**62), 2**62])
def test_nce_with_an_unknown_sequence_is_nan(impl, seq_id, form):
    seq_ids = torch.tensor([0, seq_id, 1, 1, 2, 2])
    loss, gradient = nce(impl, KNOWN, seq_ids, form)
    assert math.isnan(loss) and bool(gradient[BAD_ROW].isnan().all())
    assert bool(gradient[2:].isfinite().all())


@pytest.mark.parametrize("impl", ["reference", "torch", "native"])
def test_values_that_can_be_read_are_refused(impl):
    from calm_fast.ops import linear_logprob

    if MISSING.get(impl):
        pytest.skip(MISSING[impl])
    hidden, weight = tensors((T, D), (V, D))
    with pytest.raises(ValueError, match="`targets` must be ignore_index"):
        linear_logprob(hidden, weight, with_target(V), impl=impl)
