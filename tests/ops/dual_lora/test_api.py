"""dual_lora: every implementation against the float64 reference, the released layer's equations, bad input."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from calm_fast._ops.dual_lora.api import decide, dual_lora
from calm_fast._ops.dual_lora.cases import CASES, Spec
from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast._ops.dual_lora.torch_impl import dual_lora_torch, fold_dual_lora, gate_weights, negative_share, project
from calm_fast.core import native_library
from calm_fast.core.dispatch import triton_obstacle
from calm_fast.core.numerics import Case, judge, truth_of

NAMES = ("x", "y", "a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k")
FORMS = ("plain", "full-value", "plain gelu")


def call(inputs, impl="auto", **changes):
    """Call dual_lora on a case's inputs; `changes` replace arguments by name."""
    value = tuple(inputs[f"value{i}"] for i in (0, 1) if f"value{i}" in inputs)
    arguments = {name: inputs[name] for name in (*NAMES, "scaling", "activation")} | {"value": value, "impl": impl}
    return dual_lora(**arguments | changes)


def build(name="plain", dtype=torch.float32, device="cpu", **changes):
    return CASES.build(CASES.case(name, dtype, **changes), torch.device(device))


@functools.cache
def truth(case, device):
    """Return values and bounds of a case; they are the same for every implementation."""
    return truth_of(CASES, CASES.build(case, device), case.dtype)


def leaves(inputs):
    return [t.requires_grad_() for t in inputs.values() if isinstance(t, torch.Tensor) and t is not inputs["dout"]]


GPU = pytest.mark.gpu


def interpreter_or_gpu(which, kernel_device):
    """Skip unless this session can run Triton in the asked-for way: it compiles kernels or interprets them."""
    if which == "interpreter" and kernel_device.type != "cpu":
        pytest.skip("this session has a GPU: its kernels are compiled")
    if why := triton_obstacle(kernel_device):
        pytest.skip(f"Triton cannot run: {why}")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=GPU)])
def triton_device(request, kernel_device):
    interpreter_or_gpu(request.param, kernel_device)
    return kernel_device


@pytest.fixture(params=["torch", "native", "triton-interpreter", pytest.param("triton-cuda", marks=GPU)])
def impl(request, kernel_device):
    name, _, where = request.param.partition("-")
    if name == "native" and (why := native_library.obstacle("dual_lora", kernel_device.type)):
        pytest.skip(why)
    if where:
        interpreter_or_gpu(where, kernel_device)
    return name


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_output_and_gradients_within_the_error_rule(case: Case, impl, kernel_device):
    device = kernel_device if impl == "triton" else torch.device("cpu")
    inputs = CASES.build(case, device)
    rows = judge(case, impl, device, CASES.run(inputs, impl), truth(case, device))
    assert not [row for row in rows if not row.ok]


LOGITS = (1e-4, 1e-3, 1e-2, 0.1, 0.4, 0.6, 1.0, 3.0, 10.0, 30.0)


def test_weights_are_right_to_a_few_units_in_the_last_place():
    logit = torch.cat([size * torch.linspace(-1.3, 1.3, 201) for size in LOGITS]).requires_grad_()
    wide = logit.detach().double()
    weight_pos, weight_neg = gate_weights(logit)
    truth = torch.expm1(wide) / (torch.exp(wide) + 1) / 2
    eps = torch.finfo(torch.float32).eps
    # above 1 the subtraction turns sigmoid's error, up to an ulp, into one of up to 1 / tanh(1/2) ulps of the weight
    assert ((weight_neg - truth).abs() <= 3 * eps * truth.abs()).all()
    assert ((weight_pos - (1 - truth)).abs() <= 2 * eps).all()
    (slope,) = torch.autograd.grad(weight_neg.sum(), logit)
    want = wide.sigmoid() * (-wide).sigmoid()
    assert ((slope - want).abs() <= 4 * eps * wide.sigmoid()).all()


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_negative_part_keeps_the_bits_of_a_small_logit(activation, impl, kernel_device):
    """With y = 0 and B_pos = 0 the output is the negative part alone, so its relative error is that of its factors."""
    device = kernel_device if impl == "triton" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    # all positive, so that nothing cancels; every size is 1, so that each factor is rounded once
    a_pos, a_neg, b_neg, w_q, w_k, c1, c2 = torch.rand(7, 1, 1, generator=generator) + 0.5
    x = torch.rand(64, 1, generator=generator) + 0.5
    for size in LOGITS:
        inputs = (x, torch.zeros(64, 1), a_pos, torch.zeros(1, 1), a_neg, b_neg, size * w_q, w_k, c1, c2)
        truth = dual_lora_reference(
            *(t.double() for t in inputs[:8]), [c1.double(), c2.double()], (1.0, 1.0), activation
        )
        own = [t.to(device) for t in inputs]
        with torch.no_grad():
            got = dual_lora(*own[:8], (own[8], own[9]), scaling=1.0, activation=activation, impl=impl).cpu()
        # a_neg z up: at most 16 roundings of the factors, 4 units of the tanh, and 12 more of the gelu
        bound = (20 if activation == "none" else 32) * 2.0**-24
        assert ((got - truth).abs() <= bound * truth.abs()).all(), size


