"""linear_logprob: every implementation against the float64 definition; ranks, torch's own checks, memory."""

from __future__ import annotations

import math

import pytest
import torch

from calm_fast._ops.linear_logprob import native
from calm_fast._ops.linear_logprob.api import decide, linear_logprob
from calm_fast._ops.linear_logprob.cases import CASES
from calm_fast._ops.vocabulary import schedule, torch_impl
from calm_fast.benchmarks.timing import peak_bytes
from calm_fast.core import native_library
from calm_fast.core.dispatch import triton_obstacle
from calm_fast.core.numerics import Case, check, judge, truth_of, unit_roundoff

NAMES = ("hidden", "weight", "targets", "bias", "temperature", "softcap", "return_entropy", "return_rank")


def build(name="plain", dtype=torch.float32, device="cpu", **changes):
    return CASES.build(CASES.case(name, dtype, **changes), torch.device(device))


def call(inputs, impl="auto", **changes):
    """Call linear_logprob with a case's inputs; `changes` replace arguments by name."""
    return linear_logprob(**{name: inputs[name] for name in NAMES} | {"impl": impl} | changes)


def outputs(inputs, impl, **changes):
    result = call(inputs, impl, **changes)
    return result if isinstance(result, tuple) else (result,)


def gradients(inputs, impl, names=("hidden", "weight"), **changes):
    given = {name: inputs[name].detach().requires_grad_() for name in names}
    results = [r for r in outputs({**inputs, **given}, impl, **changes) if r.is_floating_point()]
    upstream = [inputs["dlogprob"], inputs["dentropy"]][: len(results)]
    upstream = [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)]
    return torch.autograd.grad(results, list(given.values()), upstream)


