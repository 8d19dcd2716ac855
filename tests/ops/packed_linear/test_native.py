"""Packed products in the compiled library: bounds, refusals, and layers that keep packed weights."""

from __future__ import annotations

import pytest
import torch

import calm_fast
from calm_fast._ops.packed_linear.api import Packed, can_pack, linear, linear_into, pack
from calm_fast.core import native_library

pytestmark = pytest.mark.skipif(
    native_library.obstacle("packed_linear") is not None, reason=str(native_library.obstacle("packed_linear"))
)
LANES = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}


def library():
    return torch.ops.calm_fast


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16"])
def packs(request):
    """Lanes that have packed products."""
    best = native_library.build_info()["_cpu"]["best lane here"]
    if LANES[request.param] > LANES[best]:
        pytest.skip(f"the best lane of this CPU is {best}")
    return LANES[request.param]


@pytest.fixture
def packing():
    """Tests that need the best lane here to pack."""
    if not isinstance(pack(torch.ones(2, 2)), Packed):
        pytest.skip("this CPU has neither AVX2 nor AVX-512: nothing is packed")


def test_the_scalar_lane_packs_nothing_and_refuses_packed_products():
    w, ops = torch.ones(5, 6), library()
    assert ops._packed_linear_native_pack(w, LANES["scalar"]).numel() == 0
    for panel, least in ((16, "avx2"), (32, "avx512")):
        wanted = f"`lane` must be {least} or more for these packed products, got scalar"
        with pytest.raises(RuntimeError, match=wanted):
            ops._packed_linear_native_fwd(w, torch.ones(1, 6, panel), 5, None, LANES["scalar"])


def test_panels_of_a_narrower_lane_run_after_the_limit_is_lifted(packing):
    """A weight packed under `limit_lane` stays as it is; its panels say which tiles read them."""
    x, w = torch.randn(7, 20), torch.randn(33, 20)
    narrow, wide = (library()._packed_linear_native_pack(w, lane) for lane in (LANES["avx2"], -1))
    assert narrow.shape == (3, 20, 16)
    out = library()._packed_linear_native_fwd(x, narrow, 33)
    assert torch.equal(out, library()._packed_linear_native_fwd(x, narrow, 33, None, LANES["avx2"]))
    torch.testing.assert_close(out, library()._packed_linear_native_fwd(x, wide, 33), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n", "k"),
    [
        (1, 1, 1),
        (3, 33, 300),
        (6, 16, 256),
        (7, 17, 40),
        (14, 32, 256),
        (15, 31, 257),
        (127, 70, 513),
        (260, 40, 16),
        (400, 48, 520),
        (2, 5, 0),
        (0, 4, 4),
        (9, 0, 3),
    ],
)
def test_packed_product_equals_the_product(packs, tokens, n, k, added):
    generator = torch.Generator().manual_seed(k)
    x, w = torch.randn(tokens, k, generator=generator), torch.randn(n, k, generator=generator)
    add = torch.randn(tokens, n, generator=generator) if added else None
    packed = library()._packed_linear_native_pack(w, packs)
    out = library()._packed_linear_native_fwd(x, packed, n, add, packs)
    truth = x.double() @ w.double().mT + (add.double() if added else 0)
    bound = (k + 2) * torch.finfo(torch.float32).eps * (x.abs().double() @ w.abs().double().mT + 8)
    assert out.shape == (tokens, n) and ((out - truth).abs() <= bound).all()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 0, 7)])
def test_linear_takes_any_leading_dimensions(packing, shape):
    g = torch.Generator().manual_seed(2)
    x, w, bias = torch.randn(*shape, generator=g), torch.randn(40, 7, generator=g), torch.randn(40, generator=g)
    residual = torch.randn(*shape[:-1], 40, generator=g)
    kept = pack(w)
    assert isinstance(kept, Packed)
    truth = x.double() @ w.double().mT
    for found, expected in (
        (linear(x, kept), truth),
        (linear(x, kept, bias), truth + bias),
        (linear_into(residual, x, kept), truth + residual),
        (linear(x, w, bias), truth + bias),
        (linear_into(residual, x, w), truth + residual),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    turned = torch.randn(*shape[:-1], 7, 2, generator=g)[..., 0]  # not contiguous
    torch.testing.assert_close(linear(turned, kept), turned @ w.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(3, 6)}, "packed_linear: `packed` must have shape"),
        ({"x": torch.ones(3, 5, dtype=torch.float64)}, "`x` must be float32, got float64"),
        ({"x": torch.ones(5, 3).t()}, "`x` must be contiguous"),
        ({"n": 33}, "packed_linear: `packed` must have shape"),
        ({"n": -1}, "`n` must not be negative"),
        ({"add": torch.ones(3, 3)}, "packed_linear: `add` must have shape"),
        ({"x": torch.tensor(1.0)}, "packed_linear: `x` must have shape"),
    ],
)
def test_a_wrong_direct_call_is_named(packs, wrong, message):
    arguments = {"x": torch.ones(3, 5), "packed": library()._packed_linear_native_pack(torch.ones(4, 5), packs), "n": 4}
    with pytest.raises(RuntimeError, match=message):
        library()._packed_linear_native_fwd(**(arguments | wrong))


