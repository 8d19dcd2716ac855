"""linear_nce's one-pass training step in Triton: both forms, in chunks of a few tokens."""

from __future__ import annotations

import math

import pytest
import torch

from calm_fast._ops.linear_nce import schedule
from calm_fast._ops.linear_nce.api import linear_nce
from calm_fast._ops.linear_nce.cases import CASES, Spec
from calm_fast._ops.linear_nce.triton_impl import linear_nce_triton_step
from calm_fast.core.numerics import Case, judge, truth_of

pytest.importorskip("triton", reason="the kernels need Triton; it has wheels for Linux only")
from calm_fast.kernels.linear_nce import launch as kernels
from calm_fast.kernels.linear_nce import step

FORMS = pytest.mark.parametrize("whole", [True, False], ids=["whole-sequences", "any-tokens"])
# every branch of the kernels; test_api.py runs all cases through the op, in one chunk
IN_FLOAT = (
    "single", "one-column", "all-ignored", "many-sequences", "past-edges", "long-rows", "temperature-low", "softcap",
    "bias", "everything", "hard-only", "soft-only", "negative-offset", "sharp", "far-teachers", "strided",
)  # fmt: skip
IN_HALF = ("plain", "everything", "sharp")
SMALL = [CASES.case(name, torch.float32, frozen=True) for name in IN_FLOAT]
SMALL += [CASES.case(name, dtype, frozen=True) for dtype in (torch.bfloat16, torch.float16) for name in IN_HALF]
TENSORS = ("student", "nat", "neg", "weight", "bias", "targets", "seq_ids")
NUMBERS = ("alpha", "temperature", "offset", "softcap")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, kernel_device):
    """Return the CPU (interpreter) or the GPU: one session either interprets or compiles kernels."""
    if request.param == "interpreter" and kernel_device.type != "cpu":
        pytest.skip("this session has a GPU: its kernels are compiled")
    return kernel_device


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new memory with NaN, so that anything a kernel leaves unwritten shows, padding of the rows included."""
    empty = torch.Tensor.new_empty

    def filled(self, *args, **kwargs):
        t = empty(self, *args, **kwargs)
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def build(name="plain", dtype=torch.float32, device="cpu", **changes):
    return CASES.build(CASES.case(name, dtype, frozen=True, **changes), torch.device(device))


def run(inputs, rows=None, whole=None, **changes):
    """Return loss and gradient; `rows`: tokens of a chunk, with `whole` at least the longest sequence."""
    given = {name: inputs[name] for name in (*TENSORS, *NUMBERS)} | changes
    if whole and rows is not None:
        rows = max(rows, longest(given))
    return linear_nce_triton_step(*given.values(), -100, rows=rows, whole=whole)


def longest(inputs):
    ids = inputs["seq_ids"][inputs["targets"] != -100]
    return int(ids.bincount().max()) if ids.numel() else 1


def wrong_rows(case, inputs, truth, whole, rows):
    loss, gradient = run(inputs, rows, whole)
    values = {"loss": loss, "dstudent": (gradient * inputs["dloss"]).to(case.dtype)}
    return [row for row in judge(case, "triton", inputs["student"].device, values, truth) if not row.ok]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small_chunks_within_the_error_rule(case: Case, device):
    inputs = CASES.build(case, device)
    truth = truth_of(CASES, inputs, case.dtype)
    for whole in (True, False):
        assert not wrong_rows(case, inputs, truth, whole, 6), f"whole={whole}"


@FORMS
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_sequences_cross_chunks_and_interleave(device, whole, rows):
    spec = Spec(41, 16, 53, sequences=7, frozen=True)
    case = Case(CASES.op, "crossing", torch.float32, spec)
    inputs = CASES.build(case, device)
    assert (inputs["seq_ids"].diff() != 0).sum() > 20
    assert not wrong_rows(case, inputs, truth_of(CASES, inputs, case.dtype), whole, rows)


def test_the_order_of_tokens_does_not_change_a_bit_of_whole_sequences(device):
    inputs = build("nothing-ignored", device=device)
    loss, gradient = run(inputs, 8, True)
    order = torch.sort(inputs["seq_ids"], stable=True).indices
    moved = {name: inputs[name][order] for name in ("student", "nat", "neg", "targets", "seq_ids")}
    moved_loss, moved_gradient = run({**inputs, **moved}, 8, True)
    assert torch.equal(moved_loss, loss) and torch.equal(moved_gradient, gradient[order])


@FORMS
def test_all_tokens_ignored_and_no_tokens(device, whole):
    inputs = build("all-ignored", device=device)
    loss, gradient = run(inputs, 4, whole)
    assert loss.item() == 0.0 and gradient.shape == (7, 16) and not gradient.any()
    nothing = {name: inputs[name][:0] for name in ("student", "nat", "neg", "targets", "seq_ids")}
    loss, gradient = run(inputs, 4, whole, **nothing)
    assert loss.item() == 0.0 and gradient.shape == (0, 16) and gradient.dtype == torch.float32


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_may_hold_anything(device, whole, dtype):
    inputs = build("everything", dtype, device, ignored=0.5)
    ignored = inputs["targets"] == -100
    assert 5 < int(ignored.sum()) < 16
    loss, gradient = run(inputs, 5, whole)
    assert not gradient[ignored].any()
    for bad in (math.nan, math.inf):
        nasty = {n: inputs[n].masked_fill(ignored.unsqueeze(1), bad) for n in ("student", "nat", "neg")}
        again, other = run(inputs, 5, whole, **nasty)
        assert torch.equal(again, loss) and torch.equal(other, gradient)


@FORMS
def test_an_infinite_weight_reaches_no_ignored_row(device, whole):
    """A row of zeros times infinity is NaN: rows of ignored tokens must not reach the gradient."""
    inputs = build(device=device)
    inputs["weight"][3] = math.inf
    _, gradient = run(inputs, 5, whole)
    ignored = inputs["targets"] == -100
    assert not gradient[ignored].any() and gradient[~ignored].isnan().any()


def test_ignored_tokens_are_rows_of_zeros_in_the_product(device, monkeypatch):
    inputs = build("everything", device=device, ignored=0.5)
    ignored = inputs["targets"] == -100
    inputs["nat"] = inputs["nat"].masked_fill(ignored.unsqueeze(1), math.nan)
    multiply, operands = step._multiply, []
    monkeypatch.setattr(step, "_multiply", lambda a, b, out: (operands.append(a.clone()), multiply(a, b, out)))
    run(inputs, 2 * 21, False)
    dz = operands[-1].view(2, 21, 83)
    assert len(operands) == 2 and dz.isfinite().all()
    assert not dz[:, ignored].any() and dz[:, ~ignored].any(2).all()


@FORMS
def test_a_bias_of_minus_infinity_rules_a_token_out(device, whole):
    """Banned tokens add 0, in runs as long as several vectors of a thread too."""
    inputs = build("bias", device=device, v=141)
    banned = torch.arange(141, device=device) % 4 == 1
    banned[32:128] = True
    kept = (~banned).nonzero().squeeze(1)
    short = {name: inputs[name][kept] for name in ("weight", "bias")}
    targets = inputs["targets"].remainder(len(kept)).where(inputs["targets"] != -100, -100)
    expected = run(inputs, 5, whole, **short, targets=targets)
    long = torch.where(targets == -100, -100, kept[targets.clamp(min=0)])
    actual = run(inputs, 5, whole, bias=inputs["bias"].masked_fill(banned, -math.inf), targets=long)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_bias_of_minus_infinity_with_a_trained_head(device, temperature):
    """One split of the sweep holds banned tokens only."""
    inputs = build("bias", device=device, v=141, temperature=temperature)
    banned = torch.arange(141, device=device) % 4 == 1
    banned[64:128] = True
    inputs["bias"] = inputs["bias"].masked_fill(banned, -math.inf)
    inputs["targets"] = torch.where(inputs["targets"] > 0, 0, inputs["targets"])
    inputs["frozen"] = False
    double = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    actual, expected = CASES.run(inputs, "triton"), CASES.run(double, "reference")
    assert not actual["dweight"][banned].any() and not actual["dbias"][banned].any()
    for name, found in actual.items():
        torch.testing.assert_close(found.double(), expected[name].double(), rtol=2e-5, atol=2e-6)


@FORMS
def test_expanded_and_transposed_inputs(device, whole):
    inputs = build("strided", device=device)
    inputs["nat"] = inputs["nat"][:1].expand(13, -1)
    inputs["bias"] = inputs["bias"][:1].expand(53)
    packed = {n: t.contiguous() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    assert not inputs["student"].is_contiguous() and not inputs["weight"].is_contiguous()
    for a, b in zip(run(inputs, 5, whole), run(packed, 5, whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@FORMS
def test_float16_gradients_do_not_vanish(device, whole, monkeypatch):
    """p - p_nat of about 1e-5 is near the smallest float16 number unless it is scaled."""
    inputs = build(dtype=torch.float16, device=device, t=9, v=700, teacher_gap=0.02, alpha=1.0)
    double = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    expected = CASES.run({**double, "dloss": torch.ones((), device=device)}, "reference")["dstudent"]

    def error():
        return (run(inputs, 4, whole)[1] - expected).abs().max() / expected.abs().max()

    assert error() < 0.05
    monkeypatch.setattr(step, "_SCALE", 2.0**-13)
    assert error() > 0.2


@FORMS
def test_large_coefficients_stay_within_float16(device, whole):
    inputs = build("everything", torch.float16, device, alpha=-200.0, offset=3000.0, temperature=30.0)
    loss, gradient = run(inputs, 8, whole)
    double = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    expected = CASES.run({**double, "dloss": torch.ones((), device=device)}, "reference")
    assert abs(loss - expected["loss"]) < 1e-3 * abs(expected["loss"])
    assert (gradient - expected["dstudent"]).abs().max() < 5e-3 * expected["dstudent"].abs().max()


def test_a_sequence_longer_than_a_chunk_takes_any_tokens(device):
    inputs = build("one-sequence", device=device)
    with pytest.raises(ValueError, match="`whole` must be None or False.*exceeds a chunk of 4 tokens"):
        linear_nce_triton_step(*(inputs[n] for n in (*TENSORS, *NUMBERS)), -100, rows=4, whole=True)
    for a, b in zip(run(inputs, 4), run(inputs, 4, False), strict=True):
        assert torch.equal(a, b)


@FORMS
def test_deterministic(device, whole):
    inputs = build("everything", torch.bfloat16, device)
    first = run(inputs, 6, whole)
    for _ in range(20 if device.type == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, 6, whole), first, strict=True))


@pytest.mark.parametrize(("whole", "products"), [(True, 4), (False, 5)])
def test_number_of_products(device, monkeypatch, whole, products):
    """Chunks of whole sequences have no ignored tokens."""
    inputs = build(device=device)
    tokens = int((inputs["targets"] != -100).sum()) if whole else 13
    multiply, taken = step._multiply, []

    def counted(a, b, out):
        taken.append(a.shape[0] * a.shape[1] * b.shape[1])
        multiply(a, b, out)

    monkeypatch.setattr(step, "_multiply", counted)
    run(inputs, 6, whole)
    assert sum(taken) == products * tokens * 16 * 53


def test_chunks_of_whole_sequences():
    gen = torch.Generator().manual_seed(5)
    for sequences, rows in ((1, 60), (5, 30), (20, 9), (60, 3)):
        ids = torch.randint(0, sequences, (60,), generator=gen)
        targets = torch.where(torch.rand(60, generator=gen) < 0.3, -100, 1)
        lengths = ids[targets == 1].bincount()
        plan = schedule.sort_and_cut_valid(targets, ids, -100, rows, rows)
        if int(lengths.max()) > rows:
            assert plan is None
            continue
        order, sorted_ids, chunks = plan
        count = int((targets == 1).sum())
        assert chunks[0].start == 0 and chunks[-1].stop == count
        assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]]
        assert sorted(order[:count].tolist()) == (targets == 1).nonzero().squeeze(1).tolist()
        seen = []
        for chunk in chunks:
            assert 0 < chunk.stop - chunk.start <= rows
            assert torch.equal(ids[order[chunk]], sorted_ids[chunk])
            seen += sorted_ids[chunk].unique().tolist()
        assert len(seen) == len(set(seen)) == int((lengths > 0).sum())


@pytest.mark.parametrize(
    ("v", "dtype", "rows", "most"),
    [
        (128256, torch.bfloat16, 1024, 1395),
        (256000, torch.bfloat16, 640, 699),
        (128256, torch.float32, 640, 697),
        (32000, torch.bfloat16, 1024, 5589),
        (400_000_000, torch.bfloat16, 1, 1),
    ],
)
def test_rows_of_a_chunk(v, dtype, rows, most):
    weight = torch.empty(1, dtype=dtype).expand(v, 1)
    assert schedule.triton_rows(weight) == (rows, most)
    assert most == 1 or 3 * most * v * dtype.itemsize <= 1 << 30


def test_a_chunk_grows_for_a_long_sequence():
    ids = torch.tensor([2] * 3 + [0] * 7 + [1] * 2)
    targets = torch.ones_like(ids)
    assert schedule.sort_and_cut_valid(targets, ids, -100, 4, 8)[2] == [slice(0, 7), slice(7, 12)]
    assert schedule.sort_and_cut_valid(targets, ids, -100, 4, 6) is None


def test_only_a_gradient_of_the_student_alone_takes_the_step(device, monkeypatch):
    inputs = build(device=device)
    calls, launch = [], kernels.launch_linear_nce_step

    def recorded(*args, **options):
        calls.append(args)
        return launch(*args, **options)

    monkeypatch.setattr(kernels, "launch_linear_nce_step", recorded)

    def loss(**changes):
        given = {n: inputs[n] for n in (*TENSORS, *NUMBERS)} | changes
        return linear_nce(**given, impl="triton")

    student, weight = (inputs[n].detach().clone().requires_grad_() for n in ("student", "weight"))
    loss()
    loss(student=student, weight=weight).backward()
    with torch.no_grad():
        loss(student=student)
    assert not calls
    loss(student=student).backward()
    assert len(calls) == 1


def test_opcheck(device):
    inputs = build("everything", device=device, t=5)
    inputs["student"].requires_grad_()
    arguments = tuple(inputs[n] for n in (*TENSORS, *NUMBERS))
    torch.library.opcheck(torch.ops.calm_fast.linear_nce_triton_step.default, (*arguments, -100))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(kernel_device):
    if kernel_device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return kernel_device


@pytest.mark.gpu
@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("v", [32000, 32003])
def test_full_chunks_on_a_gpu_within_the_error_rule(gpu, whole, dtype, v):
    """Blocks of many threads, several chunks, rows of logits with and without padding."""
    case = Case(CASES.op, "gpu", dtype, Spec(700, 256, v, sequences=9, frozen=True))
    inputs = CASES.build(case, gpu)
    assert not wrong_rows(case, inputs, truth_of(CASES, inputs, dtype), whole, 256)


@pytest.mark.gpu
def test_a_captured_graph_takes_any_tokens(gpu):
    inputs = build("everything", torch.bfloat16, gpu)
    # compiles the kernels
    expected = run(inputs, 8, False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(inputs, 8, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, 8)
    for t in captured:
        t.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
@FORMS
def test_memory_on_a_gpu_is_a_chunk_and_the_gradient(gpu, whole):
    tokens, d, v = 4096, 512, 65536
    gen = torch.Generator(gpu).manual_seed(0)
    student, nat, neg = (torch.randn(tokens, d, generator=gen, device=gpu).bfloat16() for _ in range(3))
    weight = torch.randn(v, d, generator=gen, device=gpu).bfloat16()
    targets, ids = torch.randint(0, v, (tokens,), device=gpu), torch.arange(tokens, device=gpu) // 64
    arguments = (student, nat, neg, weight, None, targets, ids, 0.5, 1.0, 0.5, None, -100)
    linear_nce_triton_step(*arguments, whole=whole)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_nce_triton_step(*arguments, whole=whole)
    chunk = 3 * (1024 if whole else 512) * v * 2
    assert torch.cuda.max_memory_allocated() - before < chunk + 4 * tokens * d * 4 + (32 << 20)
