"""cross_attention's tiles in the compiled library, any number of queries: every lane, both directions, promises."""

from __future__ import annotations

import math

import pytest
import torch

import calm_fast
from calm_fast._ops.cross_attention import native
from calm_fast._ops.cross_attention.native import NATIVE_MAX_QUERIES
from calm_fast.core import native_library
from calm_fast.core.numerics import check, judge, truth_of
from calm_fast.ops import cross_attention
from calm_fast.verify.cases import op_cases

pytestmark = pytest.mark.skipif(
    native_library.obstacle("cross_attention") is not None, reason=str(native_library.obstacle("cross_attention"))
)
CASES = op_cases("cross_attention")
MANY = [case for case in CASES.cases() if case.spec.m > NATIVE_MAX_QUERIES]
LANES = {"scalar": 0, "avx2": 1, "avx512": 2}
CPU = torch.device("cpu")


def raw(q, k, v, lo=None, hi=None, causal=False, scale=0.3, lane=-1):
    return torch.ops.calm_fast._cross_attention_native_fwd(q, k, v, lo, hi, causal, scale, lane)


def raw_bwd(dout, dlse, q, k, v, out, lse, lo=None, hi=None, causal=False, scale=0.3, lane=-1):
    return torch.ops.calm_fast._cross_attention_native_bwd(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale, lane)


def tensors(b=2, m=100, n=170, h=4, hkv=2, d=24, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d)))