def double(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


IMPLS = ["torch", "native", "triton-interpreter", pytest.param("triton-cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=IMPLS)
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
def test_outputs_and_gradients_within_the_error_rule(case: Case, impl, device):
    wrong = [row for row in check(CASES, case, impl, device) if not row.ok]
    assert not wrong


@pytest.mark.parametrize("impl_name", ["reference", "torch"])
def test_definition_in_plain_python(impl_name):
    """Log-probability, entropy and rank agree with a computation on lists of floats."""
    inputs = build("everything", torch.float64, t=6, v=9, d=4)
    logprob, entropy, rank = call(inputs, impl_name)
    hidden, weight, bias = (inputs[name].tolist() for name in ("hidden", "weight", "bias"))
    for t, target in enumerate(inputs["targets"].tolist()):
        if target == -100:
            assert (logprob[t], entropy[t], rank[t]) == (0, 0, 0)
            continue
        raw = [sum(a * b for a, b in zip(hidden[t], w, strict=True)) + c for w, c in zip(weight, bias, strict=True)]
        z = [inputs["softcap"] * math.tanh(x / inputs["softcap"]) for x in raw]
        exps = [math.exp(x / inputs["temperature"]) for x in z]
        p = [e / math.fsum(exps) for e in exps]
        assert logprob[t].item() == pytest.approx(math.log(p[target]), rel=1e-12)
        assert entropy[t].item() == pytest.approx(-math.fsum(x * math.log(x) for x in p), rel=1e-12)
        assert rank[t].item() == 1 + sum(x > z[target] for x in z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nothing-ignored", "everything", "long-rows"])
def test_rank_counts_larger_logits_up_to_rounding(name, dtype, impl, device):
    inputs = build(name, dtype, device, rank=True)
    rank = outputs(inputs, impl)[-1]
    exact = double(inputs)
    z = exact["hidden"] @ exact["weight"].T + (0 if exact["bias"] is None else exact["bias"])
    size = exact["hidden"].abs() @ exact["weight"].abs().T
    slack = unit_roundoff(dtype) * z.abs() + 2**-24 * (exact["hidden"].shape[1] + 4) * (size + z.abs() + 1)
    if exact["softcap"] is not None:
        # the rounding of the cap itself, magnified where its slope is near 0
        slack = slack + 4 * 2**-24 * exact["softcap"] ** 2
        z = exact["softcap"] * torch.tanh(z / exact["softcap"])
    valid = inputs["targets"] != -100
    at = inputs["targets"].clamp(min=0).unsqueeze(1)
    gap, slack = z - z.gather(1, at), slack + slack.gather(1, at)
    other = torch.arange(z.shape[1], device=device) != at
    least, most = (1 + (gap > s).logical_and(other).sum(1) for s in (slack, -slack))
    assert rank.dtype == torch.int64
    assert ((least <= rank) & (rank <= most))[valid].all()
    assert (rank[~valid] == 0).all()
    # the interval is narrow enough to mean something
    assert (most - least)[valid].float().mean() < 0.1 * z.shape[1]


def banned_run(inputs, impl, kept, v):
    """Return CASES.run of `inputs` computed among v tokens, of which all but `kept` have a bias of -inf."""
    weight = torch.randn(v, inputs["weight"].shape[1], generator=torch.Generator().manual_seed(1))
    weight = weight.to(inputs["weight"]).index_copy(0, kept, inputs["weight"])
    bias = inputs["bias"].new_full((v,), float("-inf")).index_copy(0, kept, inputs["bias"])
    targets = inputs["targets"]
    targets = torch.where(targets == -100, targets, kept[targets.clamp(min=0)])
    found = CASES.run({**inputs, "weight": weight, "bias": bias, "targets": targets}, impl)
    others = torch.ones(v, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    for name in {"dweight", "dbias"} & set(found):
        # vectorised exponentials end at 2^-126
        assert found[name][others].abs().max() < 2.0**-110
        found[name] = found[name][kept]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["entropy", "entropy-frozen", "temperature-low"])
@pytest.mark.parametrize("impl", [*IMPLS, "reference"], indirect=True)
def test_a_banned_token_is_equivalent_to_an_absent_one(name, dtype, impl, device):
    """A bias of -inf bans tokens: among 4,500, whole tiles and splits are banned, the first and last ones too."""
    case = CASES.case(name, dtype, v=700, bias=True)
    inputs, columns = CASES.build(case, device), torch.arange(4500, device=device)
    kept = ((columns >= 2100) & (columns < 4400) & (columns % 3 == 0)).nonzero().squeeze(1)[:700]
    found = banned_run(inputs, impl, kept, 4500)
    rows = judge(case, impl, device, found, truth_of(CASES, inputs, dtype))
    assert rows and not [row for row in rows if not row.ok]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"], indirect=True)
def test_a_banned_target_has_probability_zero(impl, device):
    inputs = build("nothing-ignored", device=device, bias=True, entropy=True)
    inputs["bias"] = inputs["bias"].index_fill(0, inputs["targets"][:1], float("-inf"))
    logprob, entropy, rank = call(inputs, impl)
    hit = inputs["targets"] == inputs["targets"][0]
    assert (logprob[hit] == float("-inf")).all() and logprob[~hit].isfinite().all() and entropy.isfinite().all()
    # every other token is more likely
    assert (rank[hit] == 71).all()
    assert all(g.isfinite().all() for g in gradients(inputs, impl))


def test_rank_of_ties_and_of_the_largest(impl, device):
    weight = torch.tensor([[1.0], [3.0], [3.0], [-2.0], [3.0]], device=device)
    targets = torch.tensor([0, 1, 2, 3, 4, -100], device=device)
    hidden = torch.ones(6, 1, device=device)
    logprob, rank = linear_logprob(hidden, weight, targets, return_rank=True, impl=impl)
    assert rank.tolist() == [4, 1, 1, 5, 1, 0]
    assert logprob[5] == 0


def test_extras_are_returned_in_order_and_on_request(impl, device):
    inputs = build("everything", device=device)
    logprob, entropy, rank = call(inputs, impl)
    assert torch.equal(call(inputs, impl, return_entropy=False, return_rank=False), logprob)
    for flags, expected in (((True, False), (logprob, entropy)), ((False, True), (logprob, rank))):
        found = call(inputs, impl, return_entropy=flags[0], return_rank=flags[1])
        assert len(found) == 2
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["plain", "everything", "entropy", "temperature"])
@pytest.mark.parametrize("impl_name", ["reference", "torch"])
def test_gradcheck(name, impl_name):
    inputs = build(name, torch.float64, t=5, v=11, d=4, rank=False)
    names = [n for n in ("hidden", "weight", "bias") if inputs[n] is not None]

    def results(*tensors):
        return outputs({**inputs, **dict(zip(names, tensors, strict=True))}, impl_name)

    assert torch.autograd.gradcheck(results, [inputs[n].detach().requires_grad_() for n in names])


def test_every_combination_of_wanted_gradients(impl, device):
    inputs = build("everything", device=device)
    every = ("hidden", "weight", "bias")
    full = dict(zip(every, gradients(inputs, impl, every), strict=True))
    for names in (("hidden",), ("weight",), ("bias",), ("hidden", "bias")):
        for name, grad in zip(names, gradients(inputs, impl, names), strict=True):
            torch.testing.assert_close(grad, full[name], rtol=2e-5, atol=2e-5)


def test_gradient_of_one_output_alone(impl, device):
    """Where only the entropy or only the log-probability is used, the other gradient is absent, not wrong."""
    inputs = build("everything", device=device)
    hidden = inputs["hidden"].requires_grad_()
    logprob, entropy, _ = call(inputs, impl)
    parts = [
        torch.autograd.grad(out, hidden, up, retain_graph=True)[0]
        for out, up in ((logprob, inputs["dlogprob"]), (entropy, inputs["dentropy"]))
    ]
    (both,) = torch.autograd.grad((logprob, entropy), hidden, (inputs["dlogprob"], inputs["dentropy"]))
    torch.testing.assert_close(parts[0] + parts[1], both, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_torch_result_does_not_depend_on_block_sizes(monkeypatch, chunk, by_columns):
    inputs = build("everything", torch.float64)
    names = ("hidden", "weight", "bias") if by_columns else ("hidden",)
    expected = outputs(inputs, "reference"), gradients(inputs, "reference", names)
    monkeypatch.setattr(schedule, "_CHUNK", chunk)
    monkeypatch.setattr(torch_impl, "_COLUMNS", 5)
    monkeypatch.setattr(torch_impl, "_TILE", 15)
    torch.testing.assert_close(outputs(inputs, "torch"), expected[0])
    torch.testing.assert_close(gradients(inputs, "torch", names), expected[1])


def test_no_tokens(impl, device):
    inputs = build("everything", device=device)
    for name in ("hidden", "targets", "dlogprob", "dentropy"):
        inputs[name] = inputs[name][:0]
    assert [r.shape for r in outputs(inputs, impl)] == [(0,)] * 3
    dhidden, dweight = gradients(inputs, impl)
    assert dhidden.shape == (0, 24) and not dweight.any()


def test_ignored_rows_may_hold_anything(impl, device):
    inputs = build("everything", device=device)
    ignored = inputs["targets"] == -100
    assert ignored.any()
    expected = *outputs(inputs, impl), *gradients(inputs, impl)
    inputs["hidden"] = inputs["hidden"].masked_fill(ignored.unsqueeze(-1), float("nan"))
    found = *outputs(inputs, impl), *gradients(inputs, impl)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_nan_row_stays_in_its_row(impl, device):
    inputs = build("nothing-ignored", device=device, rank=False, frozen=True)
    expected = call(inputs, impl), gradients(inputs, impl, ("hidden",))[0]
    inputs["hidden"] = inputs["hidden"].clone()
    inputs["hidden"][4] = float("nan")
    found = call(inputs, impl), gradients(inputs, impl, ("hidden",))[0]
    others = torch.arange(19, device=device) != 4
    for new, old in zip(found, expected, strict=True):
        assert torch.equal(new[others], old[others])
        assert new[4].isnan().all()


@pytest.mark.parametrize(
    "impl", ["native", "triton-interpreter", pytest.param("triton-cuda", marks=pytest.mark.gpu)], indirect=True
)
def test_a_token_does_not_depend_on_the_other_tokens(impl, device, monkeypatch):
    """Kernels split the vocabulary at fixed columns: scoring a token alone gives the same bits.

    Not where products come from a BLAS, which on some CPUs adds a row's terms in another order at another place of a
    block. So the compiled library takes its own products here, for few logits too. The interpreter takes numpy's: a
    logit is a sum of d products, twice rounded each, and log-sum-exp adds a few.
    """
    monkeypatch.setattr(native, "at_once", lambda *_: False)
    inputs = build("everything", device=device)
    whole = outputs(inputs, impl)
    roundings = 2 * inputs["hidden"].shape[1] + 8 if impl == "triton" and device.type == "cpu" else 0
    for rows in (slice(3, 4), slice(5, 20)):
        part = outputs({**inputs, **{n: inputs[n][rows] for n in ("hidden", "targets")}}, impl)
        for a, b in zip(part, whole, strict=True):
            bound = roundings * 2**-24 * b.abs().max().item() if b.is_floating_point() else 0
            torch.testing.assert_close(a, b[rows], rtol=0, atol=bound)


@pytest.mark.parametrize("size", [1e3, 1e5])
def test_extreme_logits_stay_finite_and_right(impl, device, size):
    inputs = build("entropy", device=device, magnitude=size, ignored=0.0)
    (logprob, entropy), (expected, _) = outputs(inputs, impl), outputs(double(inputs), "reference")
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5 * size)
    assert (logprob <= 0).all() and entropy.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(inputs, impl))


def test_a_certain_token_has_probability_one_not_more(impl, device):
    """bfloat16 logits near 100 are multiples of 1/2; target and sum read the same tile, so the rounding cancels."""
    gen = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 32, generator=gen).to(device, torch.bfloat16)
    weight = torch.cat((hidden * 3, torch.randn(40, 32, generator=gen).to(device, torch.bfloat16) * 0.1))
    targets = torch.arange(9, device=device)
    logprob, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, impl=impl)
    # at most 2^-23 of a logit
    assert (logprob <= 0).all() and (logprob > -2e-5).all()
    assert (entropy >= 0).all() and (entropy < 5e-5).all()


