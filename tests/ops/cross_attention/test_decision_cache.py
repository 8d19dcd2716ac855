"""The cache of decisions: it equals `decide`, notices every change of its conditions, and stays bounded."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from calm_fast._ops.cross_attention import native
from calm_fast.core import native_library
from calm_fast.core.dispatch import Decision, DecisionCache
from calm_fast.ops import cross_attention

API = importlib.import_module("calm_fast._ops.cross_attention.api")
M = native.NATIVE_MAX_QUERIES


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    """An empty cache, the limit of keys within reach."""
    fresh = DecisionCache()
    monkeypatch.setattr(API, "_DECISIONS", fresh)
    monkeypatch.setattr(native, "MAX_KEYS", 40)
    return fresh


@pytest.fixture
def asked(monkeypatch):
    """The calls of `decide`."""
    calls, true = [], API.decide

    def spy(*args, **kwargs):
        calls.append(kwargs)
        return true(*args, **kwargs)

    monkeypatch.setattr(API, "decide", spy)
    return calls


def tensors(b=1, m=3, n=9, h=2, hkv=1, d=8, dtype=torch.float32):
    return tuple(torch.randn(s).to(dtype) for s in ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d)))


def outcome(call):
    """The result, or the error as text."""
    try:
        return call()
    except (TypeError, ValueError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"


def agree(cache, q, k, v, causal=False, return_lse=False):
    """Assert that the decision stored for a call equals `decide`; return the decision, or the error as text."""
    options = {"causal": causal, "return_lse": return_lse}
    wanted = outcome(lambda: API.decide(q, k, v, **options))
    ran = outcome(lambda: cross_attention(q, k, v, **options))
    signature = outcome(lambda: API._signature(q, k, v, causal, return_lse))
    if isinstance(signature, tuple):
        assert cache.get(signature) == (wanted if isinstance(wanted, Decision) else None)
    if not isinstance(wanted, Decision):
        assert ran == wanted
    return wanted


SIZES = list(itertools.product((1, 2), (1, M, M + 1), (0, 9, 40, 41), (2, 4), (1, 2, 3), (1, 8, 256, 257)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wide_grid_of_sizes(dtype, cache):
    """The cache is shared by the whole grid, so that a signature that lacks something would answer wrongly."""
    seen = set()
    for i, (b, m, n, h, hkv, d) in enumerate(SIZES):
        q, k, v = (t.to(dtype) for t in tensors(b, m, n, h, hkv, d))
        found = agree(cache, q, k, v, causal=i % 2 == 0, return_lse=i % 3 == 0)
        seen.add(found.impl if isinstance(found, Decision) else found.split(":")[0])
        assert len(cache) <= cache.limit
    assert seen == {"TypeError"} if dtype == torch.int32 else seen >= {"torch", "ValueError"}


def test_tensors_that_do_not_fit(cache):
    """Each one after the good call whose signature it must not share."""
    q, k, v = tensors(b=2, h=4, hkv=2)
    wrong = [
        (q[:1], k, v), (q, k[:1], v[:1]), (q, k[:1], v), (q, k, v[:1]),
        (q, k, v[:, 1:]), (q, k, v[:, :, :1]), (q, k, v[..., :4]),
        (q, k[..., :4], v[..., :4]), (q[..., :4], k, v), (q[0], k, v), (q, k[0], v), (q, k, v[0]), (q[None], k, v),
        (q.double(), k, v), (q, k.double(), v), (q, k, v.double()), (q.int(), k, v),
        (q.to_sparse(), k, v), (q, k.to_sparse(), v), (q, k, v.to_sparse()),
        (q.to("meta"), k, v), (q, k.to("meta"), v), (q, k, v.to("meta")),
        (None, k, v), (q, [1.0], v), (q, k, 3),
    ]  # fmt: skip
    for arguments in wrong:
        assert isinstance(agree(cache, q, k, v), Decision)
        assert isinstance(agree(cache, *arguments), str)


@pytest.mark.parametrize("flag", [1, 0, None, 1.0, "yes"])
def test_flags_equal_to_a_bool_are_no_bool(flag, cache):
    """1 == True and their hashes are the same."""
    q, k, v = tensors()
    for good in (True, False):
        assert isinstance(agree(cache, q, k, v, causal=good, return_lse=good), Decision)
    assert agree(cache, q, k, v, causal=flag).startswith("TypeError: cross_attention: `causal` must be True or False")
    assert agree(cache, q, k, v, return_lse=flag).startswith("TypeError: cross_attention: `return_lse` must be True")


def test_equal_calls_decide_once(asked):
    q, k, v = tensors()
    for n in (9, 4, 1, 9):  # decode steps differ in N alone
        for grad in (False, True):
            cross_attention(q.requires_grad_(grad), k[:, :n], v[:, :n], causal=True)
    assert len(asked) == 2, "once with gradients, once without"
    cross_attention(q, k, v, causal=True, impl="torch")
    cross_attention(q, k, v, scale=0.5)
    cross_attention(q, k, v, hi=torch.full((3,), 9, dtype=torch.int32))
    assert len(asked) == 5, "with more arguments every call is checked"


def test_strides_autocast_and_modes_change_no_decision(cache):
    q, k, v = tensors(hkv=2)
    want = agree(cache, q, k, v)
    gaps = torch.stack((k, k), -1)[..., 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert agree(cache, q, k, v) == want
    with torch.inference_mode():
        assert agree(cache, q, k, v) == want
    assert agree(cache, q.mT.contiguous().mT, gaps, v) == want


@pytest.mark.parametrize("m", [3, M + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_transforms_are_seen_after_a_plain_call(m, dtype, cache):
    q, k, v = tensors(m=m, dtype=dtype)
    agree(cache, q, k, v)
    count, inside = len(cache), []

    def look(q):
        inside.append(API.decide(q, k, v).impl)
        inside.append(API.decide(torch.ones_like(k[:, :1]), k, v).impl)  # a tensor that the transform does not track
        assert API._signature(k, k, v, False, False) is None
        return cross_attention(q, k, v, return_lse=True)[0].square().sum()

    found = torch.func.grad(look)(q)
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(cross_attention(leaf, k, v, impl="reference").square().sum(), leaf)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    torch.func.vmap(look)(torch.stack((q, q)))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        assert API.decide(dual, k, v).impl == "torch" and API._signature(q, k, v, False, False) is None
        tangent = forward_ad.unpack_dual(cross_attention(dual, k, v, return_lse=True)[0]).tangent
    plain = cross_attention(q.double(), k.double(), v.double(), impl="reference")
    assert tangent is not None and tangent.shape == plain.shape
    assert set(inside) == {"torch"} and len(cache) == count


def test_fake_tensors_parameters_and_subclasses_bypass_the_cache(cache, asked):
    class Other(torch.Tensor):
        pass

    q, k, v = tensors()
    cross_attention(q, k, v)
    for t in (torch.nn.Parameter(q), q.as_subclass(Other)):
        cross_attention(t, k, v)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (q, k, v)]
        assert cross_attention(*fake).shape == q.shape
    assert len(asked) == 4 and len(cache) == 1


def test_a_compiled_call_uses_no_cache(cache):
    compiled = torch.compile(cross_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9, 12):
        q, k, v = tensors(n=n)
        assert torch.equal(compiled(q, k, v, causal=True), cross_attention(q, k, v, causal=True, impl="auto"))
        cache.clear()
        compiled(q, k, v, causal=True)
        assert not cache


@pytest.mark.parametrize("m", [3, 24])
def test_a_library_that_goes_or_comes_back_is_noticed(m, cache, monkeypatch):
    q, k, v = tensors(m=m)
    before = agree(cache, q, k, v)
    with monkeypatch.context() as changed:
        changed.setattr(native_library, "obstacle", lambda op, device="cpu": "it was taken away")
        assert agree(cache, q, k, v) == Decision(
            "cross_attention", "torch", "CPU tensors: torch's SDPA is the fast path (it was taken away)"
        )
    assert agree(cache, q, k, v) == before
    with monkeypatch.context() as changed:
        changed.setattr(native_library, "slowness", lambda dtype: "torch is faster")
        assert (agree(cache, q, k, v) == before) == (m <= M or before.impl == "torch")
    known = native_library.obstacle
    with monkeypatch.context() as changed:
        tiles = lambda op, device="cpu": "no tiles" if op.endswith("_bwd") else known(op, device)  # noqa: E731
        changed.setattr(native_library, "obstacle", tiles)
        assert (agree(cache, q, k, v) == before) == (m <= M or before.impl == "torch")
    assert agree(cache, q, k, v) == before


@pytest.mark.parametrize("value", ["1", "0", None])
def test_the_interpreter_of_triton_changes_no_decision_on_a_cpu(value, cache, monkeypatch):
    q, k, v = tensors()
    before = agree(cache, q, k, v, return_lse=True)
    if value is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert agree(cache, q, k, v, return_lse=True) == before


def test_it_does_not_grow_without_bound():
    cache, decision = DecisionCache(limit=3), Decision("cross_attention", "torch", "asked for")
    for i in range(10):
        cache.keep(i, decision)
        assert cache[i] is decision and len(cache) <= 3


@pytest.mark.parametrize(
    ("dtype", "units", "m", "n", "grad", "options", "impl"),
    [
        (torch.float32, False, 16, 64, False, {}, "native"),
        (torch.float32, False, 17, 64, False, {}, "torch"),  # the second tile of 16 queries is mostly empty
        (torch.float32, False, 17, 64, False, {"return_lse": True}, "native"),
        (torch.float32, False, 23, 64, False, {}, "torch"),
        (torch.float32, False, 23, 64, False, {"causal": True}, "native"),  # SDPA would need a search for NaN
        (torch.float32, False, 24, 64, False, {}, "native"),
        (torch.float32, False, 64, 64, True, {}, "torch"),  # a small training step
        (torch.float32, False, 64, 64, True, {"causal": True}, "native"),
        (torch.float32, False, 65, 64, True, {}, "native"),
        (torch.float32, False, 64, 65, True, {}, "native"),
        (torch.bfloat16, False, 16, 64, False, {}, "native"),
        (torch.bfloat16, True, 1, 512, False, {}, "torch"),  # matrix units: a short text
        (torch.bfloat16, True, 1, 513, False, {}, "native"),
        (torch.bfloat16, True, 7, 64, False, {}, "native"),
        (torch.bfloat16, True, 8, 64, False, {}, "torch"),
        (torch.bfloat16, True, 8, 64, True, {}, "native"),
        (torch.bfloat16, True, 8, 64, False, {"return_lse": True}, "native"),
        (torch.float32, True, 8, 64, False, {}, "native"),
    ],
)
def test_where_auto_changes_its_choice_on_a_cpu(dtype, units, m, n, grad, options, impl, cache, monkeypatch):
    monkeypatch.setattr(native, "MAX_KEYS", 1 << 23)
    monkeypatch.setattr(native_library, "obstacle", lambda op, device="cpu": None)
    slow = lambda dtype: "matrix units" if units and dtype != torch.float32 else None  # noqa: E731
    monkeypatch.setattr(native_library, "slowness", slow)
    q, k, v = tensors(m=m, n=n, dtype=dtype)
    assert API.decide(q.requires_grad_(grad), k, v, **options).impl == impl
    signature = API._signature(q, k, v, options.get("causal", False), options.get("return_lse", False))
    others = [
        API._signature(*(t.requires_grad_(False) for t in tensors(m=m, n=i, dtype=dtype)), False, False)
        for i in (64, 65, 513)
    ]
    assert signature is not None and len(set(others)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_nan_stays_hidden_on_the_short_path(dtype):
    """The choice of SDPA for causal attention keeps its search for NaN and Inf."""
    q, k, v = tensors(m=20, n=20, dtype=dtype)
    clean = cross_attention(q, k, v, causal=True, impl="reference")
    k[0, 12, 0, 3], v[0, 15, 0, 1] = float("nan"), float("inf")
    out = cross_attention(q, k, v, causal=True)
    assert torch.allclose(out[:, :12], clean[:, :12], atol=1e-6 if dtype == torch.float32 else 2e-2)
    assert out[:, 12:].isnan().any(-1).all()