def scattered(b=2, m=100, n=170, seed=0):
    """Random intervals, a new one in each row; about half of the rows see no key."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, n + 1, (b, m), generator=g, dtype=torch.int32) for _ in range(2))


@pytest.fixture(params=LANES)
def lane(request):
    try:
        raw(*tensors(m=1, n=1), lane=LANES[request.param])
    except RuntimeError as problem:
        pytest.skip(str(problem).splitlines()[0])
    return LANES[request.param]


@pytest.mark.parametrize("case", MANY, ids=str)
def test_error_within_its_bound(case):
    assert [row for row in check(CASES, case, "native") if not row.ok] == []


@pytest.mark.parametrize("case", [c for c in CASES.cases() if (c.spec.scale or 1) > 0], ids=str)
def test_every_lane_is_within_the_bound(case, lane):
    """Few queries too, forward and backward, called directly."""
    inputs = CASES.build(case, CPU)
    truth = truth_of(CASES, inputs, case.dtype)
    q, k, v = (inputs[name].contiguous() for name in "qkv")
    lo, hi = (t if t is None else t.expand(q.shape[:2]).contiguous() for t in (inputs["lo"], inputs["hi"]))
    scale = q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    out, lse = raw(q, k, v, lo, hi, inputs["causal"], scale, lane)
    upstream = inputs["dout"].contiguous(), inputs["dlse"]
    grads = raw_bwd(*upstream, q, k, v, out, lse, lo, hi, inputs["causal"], scale, lane)
    got = {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    if inputs["dlse"] is None:
        del got["lse"]
    assert [row for row in judge(case, "native", CPU, got, truth) if not row.ok] == []


def against_float64(q, k, v, lo, hi, causal, scale, lane, tolerance):
    g = torch.Generator().manual_seed(9)
    out, lse = raw(q, k, v, lo, hi, causal, scale, lane)
    dout, dlse = (torch.randn(t.shape, generator=g) for t in (out, lse))
    dense = (t.contiguous() for t in (dout.to(q.dtype), dlse, out, lse))
    dout, dlse, out, lse = dense
    got = (out, lse.clone(), *raw_bwd(dout, dlse, q, k, v, out, lse, lo, hi, causal, scale, lane))
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = cross_attention(*leaves, lo=lo, hi=hi, causal=causal, scale=scale, return_lse=True, impl="reference")
    want = (*want, *torch.autograd.grad(want, leaves, (dout.double(), dlse.double())))
    assert torch.equal(got[1].isfinite(), want[1].isfinite())
    for one, two in zip(got, want, strict=True):
        one, two = (torch.where(t.isinf(), 0.0, t.detach().double()) for t in (one, two))
        assert float((one - two).norm()) <= tolerance * float(two.norm()) + 1e-30


@pytest.mark.parametrize("d", [1, 7, 16, 40, 64, 80, 256])
def test_any_head_dim_and_gaps_between_rows(d, lane):
    """The gaps between rows hold NaN: reading one shows."""
    poisoned = [torch.full((*t.shape[:3], d + 3), math.nan) for t in tensors(d=d)]
    for wide, t in zip(poisoned, tensors(d=d), strict=True):
        wide[..., 1 : d + 1] = t
    against_float64(*(t[..., 1 : d + 1] for t in poisoned), None, None, True, d**-0.5, lane, 2e-6)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (17, 3), (48, 64), (49, 65), (97, 129), (193, 1), (3, 700)])
@pytest.mark.parametrize("mask", ["full", "causal", "scattered"])
def test_lengths_around_panels_and_blocks(m, n, mask, lane):
    lo, hi = scattered(2, m, n, seed=m) if mask == "scattered" else (None, None)
    against_float64(*tensors(m=m, n=n), lo, hi, mask == "causal", 0.3, lane, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_once(dtype, lane):
    q, k, v = tensors(dtype=dtype, n=400)
    lo, hi = scattered(2, 100, 400)
    # out, which the backward pass reads, is rounded too
    against_float64(q, k, v, lo, hi, False, 0.3, lane, 2 * torch.finfo(dtype).eps)


def test_threads_change_no_bit():
    """Also with fewer KV heads than threads: dq and dk, dv are then computed one after the other."""
    q, k, v = tensors(b=1, m=130, n=900, h=4, hkv=2)
    lo, hi = scattered(1, 130, 900)
    before, results = torch.get_num_threads(), []
    dout, dlse = torch.randn(q.shape), torch.randn(1, 4, 130)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out, lse = raw(q, k, v, lo, hi)
            results.append((out, lse, *raw_bwd(dout, dlse, q, k, v, out, lse, lo, hi)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_repeats_batch_mates_and_other_rows_change_no_bit():
    q, k, v = tensors(b=3, m=60)
    lo, hi = scattered(3, 60)
    out, lse = raw(q, k, v, lo, hi)
    for _ in range(20):
        assert all(torch.equal(one, two) for one, two in zip((out, lse), raw(q, k, v, lo, hi), strict=True))
    for i in range(3):
        part = slice(i, i + 1)
        alone = raw(q[part], k[part], v[part], lo[part], hi[part])
        assert torch.equal(alone[0], out[part]) and torch.equal(alone[1], lse[part])
    # a row's bits depend on its own interval: the other rows now see everything
    lo[:, ::2], hi[:, ::2] = 0, 170
    changed = raw(q, k, v, lo, hi)[0]
    assert torch.equal(changed[:, 1::2], out[:, 1::2]) and not torch.equal(changed, out)


@pytest.mark.parametrize("impl", ["native", "auto"])
def test_nan_stays_where_it_may_be_seen(impl):
    q, k, v = tensors(b=1, h=2, hkv=2)
    hi = torch.full((1, 100), 60, dtype=torch.int32)
    hi[0, 50:] = 170
    hi[0, 20] = 0
    clean = cross_attention(q, k, v, hi=hi, impl=impl)
    row = q.clone()
    row[0, 3, 0] = row[0, 20, 1] = math.nan  # one that sees keys, one that does not
    got = cross_attention(row, k, v, hi=hi, impl=impl)
    assert got[0, 3, 0].isnan().all()
    got[0, 3, 0] = clean[0, 3, 0]
    assert torch.equal(got, clean)
    key = k.clone()
    key[0, 150, 1] = math.nan
    got, lse = cross_attention(q, key, v, hi=hi, return_lse=True, impl=impl)
    assert got[0, 50:, 1].isnan().all() and lse[0, 1, 50:].isnan().all()
    assert torch.equal(got[0, :, 0], clean[0, :, 0])
    # rows in blocks that read the key without seeing it: its score is replaced, its value is finite
    assert torch.equal(got[0, :50], clean[0, :50])


def test_rows_without_keys_and_keys_without_rows_have_no_gradient():
    leaves = [t.requires_grad_() for t in tensors()]
    lo = torch.full((100,), 40, dtype=torch.int32)
    hi = torch.full((100,), 90, dtype=torch.int32)
    hi[30:60] = 40
    out, lse = cross_attention(*leaves, lo=lo, hi=hi, return_lse=True, impl="native")
    assert (out[:, 30:60] == 0).all() and (lse[:, :, 30:60] == -math.inf).all()
    upstream = torch.full_like(out, 3.0), torch.full_like(lse, math.nan).masked_fill(lse.isfinite(), 1.0)
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, upstream)
    assert (dq[:, 30:60] == 0).all() and (dq[:, :30] != 0).any()
    for grad in (dk, dv):
        assert (grad[:, :40] == 0).all() and (grad[:, 90:] == 0).all() and (grad[:, 40:90] != 0).any()
        assert grad.isfinite().all()


@pytest.mark.parametrize("size", [float("-inf"), 3e38])
def test_infinite_scores_as_in_the_definition(size):
    q, k, v = (torch.ones(1, 18, 1, 8), torch.ones(1, 5, 1, 8), torch.randn(1, 5, 1, 8))
    k[0, 1:3] = size
    for lo, hi in ((0, 5), (1, 3), (2, 5)):
        bounds = {"lo": torch.full((18,), lo, dtype=torch.int32), "hi": torch.full((18,), hi, dtype=torch.int32)}
        got, lse = cross_attention(q, k, v, **bounds, return_lse=True, impl="native")
        want, want_lse = cross_attention(q, k, v, **bounds, return_lse=True, impl="reference")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        finite = want_lse.isfinite()
        torch.testing.assert_close(lse[finite], want_lse[finite])
        assert not lse[~finite].isfinite().any()


@pytest.mark.parametrize(("b", "m", "n"), [(0, 20, 7), (2, 0, 7), (2, 20, 0)])
def test_empty_tensors(b, m, n):
    leaves = [t.requires_grad_() for t in tensors(b=b, m=m, n=n)]
    out, lse = cross_attention(*leaves, return_lse=True)
    assert torch.equal(out, torch.zeros(b, m, 4, 24)) and (lse == -math.inf).all()
    for grad in torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse))):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_expanded_and_transposed_tensors():
    q, k, v = tensors(h=2, hkv=2)
    lo, hi = scattered(1)
    views = (q.transpose(1, 2).contiguous().transpose(1, 2), k[:1].expand(2, -1, -1, -1), v.mT.contiguous().mT)
    results = []
    for inputs in (views, [t.contiguous() for t in views]):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = cross_attention(*leaves, lo=lo.expand(2, 100), hi=hi[0], impl="native")
        grads = torch.autograd.grad(out, leaves, out.detach()[:1].expand_as(out))
        results.append((out, *grads))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_opcheck_and_compile():
    q, k, v = (t.requires_grad_() for t in tensors(m=20, n=30, d=8))
    lo, hi = scattered(2, 20, 30)
    ops = torch.ops.calm_fast
    torch.library.opcheck(ops.cross_attention_native_fwd.default, (q, k, v, lo, hi, False, 0.3))
    plain = [t.detach() for t in (q, k, v)]
    torch.library.opcheck(ops.cross_attention_native_fwd.default, (*plain, None, None, True, 0.3))
    out, lse = raw(*plain, lo, hi)
    arguments = (torch.randn_like(out), None, *plain, out, lse, lo, hi, False, 0.3)
    torch.library.opcheck(ops.cross_attention_native_bwd.default, arguments)

    def loss(q, k, v, hi):
        out, lse = cross_attention(q, k, v, hi=hi, return_lse=True)
        return out.square().sum() + lse.where(lse.isfinite(), 0.0).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (20, 33, 170):
        inputs = [t.requires_grad_() for t in tensors(m=m, n=m + 9)]
        hi = scattered(2, m, m + 9)[0]
        want, got = (torch.autograd.grad(f(*inputs, hi), inputs) for f in (loss, compiled))
        for one, two in zip(got, want, strict=True):
            torch.testing.assert_close(one, two)


def test_auto_takes_it_unless_torch_is_faster(monkeypatch):
    args = tensors()
    for grad in (False, True):
        decision = calm_fast.explain("cross_attention", *(t.requires_grad_(grad) for t in args))
        assert decision.impl == "native" and "one pass" in decision.reason
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "this CPU has matrix units")
    decision = calm_fast.explain("cross_attention", *args)
    assert decision.impl == "torch" and "matrix units" in decision.reason
    assert calm_fast.explain("cross_attention", *args, impl="native").impl == "native"
    monkeypatch.setattr(native, "MAX_KEYS", 169)
    with pytest.raises(RuntimeError, match="at most 169 keys"):
        cross_attention(*args, impl="native")


@pytest.mark.parametrize(
    ("m", "n", "plain"), [(1, 48, "torch"), (1, 600, "native"), (4, 48, "native"), (40, 48, "torch")]
)
def test_matrix_units_are_for_plain_inference(m, n, plain, monkeypatch):
    """SDPA's forward pass uses them; with a mask, an lse or a backward pass the tiles are faster."""
    q, k, v = (t.bfloat16() for t in tensors(m=m, n=n))
    hi = torch.full((m,), n, dtype=torch.int32)

    def choice(*args, **options):
        return calm_fast.explain("cross_attention", *args, **options).impl

    units = lambda dtype: None if dtype == torch.float32 else "this CPU has matrix units"  # noqa: E731
    monkeypatch.setattr(native_library, "slowness", units)
    assert choice(q, k, v) == plain
    assert choice(q.requires_grad_(), k, v) == choice(q, k, v, hi=hi) == "native"
    with torch.no_grad():
        assert choice(q, k, v) == plain
        assert choice(q, k, v, return_lse=True) == choice(q, k, v, hi=hi) == "native"
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "this CPU has neither AVX2 nor AVX-512")
    assert choice(q, k, v, hi=hi) == ("native" if m <= 16 else "torch")  # decoding has its own kernel


