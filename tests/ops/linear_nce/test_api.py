"""linear_nce: every implementation against the float64 definition and the paper's loss; torch's own checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from calm_fast._ops.linear_nce.api import decide, linear_nce
from calm_fast._ops.linear_nce.cases import CASES
from calm_fast._ops.vocabulary import schedule, torch_impl
from calm_fast.benchmarks.timing import peak_bytes
from calm_fast.core import native_library
from calm_fast.core.dispatch import triton_obstacle
from calm_fast.core.numerics import Case, check

NAMES = ("student", "nat", "neg", "weight", "targets", "seq_ids")
OPTIONS = ("alpha", "temperature", "offset", "bias", "softcap")


def build(name="plain", dtype=torch.float32, device="cpu", **changes):
    return CASES.build(CASES.case(name, dtype, **changes), torch.device(device))


def call(inputs, impl="auto", **changes):
    """Call linear_nce with a case's inputs; `changes` replace arguments by name."""
    return linear_nce(**{name: inputs[name] for name in (*NAMES, *OPTIONS)} | {"impl": impl} | changes)


def gradients(inputs, impl, names=("student", "weight"), **changes):
    given = {name: inputs[name].detach().requires_grad_() for name in names}
    return torch.autograd.grad(call({**inputs, **given}, impl, **changes), list(given.values()))


@pytest.fixture(params=["torch", "native", "triton-interpreter", pytest.param("triton-cuda", marks=pytest.mark.gpu)])
def impl(request, kernel_device):
    name, _, where = request.param.partition("-")
    if where == "interpreter" and kernel_device.type != "cpu":
        pytest.skip("this session has a GPU: its kernels are compiled")
    if where and (why := triton_obstacle(kernel_device)):
        pytest.skip(f"Triton cannot run: {why}")
    if name == "native" and (why := native_library.obstacle(CASES.op)):
        pytest.skip(why)
    return name


@pytest.fixture
def device(impl, kernel_device):
    return kernel_device if impl == "triton" else torch.device("cpu")


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_loss_and_gradients_within_the_error_rule(case: Case, impl, device):
    wrong = [row for row in check(CASES, case, impl, device) if not row.ok]
    assert not wrong


def loss_token_by_token(student_logits, nat_logits, neg_logits, labels):
    """Return the NCE loss of a padded batch (B, L, V) with labels (B, L); -100 marks prompt and padding."""
    losses = []
    total = int((labels[:, 1:] != -100).sum())
    for b in range(labels.shape[0]):
        keep = [i for i in range(labels.shape[1] - 1) if labels[b, i + 1] != -100]
        if not keep:
            continue
        distances = [
            F.kl_div(F.log_softmax(nat_logits[b, i], 0), F.softmax(neg_logits[b, i], 0), reduction="sum") for i in keep
        ]
        beta = torch.tanh(sum(distances) / len(keep))
        for i in keep:
            log_p = F.log_softmax(student_logits[b, i], 0)
            soft = -torch.dot(F.softmax(nat_logits[b, i], 0), log_p)
            losses.append(0.5 * -log_p[labels[b, i + 1]] + 0.5 * (0.5 + beta) * soft)
    return sum(losses) / total


