"""NaN and Inf stay where they are seen: an output or gradient depends on its own interval alone, in every engine."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast._ops.cross_attention.sealed import all_finite
from calm_fast._ops.cross_attention.torch_impl import cross_attention_torch
from calm_fast.core import native_library
from calm_fast.core.dispatch import triton_obstacle
from calm_fast.ops import cross_attention

CPU = torch.device("cpu")
MISSING = {"native": native_library.obstacle("cross_attention"), "triton": triton_obstacle(CPU)}
M, N, D = 53, 75, 16


def engine(impl, m=M):
    why = MISSING.get(impl)
    name = f"{impl}-{m}"
    return pytest.param(impl, m, id=name, marks=[pytest.mark.skipif(why is not None, reason=str(why))])


# few queries, whose kernels are others, and many; the interpreter is slow
ENGINES = [engine(impl, m) for impl in ("reference", "torch", "native") for m in (9, M)]
ENGINES += [engine("triton", 9), engine("triton", 34)]


def causal(m):
    return {"causal": True}


def causal_more_queries(m):
    """The first rows see nothing."""
    return {"causal": True, "n": m // 2}


def hi(m):
    return {"hi": (torch.arange(m) * N // m).int()}


def lo_and_hi(m):
    """A window, behind two rows that see nothing."""
    ends = 30 + torch.arange(m) * (N - 30) // m
    ends[:2] = 0
    return {"lo": (ends - 27).clamp(min=0).int(), "hi": ends.int()}


def padding(m):
    """Every other row sees all keys, the rest none."""
    return {"hi": torch.where(torch.arange(m) % 2 == 0, N, 0).int()}


def unwritten_end(m):
    """Nobody sees the end of the buffer."""
    return {"hi": torch.full((m,), 37, dtype=torch.int32)}


MASKS = [causal, causal_more_queries, hi, lo_and_hi, padding, unwritten_end]


def intervals(options, m, n):
    """Return lo and hi of every row as numbers."""
    if options.get("causal"):
        return [0] * m, [min(max(i + 1 + n - m, 0), n) for i in range(m)]
    low = options["lo"].tolist() if "lo" in options else [0] * m
    return low, options["hi"].tolist()


def by_rows(q, k, v, low, high):
    """Attend row by row to the slice of keys that the row sees."""
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    outs, lses = [], []
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        if a >= b:
            outs.append(torch.zeros_like(q[:, i]))
            lses.append(torch.full_like(q[:, i, :, 0], -math.inf))
            continue
        scores = torch.einsum("bhd,bnhd->bhn", q[:, i], k[:, a:b]) * D**-0.5
        outs.append(torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), v[:, a:b]))
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(lses, 2)


def gradients(call, leaves, upstream):
    results = call(*leaves)
    grads = torch.autograd.grad(results, leaves, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])
    return [t.detach().double() for t in (*results, *grads)]


def public(impl, lse=True):
    """Return a function of (q, k, v, options, upstream) that runs the public op and its gradients."""

    def run(q, k, v, options, upstream):
        def op(q, k, v):
            result = cross_attention(q, k, v, **options, impl=impl, return_lse=lse)
            return result if lse else (result,)

        return gradients(op, [t.clone().requires_grad_() for t in (q, k, v)], upstream[: 1 + lse])

    return run


def tiles(lane):
    """Return such a function of the compiled tiles in one SIMD lane."""

    def run(q, k, v, options, upstream):
        ops = torch.ops.calm_fast
        bounds = [None if t is None else t[None].contiguous() for t in (options.get("lo"), options.get("hi"))]
        rest = (*bounds, options.get("causal", False), D**-0.5, lane)
        out, lse = ops._cross_attention_native_fwd(q, k, v, *rest)
        return [t.double() for t in (out, lse, *ops._cross_attention_native_bwd(*upstream, q, k, v, out, lse, *rest))]

    return run


@functools.cache
def problem(m, mask, place, bad, lse):
    """Return inputs with `bad` in a place of the tensor `place` that is seen, the results by rows, and what it reaches.

    Whatever nobody sees holds `bad` too.
    """
    options = mask(m)
    n = options.pop("n", m if options.get("causal") else N)
    low, high = intervals(options, m, n)
    g = torch.Generator().manual_seed(0)
    shapes = ((1, m, 2, D), (1, n, 1, D), (1, n, 1, D), (1, m, 2, D))
    q, k, v, dout = (torch.randn(shape, generator=g) for shape in shapes)
    dlse = torch.randn(1, 2, m, generator=g)
    seen = torch.tensor([[a <= j < b for j in range(n)] for a, b in zip(low, high, strict=True)])
    if place in ("q", "dout"):
        for t in (q, dout, dlse.transpose(1, 2)):
            t[:, ~seen.any(1)] = bad
        {"q": q, "dout": dout}[place][:, m // 3 * 2, :, 3] = bad
    else:
        for t in (k, v):
            t[:, ~seen.any(0)] = bad
        {"k": k, "v": v}[place][:, n // 3, :, 5] = bad
    doubles = [t.double().requires_grad_() for t in (q, k, v)]
    want = gradients(lambda *t: by_rows(*t, low, high)[: 1 + lse], doubles, (dout, dlse)[: 1 + lse])

    bad_keys, bad_rows, bad_grads = (~t.isfinite().flatten(2).all(-1)[0] for t in (torch.cat((k, v), -1), q, dout))
    hit = seen.any(1) & ((seen & bad_keys).any(1) | bad_rows)
    hit_back = hit | (seen.any(1) & bad_grads)
    hit_keys = (seen & hit_back[:, None]).any(0)
    names = ("out", "lse", "dq", "dk", "dv") if lse else ("out", "dq", "dk", "dv")
    reached = {"out": hit, "lse": hit, "dq": hit_back, "dk": hit_keys, "dv": hit_keys}
    return (q, k, v), options, (dout, dlse), {name: (w, reached[name]) for name, w in zip(names, want, strict=True)}


def check(run, *args, lse=True):
    """Compare `run` with attention by rows: rows and keys that see nothing bad are right, the others not finite."""
    inputs, options, upstream, want = problem(*args, lse)
    for one, (name, (two, dirty)) in zip(run(*inputs, options, upstream), want.items(), strict=True):
        one, two = (t.movedim(2 if name == "lse" else 1, 0) for t in (one, two))
        torch.testing.assert_close(
            one[~dirty], two[~dirty], rtol=2e-4, atol=2e-5, msg=lambda s, n=name: f"{args} {n}: {s}"
        )
        lost = one[dirty].isfinite() & ~two[dirty].isfinite()
        if name == "dq":  # a key of score -inf has weight 0: whether 0 * Inf reaches dq depends on the tile
            lost &= ~(want["out"][0] * upstream[0]).movedim(1, 0)[dirty].isfinite().all(-1, keepdim=True)
        assert not bool(lost.any()), f"{args} {name}: {int(lost.sum())} numbers are finite and should not be"


BAD = (math.nan, math.inf, -math.inf)
PLACES = pytest.mark.parametrize("place", ["k", "v", "q", "dout"])
ANY_MASK = pytest.mark.parametrize("mask", MASKS, ids=lambda f: f.__name__)
NATIVE = pytest.mark.skipif(MISSING["native"] is not None, reason=str(MISSING["native"]))


@ANY_MASK
@pytest.mark.parametrize(("impl", "m"), ENGINES)
@PLACES
def test_only_rows_and_keys_that_see_it(impl, m, mask, place):
    few = {"v": math.nan, "q": math.nan, "k": math.inf, "dout": -math.inf}[place]  # the interpreter is slow
    for bad in (few,) if impl == "triton" else BAD:
        check(public(impl), m, mask, place, bad)
        if impl == "torch":  # another path
            check(public(impl, lse=False), m, mask, place, bad, lse=False)


@NATIVE
@ANY_MASK
@PLACES
def test_every_lane_of_the_tiles(mask, place):
    for bad in BAD:
        for lane in lanes():
            check(tiles(lane), M, mask, place, bad)


def lanes():
    found = []
    for lane in range(3):
        try:
            tiles(lane)(*torch.zeros(3, 1, 1, 4, D), {}, (torch.zeros(1, 1, 4, D), torch.zeros(1, 4, 1)))
        except RuntimeError:  # a CPU without it
            continue
        found.append(lane)
    assert found
    return found


@NATIVE
@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, -1])
def test_a_nan_of_any_bits_stays_one(bits):
    """The exponential adds to the exponent of its result: what is NaN by its lowest bits must not become a number."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for lane in lanes():
        for place in range(3):
            q, k, v = torch.randn(3, 1, 50, 4, D)
            (q, k, v)[place][0, 20] = nan
            upstream = torch.randn(1, 50, 4, D), torch.randn(1, 4, 50)
            out, *_, dv = tiles(lane)(q, k, v, {}, upstream)
            assert bool(out[0, 20].isnan().all()) and (place == 0 or bool(out.isnan().all()))
            assert place == 2 or bool(dv.isnan().all())
            found = torch.ops.calm_fast._cross_attention_native_decode(q[:, 20:21], k, v, None, None, False, 1.0, lane)
            assert bool(found[0].isnan().all())