@pytest.mark.parametrize("n", [0, 48])
def test_full_attention_without_the_tiles_is_that_of_torch(n, monkeypatch):
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "torch is faster")
    q, k, v = (t.requires_grad_() for t in tensors(m=40, n=n))
    results = []
    for impl in ("auto", "torch"):
        out = cross_attention(q, k, v, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_double_backward_is_refused():
    q, k, v = (t.requires_grad_() for t in tensors())
    (dq,) = torch.autograd.grad(cross_attention(q, k, v).square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError, match="impl='native' has no double backward. Use impl='reference'"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(2, 170, 3, 24)},
            "`k` must have a number of KV heads that divides the 4 heads of `q`, got 3",
        ),
        ({"k": torch.zeros(2, 170, 2)}, "`k` must have shape"),
        ({"v": torch.zeros(2, 169, 2, 24)}, "`v` must have shape"),
        ({"k": torch.zeros(2, 170, 2, 24, dtype=torch.float16)}, "`k` must have shape .* q's dtype"),
        ({"q": torch.zeros(2, 100, 4, 48)[..., ::2]}, "`q` must have a contiguous last dimension"),
        ({"lo": torch.zeros(100, dtype=torch.int32)}, r"`lo` must have shape \(2, 100\), got \(100\)"),
        ({"hi": torch.zeros(2, 100)}, "`hi` must be int32, got float32"),
        ({"scale": 0.0}, "`scale` must be positive"),
        ({"lane": 9}, "`lane` must be -1 or at most .* got 9"),
    ],
)
def test_a_wrong_direct_call_is_refused_before_it_reads(change, message):
    arguments = dict(zip("qkv", tensors(), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        raw(**arguments)
    out, lse = torch.zeros(2, 100, 4, 24), torch.zeros(2, 4, 100)
    with pytest.raises(RuntimeError, match=message):
        raw_bwd(out, None, out=out, lse=lse, **arguments)


@pytest.mark.parametrize("name", ["dout", "dlse", "out", "lse"])
def test_a_wrong_direct_backward_is_refused(name):
    arguments = dict(zip("qkv", tensors(), strict=True))
    arguments |= {n: torch.zeros(2, 100, 4, 24) for n in ("dout", "out")}
    arguments |= {n: torch.zeros(2, 4, 100) for n in ("dlse", "lse")}
    arguments[name] = arguments[name][:, :-1].contiguous()
    with pytest.raises(RuntimeError, match=f"`{name}` must have shape"):
        raw_bwd(**arguments)


@pytest.mark.parametrize("m", [3, 40], ids=["few", "many"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"lo": True}], ids=["full", "causal", "intervals"])
def test_torch_func_transforms_work_with_auto(m, options):
    """Registered ops have no rules for transforms; inside one `auto` chooses torch and says so."""
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, 4, 16, generator=g) for n in (m, 50, 50))
    options = {"lo": torch.arange(m, dtype=torch.int32)} if "lo" in options else options

    def loss(q, k, v):
        assert calm_fast.explain("cross_attention", q, k, v, **options).impl == "torch"
        return cross_attention(q, k, v, **options).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(cross_attention(*leaves, **options).square().sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_library_without_the_tiles_leaves_many_queries_to_torch(monkeypatch):
    """A checkout whose library is older than its sources."""
    known = native_library.obstacle
    monkeypatch.setattr(
        native_library,
        "obstacle",
        lambda op, device="cpu": f"has no {op}" if op.endswith("_bwd") else known(op, device),
    )
    q, k = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 8)
    decision = calm_fast.explain("cross_attention", q, k, k)
    assert decision.impl == "torch" and "has no cross_attention_bwd" in str(decision)
    assert cross_attention(q, k, k).shape == q.shape
    assert calm_fast.explain("cross_attention", q[:, :4], k, k).impl == "native"