def test_gelu_form_is_the_released_layer():
    """The released layer, written as attention of one query over two keys whose values pass a bottleneck."""
    tokens, d, rank, gate, bottleneck, alpha = 9, 20, 4, 6, 5, 12.0
    gen = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64) / 3

    x, weight, bias = draw(tokens, d), draw(d, d), draw(d)
    lora_a, lora_b = draw(2, rank, d), draw(2, d, rank)
    to_q, to_k, down, up = draw(gate, d), draw(gate, d), draw(bottleneck, d), draw(d, bottleneck)

    result = x @ weight.T + bias
    hidden = result[:, None] + torch.einsum("lor,lri,ti->tlo", lora_b, lora_a, x) * (alpha / rank)  # (T, 2, d)
    scores = torch.einsum("tg,tlg->tl", x @ to_q.T, hidden @ to_k.T)
    attention = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True) + torch.tensor([0.5, -0.5])
    inner = hidden @ down.T
    values = (inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))) @ up.T
    expected = result + (attention[:, :, None] * values).sum(1)

    for impl in ("reference", "torch"):
        out = dual_lora(
            *(x, result, lora_a[0], lora_b[0], lora_a[1], lora_b[1], to_q, to_k, (down, up)),
            scaling=alpha / rank,
            activation="gelu",
            impl=impl,
        )
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_folding_is_exact_algebra(name):
    inputs = build(name, torch.float64, scaling=(1.7, -0.6))
    torch.testing.assert_close(call(inputs, "torch"), call(inputs, "reference"), rtol=1e-11, atol=1e-11)