def test_deterministic(impl, device):
    inputs = build("everything", torch.bfloat16, device)
    first = *outputs(inputs, impl), *gradients(inputs, impl)
    for _ in range(20 if impl == "torch" else 2):
        for a, b in zip(first, (*outputs(inputs, impl), *gradients(inputs, impl)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["plain", "everything", "entropy-frozen"])
def test_opcheck(name, impl, device):
    inputs = build(name, device=device)
    frozen, bias = inputs["frozen"], inputs["bias"]
    tensors = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_(not frozen)]
    tensors += [None if bias is None else bias.requires_grad_(), inputs["targets"]]
    options = [inputs["temperature"], inputs["softcap"], -100]
    wanted = [inputs["return_entropy"], inputs["return_rank"]]
    forward, backward = (getattr(torch.ops.calm_fast, f"linear_logprob_{impl}_{part}") for part in ("fwd", "bwd"))
    torch.library.opcheck(forward.default, (*tensors, *options, *wanted))
    torch.library.opcheck(forward.default, (*tensors, *options, *wanted, True))
    _, entropy, _, norms, logits = forward(*tensors, *options, *wanted, True)
    detached = [None if t is None else t.detach() for t in (*tensors, norms, entropy, logits)]
    upstream = (inputs["dlogprob"], inputs["dentropy"])
    needs = [True, not frozen, bias is not None]
    torch.library.opcheck(backward.default, (*upstream, *detached, *options, needs))


