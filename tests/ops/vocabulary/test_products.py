"""Products on CPUs without 16-bit products, where they are taken from float32 copies of parts."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_logprob.cases import CASES as LOGPROB
from calm_fast._ops.linear_nce.cases import CASES as NCE
from calm_fast._ops.vocabulary import products
from calm_fast.core import native_library
from calm_fast.core.numerics import check, unit_roundoff

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def copies(monkeypatch):
    """Let torch have no 16-bit products, and cut factors into small parts. Return the shapes that torch.mm is given."""
    monkeypatch.setattr(products, "product_dtype", lambda _, dtype: torch.float32 if dtype in HALF else dtype)
    monkeypatch.setattr(products, "_COPIED", 256)
    seen = []
    mm = torch.mm

    def watched(a, b, **kwargs):
        if a.dtype in HALF:
            seen.append(tuple(a.shape))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", watched)
    return seen


def factors(dtype, m, k, n):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator).to(dtype) for shape in ((m, k), (k, n)))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("m, k, n", [(3, 5, 7), (40, 300, 17), (17, 16, 300), (5, 0, 4), (600, 3, 2)])
def test_a_product_is_rounded_once(copies, dtype, m, k, n):
    a, b = factors(dtype, m, k, n)
    exact = a.double() @ b.double()
    # k sums of products in float32, then one rounding
    summed = (k + 1) * 2.0**-24 * (a.double().abs() @ b.double().abs())
    rounded = summed + unit_roundoff(dtype) * (exact.abs() + summed)
    scratch = torch.full((m, n), float("nan"))
    found = (products.multiply(a, b), products.multiply_into(a.new_empty(m, n), a, b, scratch=scratch))
    for product in found:
        assert product.dtype == dtype
        assert bool(((product.double() - exact).abs() <= rounded).all())
    for product in (products.wide_product(a, b), products.exact_product(a, b)):
        assert product.dtype == torch.float32
        assert bool(((product.double() - exact).abs() <= summed).all())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.multiply(a, b).equal(found[0])
    assert not copies


def test_few_rows_are_not_copied(copies):
    a, b = factors(torch.bfloat16, 2, 64, 8)
    products.multiply(a, b)
    assert copies == [(2, 64)]


def test_other_dtypes_are_not_copied(copies, monkeypatch):
    monkeypatch.setattr(products, "_add_copies", None)
    for dtype in (torch.float32, torch.float64):
        a, b = factors(dtype, 40, 64, 8)
        assert products.multiply(a, b).equal(a @ b)


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("ops", [LOGPROB, NCE], ids=lambda ops: ops.op)
def test_the_ops_keep_their_bounds(copies, monkeypatch, ops, dtype, impl):
    if impl == "native" and (obstacle := native_library.obstacle(ops.op, "cpu")):
        pytest.skip(obstacle)
    cases = [case for case in ops.cases() if case.dtype == dtype and case.name in ("everything", "past-edges")]
    assert len(cases) == 2
    for case in cases:
        assert all(row.ok for row in check(ops, case, impl)), case


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("k", [17, 24, 83, 97, 128, 578])
def test_a_row_that_is_not_finite_stays_in_its_row(dtype, k):
    """With matrix units oneDNN reads past the end of a row, up to the next multiple of 32 columns."""
    a, b = factors(dtype, 24, k, 16)
    a[3], a[17] = float("nan"), float("inf")
    out = a.new_empty(24, 16)
    for product in (products.multiply(a, b), products.multiply_into(out, a, b), products.exact_product(a, b)):
        found = ~product.isfinite()
        assert found.any(1).nonzero().flatten().tolist() == [3, 17]
    assert products.multiply(a.T.contiguous().T, b).isfinite().all(1).sum() == 22


def test_rows_are_followed_by_zeros_where_they_are_read_past_their_end(monkeypatch):
    a, _ = factors(torch.bfloat16, 5, 40, 1)
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "matrix units")
    rows = products.guarded(a)
    assert rows.equal(a) and rows.stride() == (64, 1) and not rows.as_strided((5, 24), (64, 1), 40).any()
    for other in (a[:, :32], a.T, a.float()):
        assert products.guarded(other) is other
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None)
    assert products.guarded(a) is a
