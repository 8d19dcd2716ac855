"""op_name against its float64 definition: every implementation, every case, errors, compile, gradients."""

from __future__ import annotations

import pytest
import torch

from calm_fast import ops
from calm_fast._ops.op_name.cases import CASES
from calm_fast.core.numerics import check


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_error_is_within_its_bound(case, impl):
    rows = check(CASES, case, impl)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradcheck(impl):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.op_name(x, scale=0.7, impl=impl), x)


def test_registered_op_passes_opcheck():
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.calm_fast.op_name_triton_fwd.default, (x, 0.7))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "op_name: `x` must be a tensor"),
        ({"x": torch.ones(3)}, ValueError, "op_name: `x` must be 2-dimensional"),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "op_name: `x` must have dtype"),
        ({"x": torch.ones(3, 2), "scale": "2"}, TypeError, "op_name: `scale` must be a finite number"),
        ({"x": torch.ones(3, 2), "scale": float("nan")}, ValueError, "op_name: `scale` must be finite"),
        ({"x": torch.ones(3, 2), "impl": "fast"}, ValueError, "op_name: `impl` must be one of"),
        ({"x": torch.ones(3, 2), "impl": "native"}, RuntimeError, "cannot run here"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error) as caught:
        ops.op_name(**arguments)
    assert words in str(caught.value)


def test_runs_are_equal_bit_for_bit():
    x = torch.randn(37, 31)
    first = ops.op_name(x, scale=0.3, impl="triton")
    assert all(torch.equal(ops.op_name(x, scale=0.3, impl="triton"), first) for _ in range(20))