def test_compiles_as_one_graph(impl, device):
    inputs = build("everything", device=device)

    def step(hidden, weight):
        logprob, entropy, rank = call({**inputs, "hidden": hidden * 2, "weight": weight}, impl)
        return (logprob * rank).sum() + entropy.square().sum()

    plain = [inputs[n].detach().clone().requires_grad_() for n in ("hidden", "weight")]
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
    hidden = inputs["hidden"].requires_grad_()
    (grad,) = torch.autograd.grad(call(inputs, impl).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="have no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["torch", "native"], indirect=True)
def test_memory_stays_far_below_the_logits(impl):
    tokens, d, v = 512, 16, 49152
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, d, generator=gen).bfloat16().requires_grad_()
    weight = torch.randn(v, d, generator=gen).bfloat16()
    targets = torch.randint(0, v, (tokens,), generator=gen)

    def score():
        with torch.no_grad():
            linear_logprob(hidden, weight, targets, return_entropy=True, return_rank=True, impl=impl)

    def train():
        linear_logprob(hidden, weight, targets, impl=impl).sum().backward()
        hidden.grad = None

    train()
    logits = tokens * v * 2
    assert peak_bytes(score, torch.device("cpu")) < 12 * 2**20 <= logits / 4
    # MiB of logit gradients at a time
    chunk = {"torch": 16, "native": 32}[impl]
    assert peak_bytes(train, torch.device("cpu")) < (chunk + 8) * 2**20


