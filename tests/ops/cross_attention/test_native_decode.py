"""cross_attention's decode kernel in the compiled library: every SIMD lane, its promises, and the choice of `auto`."""

from __future__ import annotations

import pytest
import torch

import calm_fast
from calm_fast._ops.cross_attention.native import NATIVE_MAX_QUERIES
from calm_fast.core import native_library
from calm_fast.core.numerics import check, judge, truth_of
from calm_fast.ops import cross_attention
from calm_fast.verify.cases import op_cases
from calm_fast.verify.run import Part, cases_of

pytestmark = pytest.mark.skipif(
    native_library.obstacle("cross_attention") is not None, reason=str(native_library.obstacle("cross_attention"))
)
CASES = op_cases("cross_attention")
NATIVE_CASES = [
    case for case in cases_of(Part("cross_attention", "native", "cpu")) if case.spec.m <= NATIVE_MAX_QUERIES
]
LANES = {"scalar": 0, "avx2": 1, "avx512": 2}
CPU = torch.device("cpu")


def raw(*args, lane=-1):
    return torch.ops.calm_fast._cross_attention_native_decode(*args, lane)


def lane_missing(lane):
    try:
        raw(*tensors(), None, None, False, 1.0, lane=lane)
    except RuntimeError as problem:
        return str(problem).splitlines()[0]
    return None


def tensors(b=2, m=3, n=70, h=4, hkv=2, d=24, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d)))


def bounds(b, m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, n + 1, (b, m), generator=g, dtype=torch.int32) for _ in range(2))


def test_there_are_cases_for_it():
    assert {"decode", "decode-splits", "decode-dim256", "decode-gqa-causal"} <= {c.name for c in NATIVE_CASES}
    assert len(NATIVE_CASES) < len(CASES.cases())  # the rest: test_native_tiles.py


@pytest.mark.parametrize("case", NATIVE_CASES, ids=str)
def test_error_within_its_bound(case):
    assert [row for row in check(CASES, case, "native") if not row.ok] == []


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("case", [c for c in NATIVE_CASES if c.spec.lse and (c.spec.scale or 1) > 0], ids=str)
def test_every_lane_is_within_the_bound(case, lane):
    if why := lane_missing(LANES[lane]):
        pytest.skip(why)
    inputs = CASES.build(case, CPU)
    truth = truth_of(CASES, inputs, case.dtype)
    q, k, v = (inputs[name] for name in "qkv")
    lo, hi = (t if t is None else t.expand(q.shape[:2]).contiguous() for t in (inputs["lo"], inputs["hi"]))
    q, k, v = (t.contiguous() for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
    out, lse = raw(q, k, v, lo, hi, inputs["causal"], scale, lane=LANES[lane])
    rows = judge(case, lane, CPU, {"out": out, "lse": lse}, truth)
    assert [row for row in rows if not row.ok and row.quantity in ("out", "lse")] == []


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("d", [1, 7, 8, 16, 40, 72, 128, 200, 256])
def test_lanes_take_any_head_dim_and_gaps_between_rows(lane, d):
    if why := lane_missing(LANES[lane]):
        pytest.skip(why)
    q, k, v = tensors(d=d)
    poisoned = [torch.full((*t.shape[:3], d + 3), float("nan")) for t in (q, k, v)]
    for wide, t in zip(poisoned, (q, k, v), strict=True):
        wide[..., 1 : d + 1] = t
    got = raw(*(t[..., 1 : d + 1] for t in poisoned), None, None, True, 0.3, lane=LANES[lane])
    want = cross_attention(*(t.double() for t in (q, k, v)), causal=True, scale=0.3, return_lse=True, impl="reference")
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=0, atol=2e-5)


