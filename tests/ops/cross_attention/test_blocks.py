"""cross_attention with intervals on a CPU: a block of queries computes only the keys it may see, both directions."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from calm_fast.ops import cross_attention

MODULE = importlib.import_module("calm_fast._ops.cross_attention.torch_impl")
M, N = 300, 457


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensors(b=2, m=M, n=N, h=8, hkv=4, d=16, dtype=torch.float64, grad=False):
    g = generator(3)
    shapes = ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d))
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def packed(b, m, n, documents=3, seed=0):
    """Documents in a row, cut differently in each sequence; hi grows by uneven steps, some rows are empty."""
    g = generator(seed)
    lo, hi = (torch.zeros(b, m, dtype=torch.int32) for _ in range(2))
    for row in range(b):
        cuts = [0, *sorted(torch.randint(1, m, (documents - 1,), generator=g).tolist()), m]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            lo[row, start:stop] = start * n // m
            end = torch.arange(start, stop) + torch.randint(0, 3, (stop - start,), generator=g)
            hi[row, start:stop] = (end * n // m).clamp(start * n // m, n).int()
    return lo, hi


def scattered(b, m, n, seed=0):
    """Two random numbers: in half of the rows lo >= hi."""
    g = generator(seed)
    return tuple(torch.randint(0, n + 1, (b, m), generator=g, dtype=torch.int32) for _ in range(2))


def masks():
    lo, hi = packed(2, M, N)
    one_lo, one_hi = packed(1, M, N, seed=1)
    holes = hi.clone()
    holes[0, 60:200] = 0  # whole blocks without a key
    window = (torch.arange(M) * N // M).int()
    narrow = scattered(2, M, 90, seed=2)
    return {
        "packed, another text per sequence": {"lo": lo, "hi": hi},
        "packed, one text": {"lo": one_lo[0], "hi": one_hi[0]},
        "packed, expanded": {"lo": one_lo.expand(2, M), "hi": one_hi.expand(2, M)},
        "lo shared, hi not": {"lo": (one_lo[0] // 2), "hi": hi},
        "empty blocks": {"lo": lo, "hi": holes},
        "window": {"lo": (window - 20).clamp(min=0), "hi": window},
        "only lo": {"lo": window},
        "only hi": {"hi": window},
        "causal, fewer queries": {"causal": True},
        "scattered": dict(zip(("lo", "hi"), scattered(2, M, N), strict=True)),
        "scattered in a corner": {"lo": narrow[0] + 300, "hi": narrow[1] + 300},
        "all empty": {"hi": torch.zeros(2, M, dtype=torch.int32)},
    }


MASKS = masks()
SAVING = {name for name in MASKS if name != "scattered"}  # random ends leave nothing to skip


@pytest.fixture
def block_calls(monkeypatch):
    """Rows and keys of every block that is computed."""
    found, true = [], MODULE._one_block

    def spy(q, k, v, block, *rest):
        found.append((q.shape[0] * (block.stop - block.start), k.shape[2]))
        return true(q, k, v, block, *rest)

    monkeypatch.setattr(MODULE, "_one_block", spy)
    return found


def both(options, dtype=torch.float64, **sizes):
    """Return out and gradients of impl "torch", and of the reference in float64 from the same values."""
    results = []
    for impl in ("torch", "reference"):
        leaves = [t.detach() for t in tensors(dtype=dtype, **sizes)]
        leaves = [(t if impl == "torch" else t.double()).requires_grad_() for t in leaves]
        out = cross_attention(*leaves, **options, impl=impl)
        upstream = torch.randn(out.shape, generator=generator(5), dtype=torch.float64)
        upstream = upstream * (0.5 + torch.arange(out.shape[1]) % 3)[:, None, None].double()
        results.append((out, *torch.autograd.grad(out, leaves, upstream.to(dtype).to(out.dtype))))
    return results


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", [{}, {"h": 6, "hkv": 6}, {"h": 4, "hkv": 1, "d": 80}], ids=str)
def test_blocks_equal_the_definition(name, sizes, block_calls):
    got, want = both(MASKS[name], **sizes)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)
    assert bool(block_calls) == (name in SAVING and name != "all empty")
    assert sum(rows * keys for rows, keys in block_calls) < 0.8 * 2 * M * N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_in_other_dtypes(dtype, block_calls):
    got, want = both(MASKS["packed, another text per sequence"], dtype)
    for one, two in zip(got, want, strict=True):
        assert one.dtype == dtype
        error = float((one.detach().double() - two).norm() / two.norm())
        assert error < 4 * torch.finfo(dtype).eps
    assert block_calls


def test_memory_of_a_block_is_its_own_mask(monkeypatch):
    """No (M, N) mask is built if blocks save work."""
    monkeypatch.setattr(MODULE, "_mask", lambda *args: pytest.fail("an (M, N) mask was made"))
    q, k, v = tensors(b=1, dtype=torch.float32)
    lo, hi = packed(1, M, N)
    cross_attention(q, k, v, lo=lo, hi=hi, impl="torch")


def test_few_rows_or_nothing_to_skip_need_one_call(block_calls):
    q, k, v = tensors(b=3, m=4, n=9, dtype=torch.float32)
    cross_attention(q, k, v, hi=torch.full((4,), 5, dtype=torch.int32), impl="torch")
    q, k, v = tensors(dtype=torch.float32)
    cross_attention(q, k, v, lo=torch.ones(M, dtype=torch.int32), impl="torch")
    assert block_calls == []


def test_many_short_sequences_are_taken_together(block_calls):
    """One call per sequence would cost more than the padding it saves."""
    b, m, n = 64, 16, 48
    q, k, v = tensors(b=b, m=m, n=n, h=8, hkv=8, dtype=torch.float32)
    hi = torch.randint(1, 25, (b, 1), generator=generator(), dtype=torch.int32).expand(b, m)
    got = cross_attention(q, k, v, hi=hi, impl="torch")
    want = cross_attention(q, k, v, hi=hi, impl="reference")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert len(block_calls) == 1 and block_calls[0][1] <= 24


def test_repeats_give_the_same_bits():
    options = MASKS["packed, another text per sequence"]
    first = both(options, torch.float32)[0]
    for _ in range(3):
        assert all(torch.equal(one, two) for one, two in zip(first, both(options, torch.float32)[0], strict=True))


def test_nan_stays_in_its_rows():
    """A NaN query stays in its row, a NaN key in the blocks whose rows may see it."""
    options = MASKS["packed, one text"]
    q, k, v = tensors(dtype=torch.float32)
    clean = cross_attention(q, k, v, **options, impl="torch")
    q[0, 100, 1] = math.nan
    got = cross_attention(q, k, v, **options, impl="torch")
    assert got[0, 100, 1].isnan().all()
    got[0, 100, 1] = clean[0, 100, 1]
    assert torch.equal(got, clean)
    most = options["hi"].max()
    k[1, most - 1] = math.nan  # only the last document may see it
    got = cross_attention(q, k, v, **options, impl="torch")
    apart = int((options["hi"] == most).nonzero()[0]) // 256 * 256  # blocks before the first that sees it
    assert apart >= 256 and torch.equal(got[1, :apart], clean[1, :apart])


def test_backward_twice_and_frozen_keys():
    q, k, v = tensors(dtype=torch.float64, grad=True)
    options = MASKS["window"]
    out = cross_attention(q, k, v, **options, impl="torch")
    one = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    two = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    alone = cross_attention(q, k.detach(), v.detach(), **options, impl="torch")
    (dq,) = torch.autograd.grad(alone.sum(), (q,))
    torch.testing.assert_close(dq, one[0], rtol=0, atol=1e-13)
    out = cross_attention(q, k, v, **options, impl="torch")
    (dq,) = torch.autograd.grad(out.square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_compiled_and_transformed_calls_read_no_values(block_calls):
    """Under torch.compile and torch.func a mask is built: values cannot choose the blocks."""
    q, k, v = tensors(dtype=torch.float32)
    options = MASKS["packed, one text"]
    want = cross_attention(q, k, v, **options, impl="reference")

    def call(q):
        return cross_attention(q, k, v, **options, impl="torch")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), want, rtol=0, atol=1e-5)
    grad = torch.func.grad(lambda q: call(q).sum())(q)
    assert block_calls == [] and grad.isfinite().all()
