"""linear_nce with a frozen head: loss and gradient in one pass (calm_fast::linear_nce_<engine>_step)."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from calm_fast._ops.linear_nce import schedule
from calm_fast._ops.linear_nce.api import linear_nce
from calm_fast._ops.linear_nce.cases import CASES
from calm_fast._ops.vocabulary.products import exact_product
from calm_fast.benchmarks.timing import peak_bytes
from calm_fast.core import native_library

CPU = torch.device("cpu")
NAMES = ("student", "nat", "neg", "weight", "targets", "seq_ids")
OPTIONS = ("alpha", "temperature", "offset", "bias", "softcap")


@pytest.fixture(params=["torch", "native"])
def impl(request):
    if request.param == "native" and (why := native_library.obstacle(CASES.op)):
        pytest.skip(why)
    return request.param


def build(name="frozen", dtype=torch.float32, **changes):
    inputs = CASES.build(CASES.case(name, dtype, **changes), CPU)
    return {name: inputs[name] for name in (*NAMES, *OPTIONS)}


def step(inputs, impl, dloss=1.0, **changes):
    """Return the loss and the gradient of the student."""
    student = inputs["student"].detach().requires_grad_()
    loss = linear_nce(**{**inputs, "student": student, "impl": impl} | changes)
    return loss.detach(), torch.autograd.grad(loss, student, torch.as_tensor(dloss, dtype=loss.dtype))[0]


def exact(inputs, dloss=1.0):
    double = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return step(double, "reference", dloss)


def calls(work) -> set[str]:
    """Return the names of the registered ops of linear_nce that `work` calls."""

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.add(func.name())
            return func(*args, **(kwargs or {}))

    found: set[str] = set()
    with Recorder():
        work()
    return {name.removeprefix("calm_fast::") for name in found if name.startswith("calm_fast::linear_nce")}


def test_only_a_gradient_of_the_student_alone_takes_the_step(impl):
    inputs = build("everything-frozen")
    forward, both = {f"linear_nce_{impl}_fwd"}, {f"linear_nce_{impl}_fwd", f"linear_nce_{impl}_bwd"}
    assert calls(lambda: step(inputs, impl)) == {f"linear_nce_{impl}_step", "linear_nce_scale_gradient"}
    assert calls(lambda: linear_nce(**inputs, impl=impl)) == forward
    with torch.no_grad():
        student = inputs["student"].clone().requires_grad_()
        assert calls(lambda: linear_nce(**{**inputs, "student": student}, impl=impl)) == forward
    for name in ("weight", "bias"):
        trained = {**inputs, name: inputs[name].clone().requires_grad_()}
        assert calls(lambda trained=trained: step(trained, impl)) == both
        assert calls(lambda trained=trained: linear_nce(**trained, impl=impl).backward()) == both


@pytest.mark.parametrize("name", ["chunks-frozen", "long-sequences-frozen", "everything-frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_has_the_same_bits_with_and_without_a_gradient(name, dtype, impl):
    inputs = build(name, dtype)
    assert torch.equal(step(inputs, impl)[0], linear_nce(**inputs, impl=impl))


@pytest.mark.parametrize("fit", [1, 3, 16, 50])
@pytest.mark.parametrize("name", ["chunks-frozen", "long-sequences-frozen", "everything-frozen", "strided-frozen"])
def test_results_do_not_depend_on_the_chunks(monkeypatch, impl, name, fit):
    dtype = torch.float64 if impl == "torch" else torch.float32
    inputs = build(name, dtype)
    expected = step(inputs, impl)
    monkeypatch.setattr(schedule, "_TOKENS", 1)
    monkeypatch.setattr(schedule, "_KEPT", fit * 2 * inputs["weight"].shape[0] * dtype.itemsize)
    found = step(inputs, impl)
    # a token's bits do not depend on the other tokens
    if impl == "native":
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[0].double(), exact(inputs)[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("ids", "fit", "order", "chunks", "parts"),
    [
        ([0, 0, 1, 1, 2], 2, None, [(0, 2), (2, 4), (4, 5)], []),
        ([0, 0, 1, 1, 2], 4, None, [(0, 4), (4, 5)], []),
        ([4, 0, 4, 0, 2], 3, [1, 3, 4, 0, 2], [(0, 3), (3, 5)], []),
        ([0] * 5 + [3], 2, None, [(5, 6)], [(0, 2), (2, 4), (4, 5)]),
        ([0, 1, 1, 1, 5], 2, None, [(0, 1), (4, 5)], [(1, 3), (3, 4)]),
        # 3 is a quarter of 12
        ([0, 0, 0, *range(1, 10)], 2, None, [(0, 3), (3, 6), (6, 9), (9, 12)], []),
        ([7], 0, None, [(0, 1)], []),
    ],
)
def test_chunks_and_parts_of_sequences(ids, fit, order, chunks, parts):
    found = schedule.sort_and_cut(torch.tensor(ids), fit)
    assert (None if found[0] is None else found[0].tolist()) == order
    assert [(c.start, c.stop) for c in found[1]] == chunks and [(c.start, c.stop) for c in found[2]] == parts


def test_float16_keeps_small_gradients(impl):
    """One of 1000 tokens weighs 1/1000, one of 3000 classes 1/3000: the product is too small for float16."""
    gen = torch.Generator().manual_seed(4)
    t, d, v = 1000, 8, 3000
    student, nat, neg = (torch.randn(t, d, generator=gen).half() for _ in range(3))
    weight = (30 * torch.randn(v, d, generator=gen)).half() * (2 / 30)
    inputs = {"student": student, "nat": nat, "neg": neg, "weight": weight}
    inputs |= {"targets": torch.randint(0, v, (t,), generator=gen), "seq_ids": torch.arange(t) // 100}
    # as a loss scaler would
    scale = 2.0**14
    _, gradient = step(inputs, impl, scale)
    _, truth = exact(inputs, scale)
    # one rounding to float16, and 16-bit logits; without the scaling inside the error is 1024 times as large
    assert (gradient.double() - truth).abs().max() <= 2.0**-9 * truth.abs().max()
    # unscaled, the result itself rounds to 0
    assert not torch.equal(step(inputs, impl, 1.0)[1] * scale, gradient)


def test_a_large_weight_does_not_overflow_float16(impl):
    """Sums of the last product exceed 65504 before they are scaled and are far below it afterwards."""
    inputs = build(dtype=torch.float16, alpha=0.5, magnitude=2**-10)
    inputs["weight"] = inputs["weight"] * 2000
    gradient, truth = step(inputs, impl)[1], exact(inputs)[1]
    assert gradient.isfinite().all() and truth.abs().max() > 16
    assert (gradient.double() - truth).abs().max() <= 2.0**-8 * truth.abs().max()


def test_a_certain_token_keeps_its_small_gradient(impl):
    """With p(target) = 1 - 1e-4, p - 1 must survive the rounding of 16-bit logits."""
    gen = torch.Generator().manual_seed(5)
    weight = torch.nn.functional.normalize(torch.randn(40, 64, generator=gen), dim=1).bfloat16()
    targets = torch.arange(12)
    hidden = (13 * weight[:12].float()).bfloat16()
    inputs = {"student": hidden, "nat": hidden, "neg": hidden, "weight": weight}
    inputs |= {"targets": targets, "seq_ids": torch.zeros_like(targets), "alpha": 0.0}
    gradient, truth = step(inputs, impl)[1].double(), exact(inputs)[1]
    eager = hidden.detach().requires_grad_()
    torch.nn.functional.cross_entropy(eager @ weight.T, targets).backward()
    allowed = 2 * (eager.grad.double() - truth).norm(dim=1) + 2.0**-8 * truth.norm(dim=1)
    assert ((gradient - truth).norm(dim=1) <= allowed).all()
    if impl == "native":
        assert ((gradient - truth).norm(dim=1) <= 2.0**-6 * truth.norm(dim=1)).all()


def test_opcheck(impl):
    inputs = build("everything-frozen")
    student = inputs["student"].requires_grad_()
    options = [inputs[n] for n in ("alpha", "temperature", "offset", "softcap")]
    arguments = [student, *(inputs[n] for n in ("nat", "neg", "weight", "bias", "targets", "seq_ids"))]
    op = getattr(torch.ops.calm_fast, f"linear_nce_{impl}_step")
    torch.library.opcheck(op.default, (*arguments, *options, -100))
    loss, gradient = op(*arguments, *options, -100)
    assert loss.requires_grad and not gradient.requires_grad
    detached = (torch.ones_like(loss).detach(), gradient, student.detach())
    torch.library.opcheck(torch.ops.calm_fast.linear_nce_scale_gradient.default, detached)


def test_compiles_and_exports(impl):
    inputs = build("everything-frozen")

    class Step(torch.nn.Module):
        def forward(self, student):
            return linear_nce(**{**inputs, "student": student * 2}, impl=impl).square()

    student = inputs["student"].detach().requires_grad_()
    (expected,) = torch.autograd.grad(Step()(student), student)
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(student), student)[0], expected)
    exported = torch.export.export(Step(), (student,)).module()
    torch.testing.assert_close(exported(student), Step()(student))


def test_backward_twice_and_no_double_backward(impl):
    inputs = build()
    student = inputs["student"].requires_grad_()
    loss = linear_nce(**inputs, impl=impl)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(RuntimeError, match="have no double backward"):
        again.sum().backward()


def test_nan_in_one_sequence_stays_there(impl):
    inputs = build("chunks-frozen")
    expected = step(inputs, impl)[1]
    own = (inputs["seq_ids"] == 4) & (inputs["targets"] != -100)
    inputs["nat"] = inputs["nat"].masked_fill(own.unsqueeze(1), float("nan"))
    gradient = step(inputs, impl)[1]
    assert gradient[own].isnan().all() and torch.equal(gradient[~own], expected[~own])


def product_scratch(weight: torch.Tensor) -> int:
    """Return the scratch bytes of one product with `weight`: packed for AMX, or float32 copies of parts."""
    rows = torch.randn(128, weight.shape[0]).to(weight.dtype)
    kept = exact_product(rows, weight).nbytes
    return peak_bytes(lambda: exact_product(rows, weight), CPU) - kept


@pytest.mark.parametrize("tokens", [512, 2048])
def test_memory_is_a_tenth_of_full_logits(tokens, impl):
    """The sequences have a quarter of all tokens, the longest that keep their logits; eager has six (T, V) tensors."""
    d, v = 16, 24576
    gen = torch.Generator().manual_seed(0)
    student, nat, neg = (torch.randn(tokens, d, generator=gen).bfloat16() for _ in range(3))
    inputs = {"student": student, "nat": nat, "neg": neg, "weight": torch.randn(v, d, generator=gen).bfloat16()}
    inputs |= {"targets": torch.randint(0, v, (tokens,), generator=gen), "seq_ids": torch.arange(tokens) * 4 // tokens}
    full = 6 * tokens * v * 2
    small = full // 6 + (16 << 20) if tokens == 512 else full // 10
    # a math library keeps scratch memory from its first call on
    step(inputs, impl)
    assert peak_bytes(lambda: step(inputs, impl), CPU) < small + product_scratch(inputs["weight"])