def test_auto_on_a_cpu(monkeypatch):
    """auto picks native where it is available and not slow on this CPU, else torch; never native for float64."""
    inputs = build()
    arguments = {name: inputs[name] for name in ("hidden", "weight", "targets")}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None)
    monkeypatch.setattr(native_library, "obstacle", lambda op, device: None)
    monkeypatch.setattr("calm_fast._ops.vocabulary.decide.AT_ONCE", 0)
    assert decide(**arguments).impl == "native"
    assert decide(**wide).impl == "torch"
    large = torch.zeros(1 << 18, arguments["hidden"].shape[1])
    few = {k: v if k == "weight" else v[:3] for k, v in arguments.items()}
    few |= {"seq_ids": few["seq_ids"] * 0} if "seq_ids" in few else {}
    more = {k: v if k == "weight" else torch.cat((v, v)) for k, v in arguments.items()}
    assert decide(**few).impl == decide(**{**more, "weight": large}).impl == "native"
    assert decide(**{**few, "weight": large}).impl == "torch"
    for impl in ("native", "triton"):
        with pytest.raises(RuntimeError, match="float64"):
            linear_logprob(**wide, impl=impl)
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "matrix units")
    assert decide(**arguments).impl == "torch" and "matrix units" in decide(**arguments).reason
    assert decide(**arguments, impl="native").impl == "native"
    monkeypatch.setattr(native_library, "obstacle", lambda op, device: "the compiled library does not load")
    assert decide(**arguments).impl == "torch"
    with pytest.raises(RuntimeError, match="native.*compiled library"):
        linear_logprob(**arguments, impl="native")


@pytest.mark.parametrize(
    ("dtype", "d", "torch_below"),
    [(torch.float32, 64, 4), (torch.float32, 4096, 4), (torch.bfloat16, 576, 16), (torch.bfloat16, 4096, 32)],
)
def test_few_tokens_with_a_large_weight(dtype, d, torch_below, monkeypatch):
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None)
    monkeypatch.setattr(native_library, "emulated", lambda dtype: False)
    monkeypatch.setattr(native_library, "obstacle", lambda op, device: None)
    monkeypatch.setattr("calm_fast._ops.vocabulary.decide.AT_ONCE", 0)  # the choice without a product of few logits
    weight = torch.zeros((1 << 20) // d + 1, d, dtype=dtype)

    def choice(tokens):
        return decide(torch.zeros(tokens, d, dtype=dtype), weight, torch.zeros(tokens, dtype=torch.int64)).impl

    assert choice(torch_below - 1) == "torch" and choice(torch_below) == "native"
    monkeypatch.setattr(native_library, "emulated", lambda dtype: True)  # a CPU without products of 16 bits
    assert choice(1) == ("torch" if dtype == torch.float32 else "native")


def test_emulated_products_are_those_without_instructions(monkeypatch):
    def on(lane):
        native_library._find_emulation.cache_clear()
        monkeypatch.setattr(native_library, "build_info", lambda: {"_cpu": {"best lane here": lane}})
        return [native_library.emulated(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]

    try:
        assert on("avx2") == on("avx512") == [False, True, True]
        assert on("avx512_bf16") == [False, False, True]
    finally:
        native_library._find_emulation.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "softcap": 2.0}])
def test_few_logits_at_once_equal_the_sweep(dtype, options, monkeypatch):
    """Both forms of impl="torch" give the same results and, through maximum and sum, the same gradients."""
    inputs = build()
    hidden, weight = (inputs[name].to(dtype) * scale for name, scale in (("hidden", 30.0), ("weight", 1.0)))

    def run():
        leaf = hidden.clone().requires_grad_()
        out = linear_logprob(leaf, weight, inputs["targets"], impl="torch", **options)
        (grad,) = torch.autograd.grad(out.sum(), leaf)
        return out.detach(), grad

    together = run()
    monkeypatch.setattr("calm_fast._ops.linear_logprob.torch_impl._AT_ONCE", 0)
    for one, two in zip(together, run(), strict=True):
        torch.testing.assert_close(one, two, rtol=2e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


def test_few_tokens_call_few_ops():
    """A sweep of four tiles calls torch's ops more than a hundred times; few logits are one product and one softmax."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += not str(func).startswith("calm_fast")
            return func(*args, **(kwargs or {}))

    hidden, weight, targets = torch.randn(4, 8), torch.randn(4096, 8), torch.zeros(4, dtype=torch.int64)
    with Count() as count:
        linear_logprob(hidden, weight, targets, impl="torch")
    assert count.calls <= 40