def wild_bounds(m):
    """Return lo and hi that no check would let through: negative, beyond N, and lo above hi."""
    g = torch.Generator().manual_seed(m)
    lo, hi = (torch.randint(-2 * N, 3 * N, (1, m), generator=g, dtype=torch.int32) for _ in range(2))
    lo[0, 0], hi[0, 0], lo[0, 1], hi[0, 1] = -(2**31), 2**31 - 1, 2**31 - 1, -(2**31)
    return lo, hi


@pytest.mark.parametrize("op", ["native_decode", "native_fwd", "triton_fwd"])
@pytest.mark.parametrize("m", [9, 34])
def test_bounds_that_nobody_checked_are_clamped(op, m):
    """In a graph and on a GPU no value is checked: a kernel must not read outside k and v, forward or backward."""
    if why := MISSING[op.split("_")[0]]:
        pytest.skip(str(why))
    if op == "native_decode" and m > 16:
        pytest.skip("at most 16 queries")
    q, k, v, dout = (torch.randn(1, n, h, D) for n, h in ((m, 2), (N, 1), (N, 1), (m, 2)))
    lo, hi = wild_bounds(m)
    call = getattr(torch.ops.calm_fast, f"cross_attention_{op}")
    back = getattr(torch.ops.calm_fast, f"cross_attention_{op.split('_')[0]}_bwd")
    results = []
    for bounds in ((lo, hi), (lo.clamp(0, N), hi.clamp(0, N))):
        out, lse = call(q, k, v, *bounds, False, 0.3)
        results.append((out, lse, *back(dout, torch.ones_like(lse), q, k, v, out, lse, *bounds, False, 0.3)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert all(bool(t.isfinite().all()) for t in (results[0][0], *results[0][2:]))


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("m", [9, 34])
def test_torch_clamps_bounds_too(m, lse):
    q, k, v = torch.randn(1, m, 2, D), torch.randn(1, N, 1, D), torch.randn(1, N, 1, D)
    lo, hi = wild_bounds(m)
    want = cross_attention_reference(q, k, v, lo.clamp(0, N), hi.clamp(0, N), False, 0.3)
    torch.testing.assert_close(cross_attention_reference(q, k, v, lo, hi, False, 0.3), want, rtol=0, atol=0)
    found = cross_attention_torch(q, k, v, lo, hi, False, 0.3, lse)
    torch.testing.assert_close(found[: 1 + lse], want[: 1 + lse], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_finite_sees_every_number(dtype):
    good = torch.full((3, 70_000), 5.0, dtype=dtype)  # their sum does not fit float16
    assert all_finite(good, good) and all_finite(good[:0])
    for bad in (float("nan"), float("inf"), float("-inf")):
        one = good.clone()
        one[1, 7] = bad
        assert not all_finite(good, one) and not all_finite(one, good)
    both = good.clone()
    both[0, 0], both[0, 1] = float("inf"), float("-inf")
    assert not all_finite(both)
