"""torch.func and forward-mode differentiation: right, or an error that says what works; never a silent zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import calm_fast
from calm_fast import ops


def forward_mode(function, x, t):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent


def functional(function, x, t):
    return torch.func.jvp(function, (x,), (t,))[1]


WAYS = pytest.mark.parametrize("way", [forward_mode, functional])


@WAYS
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_dual_lora_layer(way, variant):
    torch.manual_seed(0)
    layer = calm_fast.DualLoRALinear(torch.nn.Linear(16, 12), rank=2, alpha=4.0, variant=variant).requires_grad_(False)
    for factor in (layer.lora_b_pos, layer.lora_b_neg):
        torch.nn.init.normal_(factor)
    x, t = torch.randn(6, 16), torch.randn(6, 16)
    layer(x)  # factors are kept, packed where they can be
    expected = torch.autograd.functional.jvp(layer.double(), x.double(), t.double())[1]  # two backward passes
    torch.testing.assert_close(way(layer.float(), x, t).double(), expected, rtol=1e-4, atol=1e-4)


@WAYS
def test_cross_attention(way):
    """The reference has forward mode; torch's own attention (2.13, on a CPU) has none and says so. Kernels refuse."""
    q, k, v, t = torch.randn(4, 1, 5, 2, 8).unbind()
    expected = torch.autograd.functional.jvp(
        lambda q: ops.cross_attention(q, k.double(), v.double(), impl="reference"), q.double(), t.double()
    )[1]
    found = way(lambda q: ops.cross_attention(q, k, v, impl="reference"), q, t)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)
    try:
        chosen = way(lambda q: ops.cross_attention(q, k, v), q, t)
    except NotImplementedError as error:
        assert "forward AD" in str(error)
    else:
        torch.testing.assert_close(chosen.double(), expected.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="impl='native' cannot run here: forward-mode differentiation"):
        way(lambda q: ops.cross_attention(q, k, v, impl="native"), q, t)


WEIGHT, NAT, NEG = torch.randn(52, 16, generator=torch.Generator().manual_seed(1)).split((40, 6, 6))


def logprob(hidden, impl="auto"):
    return ops.linear_logprob(hidden, WEIGHT.to(hidden.dtype), torch.arange(6), impl=impl)


def nce(hidden, impl="auto"):
    nat, neg, weight = (t.to(hidden.dtype) for t in (NAT, NEG, WEIGHT))
    return ops.linear_nce(hidden, nat, neg, weight, torch.arange(6), torch.arange(6) // 3, impl=impl)


@pytest.mark.parametrize("function", [logprob, nce])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_vocabulary_ops(function, impl):
    torch.manual_seed(0)
    x, t = torch.randn(6, 16), torch.randn(6, 16)
    expected = torch.autograd.functional.jvp(lambda x: function(x, "reference"), x.double(), t.double())[1]
    for way in (forward_mode, functional):
        found = way(lambda x: function(x, "reference"), x, t)
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)
        with pytest.raises(RuntimeError, match="only impl='reference' has derivatives"):
            way(lambda x: function(x, impl), x, t)
    with pytest.raises(RuntimeError, match="inside forward-mode differentiation only"):
        forward_mode(torch.func.vmap(lambda x: function(x, impl)), x[None], t[None])
    torch.testing.assert_close(torch.func.functionalize(lambda x: function(x, impl))(x), function(x, impl))
    with pytest.raises(RuntimeError, match="inside a torch.func transform only impl='reference'"):
        torch.func.grad(lambda x: function(x, impl).sum())(x)
    batched = torch.func.vmap(lambda x: function(x, impl))(torch.stack((x, t)))
    torch.testing.assert_close(batched, torch.stack((function(x, impl), function(t, impl))))


BATCHED = [(0, 0, 0, 0, 0), (None, None, None, 0, 0), (0, None, None, 0, None), (None, 0, 0, None, 0)]


@pytest.mark.parametrize("impl", ["auto", "reference", "torch"])
@pytest.mark.parametrize("dims", BATCHED, ids=str)
def test_vmap_over_intervals(impl, dims):
    """Also over some arguments and not others, and with derivatives inside."""
    q, k, v = (torch.randn(3, 2, length, 2, 8) for length in (6, 9, 9))
    lo, hi = (torch.randint(a, b, (3, 2, 6), dtype=torch.int32) for a, b in ((0, 4), (2, 10)))
    args = [t if dim == 0 else t[0] for t, dim in zip((q, k, v, lo, hi), dims, strict=True)]

    def attend(q, k, v, lo, hi):
        return ops.cross_attention(q, k, v, lo=lo, hi=hi, return_lse=True, impl=impl)

    def loss(q, k, v, lo, hi):
        return ops.cross_attention(q, k, v, lo=lo, hi=hi, impl=impl).square().sum()

    for function in (attend, torch.func.grad(loss, argnums=(0, 1, 2))):
        found = torch.func.vmap(function, in_dims=dims)(*args)
        alone = [function(*(a[i] if dim == 0 else a for a, dim in zip(args, dims, strict=True))) for i in range(3)]
        for one, *several in zip(found, *alone, strict=True):
            torch.testing.assert_close(one, torch.stack(several), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_not_finite_inside_vmap(impl):
    """No value can be read there: hidden NaN still reaches nothing."""
    q, k, v = torch.randn(3, 3, 2, 9, 2, 8)
    k[:, :, 5:] = v[:, :, 5:] = float("nan")
    hi = torch.full((3, 2, 9), 5, dtype=torch.int32)

    def loss(q, k, v, hi):
        return ops.cross_attention(q, k, v, hi=hi, impl=impl).square().sum()

    for grad in torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, hi):
        assert bool(grad.isfinite().all())