def test_threads_do_not_change_the_result():
    q, k, v = tensors(b=2, m=4, n=3000, h=4, hkv=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cross_attention(q, k, v, causal=True, return_lse=True, impl="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_repeats_and_batch_mates_do_not_change_a_bit():
    q, k, v = tensors(b=3, n=1500)
    lo, hi = bounds(3, 3, 1500)
    together = cross_attention(q, k, v, lo=lo, hi=hi, return_lse=True, impl="native")
    for _ in range(20):
        again = cross_attention(q, k, v, lo=lo, hi=hi, return_lse=True, impl="native")
        assert all(torch.equal(one, two) for one, two in zip(together, again, strict=True))
    for i in range(3):
        own = (t[i : i + 1] for t in (q, k, v))
        alone = cross_attention(*own, lo=lo[i : i + 1], hi=hi[i : i + 1], return_lse=True, impl="native")
        assert all(torch.equal(one[i : i + 1], two) for one, two in zip(together, alone, strict=True))


def test_nan_stays_where_it_may_be_seen():
    q, k, v = tensors(b=1, m=3, n=1100, h=2, hkv=2)
    clean = cross_attention(q, k, v, impl="native")
    row = q.clone()
    row[0, 1, 0] = float("nan")
    got = cross_attention(row, k, v, impl="native")
    assert got[0, 1, 0].isnan().all()
    got[0, 1, 0] = clean[0, 1, 0]
    assert torch.equal(got, clean)
    key = k.clone()
    key[0, 1090, 1] = float("nan")  # in the second split
    hi = torch.tensor([[1090, 1091, 5]], dtype=torch.int32)
    got, lse = cross_attention(q, key, v, hi=hi, return_lse=True, impl="native")
    assert got[0, 1, 1].isnan().all() and lse[0, 1, 1].isnan()
    assert got[0, [0, 2]].isfinite().all() and got[:, :, 0].isfinite().all()


@pytest.mark.parametrize("size", [float("-inf"), 3e38])
def test_infinite_scores_as_in_the_definition(size):
    q, k, v = (torch.ones(1, 2, 1, 8), torch.ones(1, 5, 1, 8), torch.randn(1, 5, 1, 8))
    k[0, 1:3] = size
    for bounds in ({}, {name: torch.tensor([x], dtype=torch.int32) for name, x in (("lo", [1, 1]), ("hi", [2, 5]))}):
        got, lse = cross_attention(q, k, v, **bounds, return_lse=True, impl="native")
        want, want_lse = cross_attention(q, k, v, **bounds, return_lse=True, impl="reference")
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        finite = want_lse.isfinite()
        torch.testing.assert_close(lse[finite], want_lse[finite])
        assert not lse[~finite].isfinite().any()


def test_opcheck_and_compile():
    q, k, v = (t.requires_grad_() for t in tensors())
    op = torch.ops.calm_fast.cross_attention_native_decode.default
    lo, hi = bounds(2, 3, 70)
    torch.library.opcheck(op, (q, k, v, lo, hi, False, 0.3))
    torch.library.opcheck(op, (q.detach(), k.detach(), v.detach(), None, None, True, 0.3))

    def step(q, k, v):
        return cross_attention(q, k, v, causal=True, impl="native")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (70, 71, 1100):
        inputs = [t.detach() for t in tensors(n=n)]
        torch.testing.assert_close(compiled(*inputs), step(*inputs), rtol=0, atol=0)


def test_gradients_through_a_compiled_graph_equal_eager_ones():
    inputs = [t.requires_grad_() for t in tensors(m=2, n=9)]

    def loss(q, k, v):
        out, lse = cross_attention(q, k, v, causal=True, return_lse=True, impl="native")
        return out.square().sum() + lse.sin().sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)


def test_auto_takes_it_for_few_queries():
    q, k, v = tensors()
    assert "few queries" in calm_fast.explain("cross_attention", q, k, v).reason
    assert calm_fast.explain("cross_attention", q.double(), k.double(), v.double()).impl == "torch"
    assert calm_fast.explain("cross_attention", *tensors(d=264)).impl == "torch"
    q.requires_grad_()
    assert "few queries" in calm_fast.explain("cross_attention", q, k, v).reason


@pytest.mark.parametrize("m", [1, NATIVE_MAX_QUERIES, 24])
def test_auto_and_native_give_the_same_bits(m):
    """`auto` skips the registered op if autograd records nothing; `native` never does."""
    q, k, v = tensors(m=m)
    for recorded in (False, True):
        q.requires_grad_(recorded)
        auto, native = (cross_attention(q, k, v, causal=True, impl=impl) for impl in ("auto", "native"))
        assert torch.equal(auto, native) and auto.requires_grad == recorded
    q = q.detach()
    gaps = torch.stack((k, k), -1)[..., 0]  # rows with gaps
    assert gaps.stride(-1) == 2 and torch.equal(cross_attention(q, gaps, v), cross_attention(q, k, v))


def test_autocast_is_ignored():
    q, k, v = tensors()
    plain = cross_attention(q, k, v, return_lse=True, impl="native")
    with torch.autocast("cpu", torch.bfloat16):
        cast = cross_attention(q, k, v, return_lse=True, impl="native")
    assert all(torch.equal(one, two) for one, two in zip(plain, cast, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(2, NATIVE_MAX_QUERIES + 1, 4, 24)},
            f"at most {NATIVE_MAX_QUERIES} queries, got M = {NATIVE_MAX_QUERIES + 1}",
        ),
        ({"k": torch.zeros(2, 70, 3, 24)}, "`k` must have a number of KV heads that divides the 4 heads of `q`, got 3"),
        ({"v": torch.zeros(2, 69, 2, 24)}, "`v` must have shape"),
        ({"k": torch.zeros(2, 70, 2, 24, dtype=torch.float16)}, "`k` must have shape .* q's dtype"),
        ({"q": torch.zeros(2, 3, 4, 48)[..., ::2]}, "`q` must have a contiguous last dimension"),
        ({"lo": torch.zeros(3, dtype=torch.int32)}, r"`lo` must have shape \(2, 3\), got \(3\)"),
        ({"hi": torch.zeros(2, 3)}, "`hi` must be int32, got float32"),
        ({"scale": 0.0}, "`scale` must be positive"),
        ({"lane": 9}, "`lane` must be -1 or at most .* got 9"),
    ],
)
def test_a_wrong_direct_call_is_refused_before_it_reads(change, message):
    q, k, v = tensors()
    arguments = {"q": q, "k": k, "v": v, "lo": None, "hi": None, "causal": False, "scale": 0.3, "lane": -1} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.calm_fast._cross_attention_native_decode(*arguments.values())