def test_only_products_that_nothing_records_are_packed(packing):
    x = torch.randn(2, 4)
    leaf = x.clone().requires_grad_()
    assert can_pack(x) and not can_pack(x, leaf) and not can_pack(x.double()) and not can_pack(x.bfloat16())
    assert not can_pack(torch.nn.Parameter(x)), "a subclass multiplies in its own way"
    with torch.no_grad():
        assert can_pack(leaf)
    for transform in (torch.func.vmap, torch.func.grad):
        seen = []

        def look(t, seen=seen):
            seen.append(can_pack(torch.ones(2)))
            return t.sum()

        transform(look)(x)
        assert seen == [False]
    with torch.autograd.forward_ad.dual_level():
        assert not can_pack(x)
    assert pack(x.double()).dtype == torch.float64 and torch.equal(pack(x.bfloat16()), x.bfloat16())


class Halved(torch.Tensor):
    """A weight that multiplies in its own way, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight = args[:2]
            return x @ (weight.as_subclass(torch.Tensor) / 2).mT
        return super().__torch_function__(function, types, args, kwargs)


def test_a_weight_of_another_kind_multiplies_in_its_own_way(packing):
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    kept = pack(w.as_subclass(Halved))
    assert type(kept) is Halved
    torch.testing.assert_close(linear(x, kept).as_subclass(torch.Tensor), x @ w.mT / 2)


def layer(**options):
    torch.manual_seed(0)
    made = calm_fast.CrossAttention(48, 24, 4, **options)
    torch.nn.init.normal_(made.o_proj.weight)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"proj": False}, {"bias": True}, {"post_norm": True}, {"pre_norm": False, "num_kv_heads": 2}],
    ids=str,
)
def test_a_layer_with_packed_weights_is_as_exact_as_without(packing, options):
    made = layer(**options)
    anchor, augmenter = torch.randn(2, 9, 48), torch.randn(2, 13, 24)
    plain = made(anchor, augmenter, causal=True).detach()  # gradients are recorded: nothing is kept
    with torch.no_grad(), calm_fast.fixed_weights(made):
        packed = made(anchor, augmenter, causal=True)
    kept = made._folded.value
    assert isinstance(kept.q, Packed) and isinstance(kept.k, Packed) and isinstance(kept.o, Packed)
    truth = made.double()(anchor.double(), augmenter.double(), causal=True).detach()
    error, bound = ((t.double() - truth).norm() / truth.norm() for t in (packed, plain))
    assert error <= 2 * bound + torch.finfo(torch.float32).eps / 2


def test_a_frozen_layer_still_passes_gradients_on(packing):
    """Packed products have no gradient: a call that autograd records gets plain weights, also between other calls."""
    made = layer().requires_grad_(False)
    anchor, augmenter = torch.randn(1, 5, 48), torch.randn(1, 6, 24)
    leaves = anchor.clone().requires_grad_(), augmenter.clone().requires_grad_()
    with calm_fast.fixed_weights(made):
        with torch.no_grad():
            quiet = made(anchor, augmenter)
        made(*leaves).sum().backward()
        with torch.no_grad():
            assert torch.equal(made(anchor, augmenter), quiet)
    double = layer().double().requires_grad_(False)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    double(*wide).sum().backward()
    for leaf, expected in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_a_cache(packing):
    """Keys and values of a cache may carry a graph that the layer's own inputs do not show."""

    class Prefix:
        def __init__(self, keys, values):
            self.keys, self.values = keys, values

        def update(self, keys, values):
            return torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)

    def gradient(made, keys, values, anchor, augmenter):
        leaf = values.clone().requires_grad_()
        with calm_fast.fixed_weights(made):
            made(anchor, augmenter, cache=Prefix(keys, leaf)).square().sum().backward()
        return leaf.grad

    made = layer().requires_grad_(False)
    inputs = *torch.randn(2, 1, 4, 3, 12).unbind(), torch.randn(1, 5, 48), torch.randn(1, 2, 24)
    expected = gradient(layer().requires_grad_(False).double(), *(t.double() for t in inputs))
    torch.testing.assert_close(gradient(made, *inputs).double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_is_packed_under_a_dispatch_mode(packing):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        assert not can_pack(torch.ones(2, 2))


def test_a_product_needs_little_of_a_thread_s_stack(packing):
    """Threads of other programs have stacks of a few hundred KB."""
    import threading

    x, kept, found = torch.randn(2000, 2048), pack(torch.randn(1100, 2048)), []
    old = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=lambda: found.append(linear(x, kept)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(old)
    assert torch.equal(found[0], linear(x, kept))


def test_packed_weights_follow_their_parameters(packing):
    made = layer()
    anchor, augmenter = torch.randn(1, 5, 48), torch.randn(1, 6, 24)
    with torch.no_grad(), calm_fast.fixed_weights(made):
        before = made(anchor, augmenter)
        made.o_proj.weight.mul_(2)
        after = made(anchor, augmenter)
    torch.testing.assert_close(after - anchor, 2 * (before - anchor), rtol=1e-4, atol=1e-5)


def test_a_token_has_the_same_bits_alone_and_among_others(packing):
    """Generation with a cache equals one pass, because no sum depends on the number of tokens."""
    made = layer()
    anchor, augmenter = torch.randn(3, 40, 48), torch.randn(3, 40, 24)
    kept = pack(made.q_proj.weight.detach())
    whole = linear(anchor, kept)
    assert torch.equal(whole[1, 7], linear(anchor[1, 7], kept))
    with torch.no_grad(), calm_fast.fixed_weights(made):
        many = made(anchor, augmenter)
        assert torch.equal(many[1:2], made(anchor[1:2], augmenter[1:2]))