def test_gate_shares_sum_to_the_softmax():
    """p_neg from the folded logits is the softmax of the unfolded ones."""
    inputs = build("plain", torch.float64)
    x, _, a_pos, b_pos, a_neg, b_neg, w_q, w_k = (inputs[name] for name in NAMES)
    folded = fold_dual_lora(a_pos, b_pos, a_neg, b_neg, w_q, w_k, (torch.eye(40).double(),), (2.0, 2.0), "none")
    logits = [((x @ w_q.T) * (2.0 * x @ a.T @ b.T @ w_k.T)).sum(-1) for a, b in ((a_pos, b_pos), (a_neg, b_neg))]
    expected = torch.stack(logits, -1).softmax(-1)[:, 1:]
    torch.testing.assert_close(negative_share(project(x, folded)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
def test_lora_reads_its_own_input_where_given(name):
    """With dropout the LoRAs read another tensor than the gate's query; the result follows the equations."""
    inputs = build(name, torch.float64)
    x, y, a_pos, b_pos, a_neg, b_neg, w_q, w_k = (inputs[name] for name in NAMES)
    value = tuple(inputs[f"value{i}"] for i in (0, 1) if f"value{i}" in inputs)
    dropped = F.dropout(x, 0.4)
    folded = fold_dual_lora(a_pos, b_pos, a_neg, b_neg, w_q, w_k, value, (2.0, 2.0), inputs["activation"])
    out = dual_lora_torch(project(x, folded, dropped), y, folded, a_pos.shape[0])
    # the reference reads one x: give it both side by side, each factor with zeros for the other half
    both = torch.cat((dropped, x), -1)
    a_pos, a_neg = (torch.cat((a, torch.zeros_like(a)), -1) for a in (a_pos, a_neg))
    w_q = torch.cat((torch.zeros_like(w_q), w_q), -1)
    expected = dual_lora_reference(
        both, y, a_pos, b_pos, a_neg, b_neg, w_q, w_k, value, (2.0, 2.0), inputs["activation"]
    )
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("which", ["reference", "torch"])
def test_gradients_are_derivatives(name, which):
    inputs = build(name, torch.float64, lead=(3,), d_in=4, d_out=5, r_pos=2, r_neg=1, g=2)
    if "value1" in inputs:
        inputs |= {"value0": inputs["value0"][:2].clone(), "value1": inputs["value1"][:, :2].clone()}
    tensors = leaves(inputs)

    def function(*_):
        return call(inputs, which)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_frozen_factors_get_no_gradient(impl, kernel_device):
    """A tensor's gradient does not depend on which others require one."""
    for name in FORMS:
        inputs = build(name, device=kernel_device, lead=(5,), d_out=20)
        everything = leaves(inputs)
        grads = torch.autograd.grad(call(inputs, impl), everything, inputs["dout"])
        for i, tensor in enumerate(everything):
            if tensor is inputs["a_neg"] or tensor is inputs["b_neg"] or tensor is inputs["w_q"]:
                continue  # the same path as a_pos, b_pos and w_k
            for t in everything:
                t.requires_grad_(t is tensor)
            (grad,) = torch.autograd.grad(call(inputs, impl), tensor, inputs["dout"])
            assert torch.equal(grad, grads[i])


@pytest.mark.parametrize("name", FORMS)
def test_nan_row_stays_in_its_row(name, impl, kernel_device):
    inputs = build(name, device=kernel_device, lead=(37,))
    clean = call(inputs, impl)
    for poisoned in ("x", "y"):
        dirty = inputs[poisoned].clone()
        dirty[5] = float("nan")
        out = call(inputs, impl, **{poisoned: dirty})
        assert out[5].isnan().all()
        keep = torch.arange(37) != 5
        assert torch.equal(out[keep], clean[keep])


@pytest.mark.parametrize("name", FORMS)
def test_twenty_runs_give_the_same_bits(name, impl, kernel_device):
    inputs = build(name, device=kernel_device)
    tensors = leaves(inputs)
    # the interpreter runs programs in order, so runs can only differ by reading memory that was never written
    repeats = 3 if impl == "triton" and kernel_device.type == "cpu" else 19

    def once():
        out = call(inputs, impl)
        return out, *torch.autograd.grad(out, tensors, inputs["dout"])

    first = once()
    assert all(torch.equal(a, b) for _ in range(repeats) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("name", FORMS)
def test_compile_without_graph_breaks(name, impl, kernel_device):
    inputs = build(name, device=kernel_device)
    tensors = leaves(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda: call(inputs, impl), fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(), tensors, inputs["dout"])
    expected = torch.autograd.grad(call(inputs, impl), tensors, inputs["dout"])
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("strided", [False, True])
def test_registered_ops_pass_opcheck(strided, triton_device):
    """Schemas, fakes, autograd registration and compiled gradients of the four torch ops."""

    def draw(*shape):
        t = torch.randn(shape[::-1] if strided else shape, device=triton_device)
        return t.mT if strided else t

    t, n, h, r_pos, r = 5, 18, 6, 3, 4
    zg, y, c1, c2, up = draw(t, 2 * r), draw(t, n), draw(h, n), draw(n, h), draw(h, r)
    ops = torch.ops.calm_fast
    without_autograd = ("test_schema", "test_faketensor")
    for op, args in (
        (ops.dual_lora_triton_fwd, (zg, y, draw(n, r), r_pos)),
        (ops.dual_lora_triton_gelu_fwd, (zg, y, c1, up, c2, r_pos)),
    ):
        torch.library.opcheck(op, args)
        args = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
        if op is ops.dual_lora_triton_fwd:  # u and mix of the other op have no gradients
            torch.library.opcheck(op, args)
    torch.library.opcheck(ops.dual_lora_triton_bwd, (draw(t, r), zg, r_pos), test_utils=without_autograd)
    torch.library.opcheck(
        ops.dual_lora_triton_gelu_bwd, (draw(t, h), zg, draw(t, h), up, r_pos), test_utils=without_autograd
    )


def test_triton_refuses_double_backward(triton_device):
    for name in FORMS:
        inputs = build(name, device=triton_device)
        tensors = leaves(inputs)
        grads = torch.autograd.grad(call(inputs, "triton"), tensors, inputs["dout"], create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            torch.autograd.grad(sum(g.sum() for g in grads), tensors, allow_unused=True)


def test_triton_rows_do_not_depend_on_other_rows(triton_device):
    for name in FORMS:
        inputs = build(name, device=triton_device, lead=(49,))
        whole = call(inputs, "triton")
        part = call(inputs, "triton", x=inputs["x"][16:33], y=inputs["y"][16:33])
        torch.testing.assert_close(part, whole[16:33], rtol=1e-5, atol=1e-5)


def test_autocast_is_ignored(impl, kernel_device):
    inputs = build("plain gelu", device=kernel_device)
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        out = call(inputs, impl)
    assert out.dtype == torch.float32 and torch.equal(out, call(inputs, impl))


def test_auto_on_cpu_is_torch_where_autograd_records_or_the_library_is_missing(monkeypatch):
    inputs = build()
    arguments = {name: inputs[name] for name in NAMES} | {"value": (inputs["value0"], inputs["value1"])}
    inputs["w_k"].requires_grad_()
    decision = decide(**arguments, scaling=1.0)
    assert decision.impl == "torch" and "CPU" in decision.reason and "autograd" in decision.reason
    assert torch.equal(call(inputs), call(inputs, "torch"))
    monkeypatch.setattr(native_library, "obstacle", lambda *_: "the compiled library is away")
    with torch.no_grad():
        decision = decide(**arguments, scaling=1.0)
    assert decision.impl == "torch" and "the compiled library is away" in decision.reason
    with pytest.raises(RuntimeError, match="dual_lora: impl='native' cannot run here: the compiled library is away"):
        call(inputs, "native")


def test_explicit_impl_is_refused_with_the_reason(monkeypatch):
    inputs = build()
    with pytest.raises(RuntimeError, match="impl='native' cannot run here: the compiled code computes in float32"):
        call(build(dtype=torch.float64), "native")
    with pytest.raises(RuntimeError, match="impl='triton' cannot run here: the kernels compute in float32"):
        call(build(dtype=torch.float64), "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CPU tensors need TRITON_INTERPRET=1"):
        call(inputs, "triton")


def _half(name):
    return lambda i: {name: i[name].half()}


BAD = {
    "x is a list": (TypeError, "`x` must be a tensor", lambda i: {"x": [1.0]}),
    "x is a scalar": (ValueError, "`x` must be .*width at least 1", lambda i: {"x": torch.tensor(1.0)}),
    "x is int": (TypeError, "`x` must have dtype", lambda i: {"x": i["x"].int()}),
    "x has width 0": (ValueError, "`x` must be .*width at least 1", lambda i: {"x": i["x"][:, :0]}),
    "x is sparse": (ValueError, "`x` must be a dense", lambda i: {"x": i["x"].to_sparse()}),
    "x too narrow": (
        ValueError,
        r"`a_pos` must be of shape \(R_pos, d_in\) = \(5, 23\)",
        lambda i: {"x": i["x"][:, :23]},
    ),
    "y is None": (TypeError, "`y` must be a tensor", lambda i: {"y": None}),
    "y has other tokens": (ValueError, "`y` must be of x's leading", lambda i: {"y": i["y"][:5]}),
    "y has another rank": (ValueError, "`y` must be of x's leading", lambda i: {"y": i["y"][None]}),
    "y has another dtype": (TypeError, "`y` must have x's dtype", _half("y")),
    "y on another device": (ValueError, "`y` must be on cpu", lambda i: {"y": i["y"].to("meta")}),
    "y too narrow": (ValueError, "`b_pos` must be of shape", lambda i: {"y": i["y"][:, :7]}),
    "a_pos is 1-d": (ValueError, "`a_pos` must be 2-dimensional", lambda i: {"a_pos": i["a_pos"][0]}),
    "a_pos has another dtype": (TypeError, "`a_pos` must have x's dtype", _half("a_pos")),
    "rank 0": (
        ValueError,
        "`a_pos` must be .*at least 1",
        lambda i: {"a_pos": i["a_pos"][:0], "b_pos": i["b_pos"][:, :0]},
    ),
    "ranks differ": (ValueError, "`b_pos` must be of shape", lambda i: {"b_pos": i["b_pos"][:, :4]}),
    "negative ranks differ": (ValueError, "`b_neg` must be of shape", lambda i: {"a_neg": i["a_neg"][:2]}),
    "a_neg too wide": (ValueError, "`a_neg` must be of shape", lambda i: {"a_neg": i["w_k"]}),
    "b_neg transposed": (ValueError, "`b_neg` must be of shape", lambda i: {"b_neg": i["b_neg"].mT}),
    "b_neg is None": (TypeError, "`b_neg` must be a tensor", lambda i: {"b_neg": None}),
    "w_q transposed": (ValueError, "`w_q` must be of shape", lambda i: {"w_q": i["w_q"].mT}),
    "gate dims differ": (ValueError, "`w_k` must be of shape", lambda i: {"w_k": i["w_k"][:3]}),
    "gate dim 0": (ValueError, "`w_q` must be .*at least 1", lambda i: {"w_q": i["w_q"][:0], "w_k": i["w_k"][:0]}),
    "w_k on another device": (ValueError, "`w_k` must be on cpu", lambda i: {"w_k": i["w_k"].to("meta")}),
    "value is a tensor": (TypeError, "`value` must be a tuple", lambda i: {"value": i["value0"]}),
    "value is empty": (ValueError, "`value` must be a tuple", lambda i: {"value": ()}),
    "three factors": (ValueError, "`value` must be a tuple", lambda i: {"value": (i["value0"],) * 3}),
    "w_v not square": (
        ValueError,
        r"`value\[0\]` must be of shape \(d_out, d_out\)",
        lambda i: {"value": (i["value0"],)},
    ),
    "factors differ": (
        ValueError,
        r"`value\[1\]` must be of shape",
        lambda i: {"value": (i["value0"][:4], i["value1"])},
    ),
    "a factor is None": (TypeError, r"`value\[1\]` must be a tensor", lambda i: {"value": (i["value0"], None)}),
    "a factor is half": (TypeError, r"`value\[0\]` must have", lambda i: {"value": (i["value0"].half(), i["value1"])}),
    "gelu with w_v": (
        ValueError,
        "`value` must be two factors",
        lambda i: {"value": (torch.eye(40),), "activation": "gelu"},
    ),
    "activation unknown": (
        ValueError,
        "`activation` must be 'none' or 'gelu', got 'relu'",
        lambda i: {"activation": "relu"},
    ),
    "activation None": (ValueError, "`activation` must be", lambda i: {"activation": None}),
    "scaling nan": (ValueError, "`scaling` must be finite", lambda i: {"scaling": float("nan")}),
    "scaling inf in the pair": (ValueError, r"`scaling\[1\]` must be finite", lambda i: {"scaling": (1.0, math.inf)}),
    "scaling of three": (ValueError, "`scaling` must be a number or a pair", lambda i: {"scaling": (1.0, 1.0, 1.0)}),
    "scaling a string": (TypeError, "`scaling` must be a number or a pair", lambda i: {"scaling": "1"}),
    "scaling a bool": (TypeError, "`scaling` must be a finite number", lambda i: {"scaling": True}),
    "scaling a tensor": (TypeError, "`scaling` must be a number", lambda i: {"scaling": torch.tensor(1.0)}),
    "impl unknown": (ValueError, "`impl` must be one of .*'cuda'", lambda i: {"impl": "cuda"}),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_input_is_named(which):
    kind, message, change = BAD[which]
    inputs = build()
    with pytest.raises(kind, match="^dual_lora: " + message):
        call(inputs, **change(inputs))


def test_cases_cover_what_they_name():
    specs = [case.spec for case in CASES.cases()]
    assert any(s.d_in != s.d_out for s in specs) and any(s.r_pos != s.r_neg for s in specs)
    assert {s.gelu for s in specs if s.strided} == {True, False}
    assert any(0 in s.lead for s in specs) and any(s.m is None for s in specs)
    assert Spec().d_in % 2 == 0 and any(s.r_pos % 2 for s in specs)
