"""packed_linear: the definition against plain loops, both implementations against float64, what may be packed."""

from __future__ import annotations

import math

import pytest
import torch

from calm_fast._ops.packed_linear.api import Packed, can_pack, linear, linear_into, pack
from calm_fast._ops.packed_linear.reference import packed_linear_reference
from calm_fast.core import native_library
from calm_fast.core.numerics import check
from calm_fast.ops import INTERNAL_OPS, OPS
from calm_fast.verify import run
from calm_fast.verify.cases import op_cases

CASES = op_cases("packed_linear")


def by_hand(x, weight, bias, residual):
    """The definition in Python floats, for x (T, K)."""
    rows = []
    for i, token in enumerate(x.tolist()):
        row = [math.fsum(a * b for a, b in zip(token, column, strict=True)) for column in weight.tolist()]
        for added in ([] if bias is None else [bias.tolist()], [] if residual is None else [residual[i].tolist()]):
            row = [a + b for a, b in zip(row, added[0], strict=True)] if added else row
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_definition_matches_plain_loops(bias, residual):
    x, weight = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64) if bias else None
    r = torch.randn(3, 5, dtype=torch.float64) if residual else None
    got = packed_linear_reference(x, weight, b, r)
    torch.testing.assert_close(got, by_hand(x, weight, b, r), rtol=0, atol=1e-13)
    assert torch.equal(packed_linear_reference(x[1], weight, b, None if r is None else r[1]), got[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_reference_keeps_the_dtype_and_rounds_once(dtype):
    x, weight, residual = (torch.randn(s, dtype=torch.float64).to(dtype) for s in ((9, 33), (6, 33), (9, 6)))
    got = packed_linear_reference(x, weight, residual=residual)
    want = packed_linear_reference(x.double(), weight.double(), residual=residual.double())
    error, size = (got.double() - want).abs(), want.abs() + x.double().abs() @ weight.double().abs().mT
    assert got.dtype == dtype and bool((error <= torch.finfo(dtype).eps * want.abs() + 35 * 2**-24 * size).all())


@pytest.mark.parametrize("impl", CASES.impls)
@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_error_within_its_bound(case, impl):
    if impl == "native" and (why := native_library.obstacle("packed_linear") or CASES.obstacle(impl, "cpu")):
        pytest.skip(why)
    assert [row for row in check(CASES, case, impl) if not row.ok] == []


def test_a_wrong_product_exceeds_its_bound():
    """float16 operands, one column dropped, a bias applied twice: each is seen in every case that has it."""
    for case in CASES.cases():
        inputs = CASES.build(case, torch.device("cpu"))
        wrong = {"rounded": inputs | {"x": inputs["x"].half().float()}}
        if inputs["x"].shape[-1] > 1:
            wrong["dropped"] = inputs | {"x": inputs["x"][..., 1:], "weight": inputs["weight"][:, 1:]}
        if inputs["bias"] is not None:
            wrong["twice"] = inputs | {"bias": 2 * inputs["bias"]}
        truth = run.truth_of(CASES, inputs, case.dtype)
        if truth.values["out"].numel() == 0 or inputs["x"].numel() == 0:
            continue
        for name, changed in wrong.items():
            rows = run.judge(case, "torch", torch.device("cpu"), CASES.run(changed, "torch"), truth)
            assert not rows[0].ok, f"{case}: {name}"


def test_verify_runs_internal_ops_too():
    planned = {part.op for part in run.plan()}
    assert set(OPS) | set(INTERNAL_OPS) == planned
    assert {part.impl for part in run.plan(["packed_linear"])} == {"torch", "native"}
    with pytest.raises(ValueError, match="`op` must be one of .*'packed_linear', got 'linear'"):
        run.plan(["linear"])


def test_verify_says_why_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(type(CASES), "obstacle", lambda self, impl, device: "packed products need AVX2")
    monkeypatch.setattr(native_library, "obstacle", lambda op, device="cpu": None)
    part = next(part for part in run.plan(["packed_linear"], ["native"]) if part.device == "cpu")
    assert part.skipped == "packed products need AVX2"


def test_native_without_a_packed_weight_is_refused():
    inputs = CASES.build(CASES.cases()[0], torch.device("cpu"))
    double = {name: t if t is None else t.double() for name, t in inputs.items()}
    with pytest.raises(
        RuntimeError, match="packed_linear: impl='native' cannot run here: torch.float64 was not packed"
    ):
        CASES.run(double, "native")


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 0, 7)])
def test_plain_weights_take_any_leading_dimensions(shape):
    x, w, bias = torch.randn(shape), torch.randn(40, 7), torch.randn(40)
    residual = torch.randn(*shape[:-1], 40)
    truth = x.double() @ w.double().mT
    torch.testing.assert_close(linear(x, w, bias).double(), truth + bias, rtol=1e-5, atol=1e-5)
    before = residual.clone()
    torch.testing.assert_close(linear_into(residual, x, w).double(), truth + residual, rtol=1e-5, atol=1e-5)
    assert torch.equal(residual, before)


def test_plain_weights_have_gradients():
    x, w, residual = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (2, 3, 5)))
    assert torch.autograd.gradcheck(linear_into, (residual, x, w))
    assert torch.autograd.gradcheck(linear, (x, w))


def test_without_the_library_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(native_library, "obstacle", lambda op, device="cpu": "it was not built")
    w = torch.randn(5, 4)
    assert not can_pack(torch.randn(3, 4)) and pack(w) is w and not isinstance(pack(w), Packed)


def test_shapes_that_do_not_fit_are_refused():
    x, w = torch.randn(3, 4), torch.randn(5, 6)
    for factor in (w, pack(w)):
        with pytest.raises(RuntimeError):
            linear(x, factor)
        with pytest.raises(RuntimeError):
            linear_into(torch.randn(3, 5), x, factor)
