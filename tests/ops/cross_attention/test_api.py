"""cross_attention: the definition against plain loops, the torch implementation against float64, and its promises."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

import calm_fast
from calm_fast.core.numerics import check, unit_roundoff
from calm_fast.ops import cross_attention
from calm_fast.verify.cases import op_cases

API = importlib.import_module("calm_fast._ops.cross_attention.api")
CASES = op_cases("cross_attention")
PLAIN = ("reference", "torch")


def tensors(b=2, m=5, n=7, h=4, hkv=2, d=8, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(3)
    shapes = ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def ints(*rows):
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.int32)


def by_hand(q, k, v, lo, hi, scale):
    """The definition in plain Python floats: for every batch, head and query, a sum over the keys it sees."""
    (b, m, h, d), (n, hkv) = q.shape, k.shape[1:3]
    Q, K, V = q.tolist(), k.tolist(), v.tolist()
    out, lse = torch.zeros(b, m, h, d, dtype=torch.float64), torch.zeros(b, h, m, dtype=torch.float64)
    for x in range(b):
        for y in range(h):
            z = y // (h // hkv)
            for i in range(m):
                keys = [j for j in range(n) if lo[x][i] <= j < hi[x][i]]
                scores = [scale * sum(Q[x][i][y][c] * K[x][j][z][c] for c in range(d)) for j in keys]
                if not keys:
                    lse[x, y, i] = -math.inf
                    continue
                top = max(scores)
                total = math.fsum(math.exp(s - top) for s in scores)
                lse[x, y, i] = top + math.log(total)
                for c in range(d):
                    weighted = (math.exp(s - top) * V[x][j][z][c] for s, j in zip(scores, keys, strict=True))
                    out[x, i, y, c] = math.fsum(weighted) / total
    return out, lse


MASKS = {
    "full": ({}, lambda i, m, n: (0, n)),
    "causal": ({"causal": True}, lambda i, m, n: (0, min(max(i + 1 + n - m, 0), n))),
    "lo": ({"lo": ints(0, 2, 7, 1, 5)}, lambda i, m, n: ((0, 2, 7, 1, 5)[i], n)),
    "hi": ({"hi": ints(3, 0, 7, 1, 5)}, lambda i, m, n: (0, (3, 0, 7, 1, 5)[i])),
    "both": (
        {"lo": ints(2, 5, 0, 3, 6), "hi": ints(4, 2, 7, 3, 7)},
        lambda i, m, n: ((2, 5, 0, 3, 6)[i], (4, 2, 7, 3, 7)[i]),
    ),
}


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("scale", [None, 0.7, -0.4, 0.0])
@pytest.mark.parametrize("mask", MASKS)
def test_definition_matches_plain_loops(mask, scale, impl):
    q, k, v = tensors()
    options, interval = MASKS[mask]
    bounds = [interval(i, 5, 7) for i in range(5)]
    lo, hi = ([[pair[side] for pair in bounds]] * 2 for side in (0, 1))
    out, lse = by_hand(q, k, v, lo, hi, 8**-0.5 if scale is None else scale)
    got, got_lse = cross_attention(q, k, v, **options, scale=scale, return_lse=True, impl=impl)
    torch.testing.assert_close(got, out, rtol=0, atol=1e-13)
    torch.testing.assert_close(got_lse, lse, rtol=0, atol=1e-13)
    alone = cross_attention(q, k, v, **options, scale=scale, impl=impl)  # without lse torch takes SDPA
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("m", "n"), [(3, 7), (7, 3), (5, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("impl", PLAIN)
def test_causal_aligns_the_last_query_with_the_last_key(m, n, impl):
    q, k, v = tensors(m=m, n=n)
    hi = [[min(max(i + 1 + n - m, 0), n) for i in range(m)]] * 2
    out, lse = by_hand(q, k, v, [[0] * m] * 2, hi, 8**-0.5)
    got, got_lse = cross_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    torch.testing.assert_close(got, out, rtol=0, atol=1e-13)
    torch.testing.assert_close(got_lse, lse, rtol=0, atol=1e-13)
    torch.testing.assert_close(cross_attention(q, k, v, causal=True, impl=impl), out, rtol=0, atol=1e-13)
    intervals = cross_attention(q, k, v, hi=ints(hi[0]), impl=impl)
    torch.testing.assert_close(intervals, out, rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_torch_within_bounds_of_float64(case):
    wrong = [row for row in check(CASES, case, "torch") if not row.ok]
    assert not wrong, wrong


# ---- the dense-mask-free path ---------------------------------------------------------------------------------------


@pytest.fixture
def sdpa_calls(monkeypatch):
    """The keyword arguments of every call of scaled_dot_product_attention."""
    calls, true = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return true(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


SQUARE = torch.arange(1, 6, dtype=torch.int32)
PLAINLY = {
    "nothing": (5, 7, {}, False),
    "lo zero": (5, 7, {"lo": torch.zeros(5, dtype=torch.int32)}, False),
    "hi n": (5, 7, {"hi": torch.full((2, 5), 7, dtype=torch.int32)}, False),
    "hi n expanded": (5, 7, {"hi": ints([7]).expand(2, 5), "lo": ints([0]).expand(2, 5)}, False),
    "causal flag": (5, 5, {"causal": True}, True),
    "causal hi": (5, 5, {"hi": SQUARE}, True),
    "causal hi per batch": (5, 5, {"hi": SQUARE.repeat(2, 1), "lo": torch.zeros(2, 5, dtype=torch.int32)}, True),
    "one query": (1, 7, {"causal": True}, False),
}


@pytest.mark.parametrize("name", PLAINLY)
def test_plain_intervals_need_no_mask(name, sdpa_calls):
    m, n, options, causal = PLAINLY[name]
    q, k, v = tensors(m=m, n=n)
    out = cross_attention(q, k, v, **options, impl="torch")
    assert [(c.get("attn_mask"), c.get("is_causal", False)) for c in sdpa_calls] == [(None, causal)]
    torch.testing.assert_close(out, cross_attention(q, k, v, **options, impl="reference"), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [{"hi": SQUARE - 1}, {"hi": SQUARE, "lo": SQUARE // 3}, {"hi": ints([1, 2, 3, 4, 5], [1, 2, 3, 4, 4])}],
    ids=["shifted", "window", "one row differs"],
)
def test_nearly_causal_intervals_keep_their_mask(options, sdpa_calls):
    q, k, v = tensors(m=5, n=5)
    out = cross_attention(q, k, v, **options, impl="torch")
    assert len(sdpa_calls) == 1 and sdpa_calls[0]["attn_mask"] is not None
    torch.testing.assert_close(out, cross_attention(q, k, v, **options, impl="reference"), rtol=0, atol=1e-13)


# ---- rows that see no key, NaN, empty tensors ----------------------------------------------------------------------

EMPTY_ROWS = {"lo": ints([0, 4, 7, 2, 0], [7, 0, 0, 0, 7]), "hi": ints([0, 2, 7, 5, 7], [7, 7, 0, 1, 0])}
IS_EMPTY = torch.tensor([[True, True, True, False, False], [True, False, True, False, True]])


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("through", ["out", "lse", "both"])
def test_empty_rows_are_zero_with_zero_gradients(impl, dtype, through):
    q, k, v = tensors(dtype=dtype, grad=True)
    result = cross_attention(q, k, v, **EMPTY_ROWS, return_lse=through != "out", impl=impl)
    out, lse = result if through != "out" else (result, None)
    assert (out[IS_EMPTY] == 0).all() and not (out[~IS_EMPTY] == 0).any()
    if lse is not None:
        assert torch.equal(lse == -math.inf, IS_EMPTY.unsqueeze(1).expand_as(lse))
    results = {"out": [out], "lse": [lse], "both": [out, lse]}[through]
    # allow_unused: v has no part in lse
    grads = torch.autograd.grad(results, (q, k, v), [torch.randn_like(r) for r in results], allow_unused=True)
    for name, grad in zip("qkv", grads, strict=True):
        assert (grad is not None) or (name == "v" and through == "lse")
        assert grad is None or grad.isfinite().all(), name
    assert (grads[0][IS_EMPTY] == 0).all() and (grads[0][~IS_EMPTY] != 0).any()


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("return_lse", [False, True])
def test_all_rows_empty(impl, return_lse):
    q, k, v = tensors(grad=True)
    result = cross_attention(q, k, v, hi=torch.zeros(5, dtype=torch.int32), return_lse=return_lse, impl=impl)
    out = result[0] if return_lse else result
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("options", [{}, EMPTY_ROWS], ids=["full", "intervals"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_nan_query_stays_in_its_row(impl, options, return_lse):
    q, k, v = tensors(dtype=torch.float32)
    clean = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
    q[0, 3, 1] = math.nan  # a row that sees keys in both cases
    q[0, 1, 2] = math.nan  # an empty row with the intervals
    got = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
    clean, got = (x[0] if return_lse else x for x in (clean, got))
    # without a mask torch's SDPA on a CPU takes a NaN row for one that sees no key and returns 0
    lost = impl == "torch" and not return_lse and not options
    assert (got[0, 3, 1] == 0).all() if lost else got[0, 3, 1].isnan().all()
    assert (got[0, 1, 2] == 0).all() if options or lost else got[0, 1, 2].isnan().all()
    others = torch.ones(got.shape[:3], dtype=torch.bool)
    others[0, 3, 1] = others[0, 1, 2] = False
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("b", "m", "n"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("bounds", [None, "causal", "intervals"])
def test_empty_tensors(impl, return_lse, b, m, n, bounds):
    q, k, v = tensors(b, m, n, dtype=torch.float32, grad=True)
    options = {None: {}, "causal": {"causal": True}}.get(bounds)
    if options is None:
        options = {"lo": torch.zeros(m, dtype=torch.int32), "hi": torch.zeros(b, m, dtype=torch.int32)}
    result = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
    out, lse = result if return_lse else (result, None)
    assert out.shape == (b, m, 4, 8) and torch.equal(out, torch.zeros_like(out))
    results = [out] if lse is None else [out, lse]
    if lse is not None:
        assert lse.shape == (b, 4, m) and lse.dtype == torch.float32 and (lse == -math.inf).all()
    for grad in torch.autograd.grad(results, (q, k, v), [torch.ones_like(r) for r in results]):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 7])
@pytest.mark.parametrize("impl", PLAIN)
def test_result_dtypes(impl, n, dtype):
    q, k, v = tensors(n=n, dtype=dtype)
    out, lse = cross_attention(q, k, v, return_lse=True, impl=impl)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"hi": torch.tensor([0, 2, 7, 1, 4], dtype=torch.int32)}])
@pytest.mark.parametrize("return_lse", [False, True])
def test_autocast_is_ignored(impl, options, return_lse):
    q, k, v = tensors(dtype=torch.float32)
    want = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
    for a, b in zip(*((r if return_lse else (r,)) for r in (got, want)), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# ---- strides, bounds of every legal form, invariances ---------------------------------------------------------------


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("return_lse", [False, True])
def test_strided_inputs_equal_contiguous_ones(impl, return_lse):
    q, k, v = tensors(h=4, hkv=4)
    kv = torch.cat([k, v], dim=-1)
    views = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        kv[..., :8],
        v[:, :1].expand(2, 7, 4, 8),  # every key has the same value
    )
    dense = [t.contiguous() for t in views]
    hi = ints([7, 1, 3, 7, 2])
    options = {"hi": hi.repeat(2)[::2].clone().repeat_interleave(2)[::2], "return_lse": return_lse, "impl": impl}
    results = [cross_attention(*x, **options) for x in (views, dense)]
    for one, two in zip(*((r if return_lse else (r,)) for r in results), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", PLAIN)
def test_bounds_of_every_shape_agree(impl):
    q, k, v = tensors()
    lo, hi = ints([0, 1, 2, 3, 0]), ints([7, 4, 2, 7, 5])
    forms = {
        "(M,)": (lo, hi),
        "(B, M)": (lo.repeat(2, 1), hi.repeat(2, 1)),
        "expanded": (lo.expand(2, 5), hi.expand(2, 5)),
        "mixed": (lo, hi.repeat(2, 1)),
        "transposed": (lo.repeat(2, 1).T.contiguous().T, hi.expand(2, 5)),
    }
    for return_lse in (False, True):
        got = {n: cross_attention(q, k, v, lo=a, hi=b, return_lse=return_lse, impl=impl) for n, (a, b) in forms.items()}
        for name, result in got.items():
            for one, two in zip(*((r if return_lse else (r,)) for r in (result, got["(M,)"])), strict=True):
                assert torch.equal(one, two), name


@pytest.mark.parametrize("impl", PLAIN)
def test_padding_keys_change_nothing(impl):
    q, k, v = tensors(grad=True)
    hi = ints([7, 4, 2, 7, 0])
    garbage = torch.full((2, 3, 2, 8), 1e4, dtype=torch.float64)
    padded = [torch.cat([garbage, t, garbage], dim=1) for t in (k, v)]
    plain = cross_attention(q, k, v, hi=hi, return_lse=True, impl=impl)
    wide = cross_attention(q, *padded, lo=torch.full((5,), 3, dtype=torch.int32), hi=hi + 3, return_lse=True, impl=impl)
    for one, two in zip(plain, wide, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-13)
    upstream = torch.randn_like(plain[0])
    grads = [torch.autograd.grad(r[0], (q, k, v), upstream) for r in (plain, wide)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", PLAIN)
def test_batch_elements_are_independent(impl):
    q, k, v = tensors(b=3)
    bounds = {"lo": ints([0, 1, 2, 3, 0], [0] * 5, [2] * 5), "hi": ints([7, 4, 2, 7, 5], [7] * 5, [0, 3, 7, 7, 1])}
    together = cross_attention(q, k, v, **bounds, impl=impl)
    for i in range(3):
        own = {name: t[i : i + 1] for name, t in bounds.items()}
        alone = cross_attention(*(t[i : i + 1] for t in (q, k, v)), **own, impl=impl)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-13)


def test_long_rows_cross_the_row_blocks_of_the_lse_path():
    """More queries than the explicit path takes at once, so that its blocks meet their own mask rows."""
    q, k, v = tensors(b=1, m=600, n=40, h=2, d=4)
    hi = (torch.arange(600) * 40 // 599).int()
    got = cross_attention(q, k, v, hi=hi, return_lse=True, impl="torch")
    for one, two in zip(got, cross_attention(q, k, v, hi=hi, return_lse=True, impl="reference"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


# ---- derivatives ----------------------------------------------------------------------------------------------------


def finite(result):
    """Return the result with 0 for lse = -inf: numerical differences of infinities are undefined."""
    out, lse = result
    return out, torch.where(lse.isfinite(), lse, 0.0)


@pytest.mark.parametrize("impl", PLAIN)
@pytest.mark.parametrize("mask", ["full", "causal", "both"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradcheck(impl, mask, return_lse):
    q, k, v = tensors(b=1, h=2, hkv=1, d=3, grad=True)
    options = MASKS[mask][0]

    def call(q, k, v):
        result = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
        return finite(result) if return_lse else result

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize("mask", ["full", "causal", "both"])
@pytest.mark.parametrize(("impl", "return_lse"), [("reference", False), ("reference", True), ("torch", True)])
def test_double_backward(impl, mask, return_lse):
    q, k, v = tensors(b=1, m=5, n=7, h=1, hkv=1, d=2, grad=True)
    options = MASKS[mask][0]

    def call(q, k, v):
        result = cross_attention(q, k, v, **options, return_lse=return_lse, impl=impl)
        return finite(result) if return_lse else result

    assert torch.autograd.gradgradcheck(call, (q, k, v))


# ---- dispatch -------------------------------------------------------------------------------------------------------


def test_explain_says_what_auto_does_and_why():
    q, k, v = tensors()  # float64
    decision = calm_fast.explain("cross_attention", q, k, v, causal=True)
    assert decision.impl == "torch" and "CPU" in decision.reason and "float64" in decision.reason
    assert str(decision).startswith("cross_attention: torch (")
    assert calm_fast.explain("cross_attention", q, k, v, impl="reference").impl == "reference"
    with pytest.raises(ValueError, match="`op` must be one of 'cross_attention'"):
        calm_fast.explain("attention", q, k, v)
    with pytest.raises(ValueError, match="`k` must be"):
        calm_fast.explain("cross_attention", q, k[..., :3], v)


@pytest.mark.parametrize("impl", PLAIN)
def test_explicit_impl_runs_that_one(impl, monkeypatch):
    ran = []
    for name in PLAIN:
        true = getattr(API, f"cross_attention_{name}")
        spy = lambda *a, _name=name, _true=true: ran.append(_name) or _true(*a)  # noqa: E731
        monkeypatch.setattr(API, f"cross_attention_{name}", spy)
    cross_attention(*tensors(), impl=impl)
    assert ran == [impl]


def refusals(monkeypatch):
    q, k, v = tensors(dtype=torch.float32)
    double, wide = tensors(), tensors(d=260, dtype=torch.float32)
    yield "native", tensors(d=257, dtype=torch.float32), "head dim 257 is larger than 256"
    yield "native", tensors(), "compiled library computes in float32"
    yield "triton", double, "q is float64"
    yield "triton", wide, "head dim 260 is larger than 256"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    yield "triton", (q, k, v), "CPU tensors need TRITON_INTERPRET=1"


def test_impl_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    def forbidden(*args):
        raise AssertionError("another implementation ran instead")

    for name in ("cross_attention_reference", "cross_attention_torch"):
        monkeypatch.setattr(API, name, forbidden)
    for impl, args, why in refusals(monkeypatch):
        for call in (cross_attention, lambda *a, **kw: calm_fast.explain("cross_attention", *a, **kw)):
            with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot run here: .*{why}"):
                call(*args, impl=impl)


def test_values_on_other_devices_are_read_only_within_validate_values(monkeypatch):
    """A CPU tensor stands in for one on a GPU: `readable` returns False for it."""
    q, k, v = tensors(dtype=torch.float32)
    validate = importlib.import_module("calm_fast.core.checks")
    monkeypatch.setattr(validate, "readable", lambda tensor: False)
    bad = torch.full((5,), 8, dtype=torch.int32)
    cross_attention(q, k, v, hi=bad, impl="reference")  # not read: no error
    with pytest.raises(ValueError, match=r"`hi` must be within 0 and N = 7, got values from 8 to 8"):
        with calm_fast.validate_values():
            cross_attention(q, k, v, hi=bad, impl="reference")
    cross_attention(q, k, v, hi=bad, impl="reference")  # an exception ends the block too


def test_float32_is_ieee_by_default():
    """Not TF32: its 10-bit operands would miss by about 1e-4."""
    q, k, v = tensors(m=64, n=64, d=64, dtype=torch.float32)
    truth = cross_attention(*(t.double() for t in (q, k, v)), impl="reference")
    got = cross_attention(q, k, v, impl="torch")
    assert float((got - truth).abs().max()) < 100 * unit_roundoff(torch.float32)


def test_a_costly_fallback_warns_once(monkeypatch) -> None:
    dispatch = importlib.import_module("calm_fast.core.dispatch")
    decision = dispatch.Decision("cross_attention", "torch", "Triton cannot run: not installed", costly=True)
    monkeypatch.setattr(API, "decide", lambda *a, **k: decision)
    monkeypatch.setattr(API, "_DECISIONS", dispatch.DecisionCache())
    dispatch.warn_once.cache_clear()
    q = torch.randn(1, 3, 1, 4)
    with pytest.warns(UserWarning, match="Triton cannot run: not installed.*slow") as caught:
        cross_attention(q, q, q)
        cross_attention(q, q, q)
    assert len(caught) == 1
