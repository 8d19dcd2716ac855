"""Every CUDA kernel, emulated: right on every schedule for verify's cases and more, and its mutants are found."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from calm_fast.core.numerics import Case, Inputs, Truth
from calm_fast.verify import emulation
from calm_fast.verify.cases import op_cases
from calm_fast.verify.emulation import SCHEDULES

sys.path.insert(0, str(Path(__file__).resolve().parent))  # helpers beside the tests, not a package

import emulated_cases as known  # noqa: E402
import mutate  # noqa: E402

OPS = known.emulated_ops()
if why := emulation.obstacle("vote"):
    pytest.skip(f"CUDA kernels cannot be emulated: {why}", allow_module_level=True)


def source(op: str) -> str:
    return emulation.kernels(op).read_text()


@functools.cache
def prepared(op: str) -> list[tuple[Case, Inputs, Truth]]:
    return mutate.with_truth(op, [*op_cases(op).cases(), *known.EXTRA[op]()])


@functools.cache
def few(op: str) -> list[tuple[Case, Inputs, Truth]]:
    return mutate.with_truth(op, known.FEW[op]())


def test_every_kernel_has_its_tests():
    assert {"vote", "maj_at_k", "cross_attention"} <= set(OPS)
    assert set(OPS) == set(known.EXTRA) == set(known.FEW) == set(known.WRONG)
    cuda = {path.parent.name for path in emulation.CSRC.glob("*/*_cuda.cu")}
    assert cuda == set(OPS), "every op with a CUDA kernel runs in the emulation"
    for op in OPS:
        assert mutate.barriers(source(op)) and len(known.WRONG[op]) >= 2


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order}{s.seed}")
@pytest.mark.parametrize("op", OPS)
def test_kernel_is_right_on_every_schedule(op, schedule):
    assert mutate.first_problem(op, prepared(op), emulation.CSRC, (schedule,)) is None


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_the_schedule(op):
    """The bits do not depend on the order in which threads or blocks run."""
    run = emulation.adapter(op).run
    for _, inputs, _ in few(op):
        first = run(inputs, SCHEDULES[0])
        for schedule in SCHEDULES[1:]:
            for name, values in run(inputs, schedule).items():
                assert torch.equal(values, first[name]) or values.isnan().all()


@pytest.fixture(scope="module")
def switchable(tmp_path_factory):
    """switchable(op) returns a csrc/ whose kernel skips the barrier that `mutate.skip_barrier` names."""

    @functools.cache
    def make(op: str) -> Path:
        return mutate.copy_with_mutant(
            emulation.CSRC, tmp_path_factory.mktemp(op), op, mutate.with_switchable_barriers(source(op))
        )

    return make


BARRIERS = [(op, number, text) for op in OPS for number, text in enumerate(mutate.barriers(source(op)))]


@pytest.mark.parametrize(("op", "number", "text"), BARRIERS, ids=lambda value: str(value).replace(" ", "_"))
def test_a_removed_barrier_is_found(op, number, text, switchable):
    mutate.skip_barrier(op, switchable(op), number)
    assert mutate.first_problem(op, few(op), switchable(op), SCHEDULES) is not None, text


@pytest.mark.parametrize("op", OPS)
def test_with_every_barrier_in_place_nothing_is_found(op, switchable):
    """Without this, the tests above would prove nothing."""
    mutate.skip_barrier(op, switchable(op), -1)
    assert mutate.first_problem(op, few(op), switchable(op), SCHEDULES) is None


WRONG = [(op, number) for op in OPS for number in range(len(known.WRONG[op]))]


@pytest.mark.parametrize(("op", "number"), WRONG)
def test_a_wrong_index_is_found(op, number, tmp_path):
    mutant = mutate.replace_once(source(op), *known.WRONG[op][number])
    # it runs until the first wrong result, so compiling is most of the time, and -O0 halves it
    csrc = mutate.copy_with_mutant(emulation.CSRC, tmp_path, op, mutant, "-O0")
    assert mutate.first_problem(op, few(op), csrc, SCHEDULES) is not None, mutant.name


def test_auto_takes_the_cuda_kernels_and_says_that_they_are_unmeasured(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    import calm_fast
    from calm_fast.core import native_library

    only_resampled = "the compiled library has no maj_at_k_exact for cuda tensors"
    monkeypatch.setattr(
        native_library, "obstacle", lambda op, device: only_resampled if op == "maj_at_k_exact" else None
    )
    with FakeTensorMode():
        answers = torch.zeros(3, 4, dtype=torch.int64, device="cuda")
        correct = torch.zeros(3, dtype=torch.int64, device="cuda")
        for decision in (
            calm_fast.explain("vote", answers),
            calm_fast.explain("maj_at_k", answers, correct, ks=[1], method="resample"),
        ):
            assert decision.impl == "native" and "not measured on a GPU yet" in decision.reason
        exact = calm_fast.explain("maj_at_k", answers, correct, ks=[1])
        assert exact.impl == "torch" and only_resampled in exact.reason