@pytest.mark.parametrize("impl_name", ["reference", "torch"])
def test_defaults_are_the_loss_token_by_token(impl_name):
    gen = torch.Generator().manual_seed(11)
    batch, length, d, v = 3, 7, 12, 19
    student, nat, neg = (torch.randn(batch, length, d, generator=gen, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(v, d, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, v, (batch, length), generator=gen)
    labels[0, :3], labels[1, 5:], labels[2, :1] = -100, -100, -100
    student, weight = student.requires_grad_(), weight.requires_grad_()
    expected = loss_token_by_token(student @ weight.T, (nat @ weight.T).detach(), (neg @ weight.T).detach(), labels)

    flat = [t[:, :-1].reshape(-1, d) for t in (student, nat, neg)]
    seq_ids = torch.arange(batch).repeat_interleave(length - 1)
    actual = linear_nce(*flat, weight, labels[:, 1:].reshape(-1), seq_ids, impl=impl_name)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(x, (student, weight)) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["plain", "everything", "temperature"])
@pytest.mark.parametrize("impl_name", ["reference", "torch"])
def test_gradcheck(name, impl_name):
    """weight and bias are checked at alpha = 0, because finite differences would move the teachers' logits too."""
    inputs = build(name, torch.float64, t=5, v=11, d=4)
    for names, changes in ((("student",), {}), (("student", "weight", "bias"), {"alpha": 0.0})):
        names = [n for n in names if inputs[n] is not None]

        def loss(*tensors, names=names, changes=changes):
            return call({**inputs, **dict(zip(names, tensors, strict=True))}, impl_name, **changes)

        assert torch.autograd.gradcheck(loss, [inputs[n].detach().requires_grad_() for n in names])


def test_every_combination_of_wanted_gradients(impl, device):
    inputs = build("everything", device=device)
    full = dict(zip(("student", "weight", "bias"), gradients(inputs, impl, ("student", "weight", "bias")), strict=True))
    for names in (("student",), ("weight",), ("bias",), ("student", "bias"), ("weight", "bias")):
        for name, grad in zip(names, gradients(inputs, impl, names), strict=True):
            torch.testing.assert_close(grad, full[name], rtol=2e-5, atol=2e-6)


def test_teachers_are_constants(impl, device):
    inputs = build(device=device)
    for name in ("nat", "neg"):
        inputs[name].requires_grad_()
    student = inputs["student"].requires_grad_()
    grads = torch.autograd.grad(call(inputs, impl), (student, inputs["nat"], inputs["neg"]), allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None and grads[2] is None


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_torch_result_does_not_depend_on_block_sizes(monkeypatch, chunk, by_columns):
    inputs = build("everything", torch.float64)
    names = ("student", "weight", "bias") if by_columns else ("student",)
    expected = call(inputs, "reference"), gradients(inputs, "reference", names)
    monkeypatch.setattr(schedule, "_CHUNK", chunk)
    monkeypatch.setattr(torch_impl, "_COLUMNS", 5)
    monkeypatch.setattr(torch_impl, "_TILE", 15)
    torch.testing.assert_close(call(inputs, "torch"), expected[0])
    torch.testing.assert_close(gradients(inputs, "torch", names), expected[1])


def test_no_tokens(impl, device):
    inputs = build(device=device)
    for name in ("student", "nat", "neg", "targets", "seq_ids"):
        inputs[name] = inputs[name][:0]
    assert call(inputs, impl).item() == 0.0
    dstudent, dweight = gradients(inputs, impl)
    assert dstudent.shape == (0, 16) and not dweight.any()


def test_ignored_rows_may_hold_anything(impl, device):
    inputs = build(device=device)
    ignored = inputs["targets"] == -100
    assert ignored.any()
    expected = call(inputs, impl), gradients(inputs, impl, ("student",))
    for name in ("student", "nat", "neg"):
        inputs[name] = inputs[name].masked_fill(ignored.unsqueeze(-1), float("nan"))
    assert torch.equal(call(inputs, impl), expected[0])
    assert torch.equal(gradients(inputs, impl, ("student",))[0], expected[1][0])


def test_ignore_index_is_the_callers(impl, device):
    inputs = build(device=device)
    expected = call(inputs, impl)
    targets = torch.where(inputs["targets"] == -100, 3, inputs["targets"])
    kept = targets != 3
    targets = torch.where((inputs["targets"] != -100) & ~kept, 4, targets)
    reference = torch.where(targets == 3, -100, targets)
    assert torch.equal(call(inputs, impl, targets=targets, ignore_index=3), call(inputs, impl, targets=reference))
    assert not torch.equal(expected, call(inputs, impl, targets=targets.clone().fill_(3), ignore_index=3))


def test_sequences_interleave_and_ids_need_not_be_dense(impl, device):
    inputs = build("nothing-ignored", device=device)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(1)).to(device)
    sparse = torch.tensor([17, 4, 9], device=device)[inputs["seq_ids"]]
    moved = {name: inputs[name][order] for name in ("student", "nat", "neg", "targets")}
    expected = call(inputs, impl)
    torch.testing.assert_close(call({**inputs, **moved}, impl, seq_ids=sparse[order]), expected, rtol=1e-6, atol=0)
    merged = call(inputs, impl, seq_ids=torch.zeros_like(sparse))
    assert abs(merged - expected) > 1e-6


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_extreme_logits_stay_finite_and_right(impl, device, size):
    inputs = build("plain", device=device, magnitude=size, ignored=0.0)
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    loss, expected = call(inputs, impl), call(double, "reference")
    assert abs(loss.item() - expected.item()) <= 1e-5 * abs(expected.item())
    assert all(g.isfinite().all() for g in gradients(inputs, impl))


def test_minus_infinity_bias_bans_a_token():
    """A banned token has probability 0, and nothing becomes NaN."""
    inputs = build("bias", torch.float64, softcap=None)
    banned = 7
    inputs["targets"] = torch.where(inputs["targets"] == banned, 8, inputs["targets"])
    inputs["bias"] = inputs["bias"].clone()
    inputs["bias"][banned] = -1e4
    expected = call(inputs, "reference")
    torch.testing.assert_close(call(inputs, "torch"), expected)


def test_upstream_gradient_scales_everything(impl, device):
    inputs = build("everything", device=device)
    student = inputs["student"].requires_grad_()
    (once,) = torch.autograd.grad(call(inputs, impl), student)
    # a power of two, so the scaling is exact
    (more,) = torch.autograd.grad(-2.0 * call(inputs, impl), student)
    assert torch.equal(more, -2.0 * once)


def test_deterministic(impl, device):
    inputs = build("everything", torch.bfloat16, device)
    first = call(inputs, impl), *gradients(inputs, impl)
    for _ in range(20 if impl == "torch" else 2):
        for a, b in zip(first, (call(inputs, impl), *gradients(inputs, impl)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["plain", "everything", "frozen"])
def test_opcheck(name, impl, device):
    inputs = build(name, device=device)
    grad = {"student": True, "weight": name != "frozen", "bias": name == "everything"}
    tensors = {n: inputs[n].detach().requires_grad_() if grad.get(n) else inputs[n] for n in (*NAMES, "bias")}
    options = [inputs[n] for n in ("alpha", "temperature", "offset", "softcap")]
    arguments = [tensors[n] for n in ("student", "nat", "neg", "weight", "bias", "targets", "seq_ids")]
    arguments += [*options, -100]
    forward, backward = (getattr(torch.ops.calm_fast, f"linear_nce_{impl}_{part}") for part in ("fwd", "bwd"))
    torch.library.opcheck(forward.default, tuple(arguments))
    loss, norms, coefficients = forward(*arguments)
    detached = [None if tensors[n] is None else tensors[n].detach() for n in ("student", "nat", "weight", "bias")]
    torch.library.opcheck(
        backward.default,
        (torch.ones_like(loss).detach(), *detached, tensors["targets"], norms.detach(), coefficients.detach(),
         options[1], options[3], -100, [True, grad["weight"], grad["bias"]]),
    )  # fmt: skip


def test_compiles_as_one_graph(impl, device):
    inputs = build("everything", device=device)

    def step(student, weight):
        return call({**inputs, "student": student * 2, "weight": weight}, impl).square()

    plain = [inputs[n].detach().clone().requires_grad_() for n in ("student", "weight")]
    traced = [t.detach().clone().requires_grad_() for t in plain]
    expected = step(*plain)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual, expected)
    for a, b in zip(traced, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_double_backward_is_refused_not_wrong(impl, device):
    inputs = build(device=device)
    student = inputs["student"].requires_grad_()
    (grad,) = torch.autograd.grad(call(inputs, impl), student, create_graph=True)
    with pytest.raises(RuntimeError, match="have no double backward"):
        grad.sum().backward()


def test_reference_differentiates_twice():
    inputs = build(dtype=torch.float64, t=3, v=7, d=4)
    student = inputs["student"].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: call({**inputs, "student": s}, "reference"), (student,))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("impl", ["torch", "native"], indirect=True)
def test_memory_stays_far_below_the_logits(frozen, impl):
    tokens, d, v = 256, 16, 32768
    gen = torch.Generator().manual_seed(0)
    student, nat, neg = (torch.randn(tokens, d, generator=gen).bfloat16() for _ in range(3))
    weight = torch.randn(v, d, generator=gen).bfloat16().requires_grad_(not frozen)
    student.requires_grad_()
    targets, seq_ids = torch.randint(0, v, (tokens,), generator=gen), torch.arange(tokens) // 32

    def step():
        linear_nce(student, nat, neg, weight, targets, seq_ids, impl=impl).backward()
        student.grad = weight.grad = None

    step()
    logits = tokens * v * 4
    # one chunk of logit gradients (16 MiB, all 256 x 32768 in bfloat16), a few tiles, and no logits in float32
    assert peak_bytes(step, torch.device("cpu")) < logits * 3 // 4


def test_auto_on_a_cpu(monkeypatch):
    """auto picks native where it is available and not slow on this CPU, else torch; never native for float64."""
    inputs = build()
    arguments = {name: inputs[name] for name in NAMES}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None)
    monkeypatch.setattr(native_library, "obstacle", lambda op, device: None)
    assert decide(**arguments).impl == "native"
    assert decide(**wide).impl == "torch"
    large = torch.zeros(1 << 18, arguments["student"].shape[1])
    few = {k: v if k == "weight" else v[:3] for k, v in arguments.items()}
    few |= {"seq_ids": few["seq_ids"] * 0} if "seq_ids" in few else {}
    more = {k: v if k == "weight" else torch.cat((v, v)) for k, v in arguments.items()}
    assert decide(**few).impl == decide(**{**more, "weight": large}).impl == "native"
    assert decide(**{**few, "weight": large}).impl == "torch"
    learning = {**few, "weight": large, "student": few["student"].clone().requires_grad_()}
    assert decide(**learning).impl == "torch"
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match="float64"):
            linear_nce(**wide, impl=impl)
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "matrix units")
    assert decide(**arguments).impl == "torch" and "matrix units" in decide(**arguments).reason
    assert decide(**arguments, impl="native").impl == "native"
    monkeypatch.setattr(native_library, "obstacle", lambda op, device: "the compiled library does not load")
    assert decide(**arguments).impl == "torch"
    with pytest.raises(RuntimeError, match="native.*compiled library"):
        linear_nce(**arguments, impl="native")
