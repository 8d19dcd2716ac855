"""The CUDA kernels on a GPU: the cases of the emulation, and agreement with its results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from calm_fast.core import native_library
from calm_fast.core.numerics import Case, check
from calm_fast.verify import run
from calm_fast.verify.cases import op_cases

sys.path.insert(0, str(Path(__file__).resolve().parent))  # helpers beside the tests, not a package

import emulated_cases as known  # noqa: E402

pytestmark = pytest.mark.gpu


def cases(op: str) -> list[Case]:
    return [*run.cases_of(run.Part(op, "native", "cuda")), *known.EXTRA[op]()]


@pytest.mark.parametrize("op", known.emulated_ops())
def test_kernel_is_right_on_a_gpu(op):
    if why := native_library.obstacle(op, "cuda"):
        pytest.skip(why)
    wrong = [row for case in cases(op) for row in check(op_cases(op), case, "native", "cuda") if not row.ok]
    assert not wrong


@pytest.mark.parametrize("op", known.emulated_ops())
def test_twenty_runs_give_the_same_bits(op):
    if why := native_library.obstacle(op, "cuda"):
        pytest.skip(why)
    ops = op_cases(op)
    for case in known.FEW[op]():
        inputs = ops.build(case, torch.device("cuda"))
        first = ops.run(inputs, "native")
        for _ in range(20):
            for name, values in ops.run(inputs, "native").items():
                assert torch.equal(values.nan_to_num(), first[name].nan_to_num()), name


@pytest.mark.parametrize("op", known.emulated_ops())
def test_gpu_and_emulation_agree(op):
    """GPU and emulation agree where all arithmetic is float64 in a fixed order."""
    from calm_fast.verify import emulation

    if why := native_library.obstacle(op, "cuda") or emulation.obstacle(op):
        pytest.skip(why)
    if op not in ("vote", "maj_at_k"):
        pytest.skip("float32 exponentials differ in their last bits between CPU and GPU")
    ops = op_cases(op)
    for case in known.FEW[op]():
        expected = emulation.adapter(op).run(ops.build(case, torch.device("cpu")))
        found = ops.run(ops.build(case, torch.device("cuda")), "native")
        for name, values in expected.items():
            torch.testing.assert_close(found[name].cpu(), values, rtol=1e-14, atol=0, equal_nan=True)
