"""dual_lora in the compiled library: every SIMD lane, packed products, and when `auto` chooses it."""

from __future__ import annotations

import pytest
import torch

import calm_fast
from calm_fast._ops.dual_lora.api import decide, dual_lora, dual_lora_folded
from calm_fast._ops.dual_lora.native import pack_folded, project_folded
from calm_fast._ops.dual_lora.torch_impl import (
    Folded,
    dual_lora_backward_torch,
    dual_lora_torch,
    fold_dual_lora,
    project,
)
from calm_fast.core import native_library
from calm_fast.core.devices import product_dtype

pytestmark = pytest.mark.skipif(
    native_library.obstacle("dual_lora") is not None, reason=str(native_library.obstacle("dual_lora", "cpu"))
)
LANES = {"scalar": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library():
    return torch.ops.calm_fast


def lane_number(name):
    best = native_library.build_info()["_cpu"]["best lane here"]
    if LANES[name] > LANES[best]:
        pytest.skip(f"the best lane of this CPU is {best}")
    return LANES[name]


@pytest.fixture(params=LANES)
def lane(request):
    return lane_number(request.param)


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16"])
def packs(request):
    """A lane that has packed products."""
    return lane_number(request.param)


def ulp(values):
    """Return the spacing of float32 at the size of `values`, as float64."""
    at = values.float().abs()
    return torch.nextafter(at, torch.tensor(float("inf"))).double() - at.double()


def gelu_of(v, lane):
    """Return gelu(v) from the mix kernel: z = 0 gives the weights 1 and 0, so the mix is gelu(u)."""
    return library()._dual_lora_native_mix(torch.zeros(1, 4), v[None], torch.zeros(v.numel(), 2), 1, lane)[0]


def test_gelu_is_exact_to_a_few_units_in_the_last_place(lane):
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(20000, generator=generator)
    v = torch.cat((torch.linspace(-13.5, 14.0, 60001), spread * 1e-3, spread * 1e-20, torch.tensor([0.0, 1e30, -1e30])))
    truth = v.double() * 0.5 * torch.special.erfc(-v.double() / 2**0.5)
    out = gelu_of(v, lane)
    counted = (truth.abs() > 1e-36) | (truth == 0)
    assert counted.sum() > 90000
    assert ((out.double() - truth).abs() <= 6 * ulp(truth))[counted].all()
    assert (out[~counted].abs() <= 1e-35).all()


def test_gelu_keeps_nan_in_its_place(lane):
    v = torch.zeros(70)
    v[[0, 17, 69]] = float("nan")
    assert torch.equal(gelu_of(v, lane).isnan(), v.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "m", "r_pos", "r_neg"), [(1, 1, 1, 1), (37, 67, 5, 3), (16, 128, 8, 8), (5, 64, 0, 2)]
)
def test_mix_equals_its_formula_in_every_lane(lane, dtype, tokens, m, r_pos, r_neg):
    generator = torch.Generator().manual_seed(tokens)
    r = r_pos + r_neg
    zg, u, up = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((tokens, 2 * r), (tokens, m), (m, r)))
    out = library()._dual_lora_native_mix(zg, u, up, r_pos, lane)
    wide = [t.double() for t in (zg, u, up)]
    p_neg = (wide[0][:, :r] * wide[0][:, r:]).sum(-1, keepdim=True).sigmoid()
    parts = [wide[0][:, a:b] @ wide[2][:, a:b].mT + wide[1] for a, b in ((0, r_pos), (r_pos, r))]
    pos, neg = (torch.nn.functional.gelu(h) for h in parts)
    truth = (1.5 - p_neg) * pos + (p_neg - 0.5) * neg
    # rounding of h, of the logit (p_neg moves by at most 1/4 of that) and, in low precision, of the result
    size = sum(p.abs() for p in parts) + wide[0].abs().sum(-1, keepdim=True) * (pos - neg).abs() + 1
    bound = 2 * (r + 4) * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * truth.abs()
    assert ((out.double() - truth).abs() <= bound).all()
    assert out.dtype == dtype
    scalar = library()._dual_lora_native_mix(zg, u, up, r_pos, LANES["scalar"])
    assert torch.equal(out, scalar), "lanes differ only in how many values they compute at once"


def test_results_do_not_depend_on_threads_or_other_rows(packs):
    generator = torch.Generator().manual_seed(1)
    x, w, add = (torch.randn(*shape, generator=generator) for shape in ((300, 700), (65, 700), (300, 65)))
    packed, threads = library()._packed_linear_native_pack(w, packs), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            u = library()._packed_linear_native_fwd(x, packed, 65, add, packs)
            runs.append((u, library()._dual_lora_native_mix(x[:, :8].contiguous(), u, w[:, :4].contiguous(), 1)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    part = library()._packed_linear_native_fwd(x[17:40].contiguous(), packed, 65, add[17:40].contiguous(), packs)
    assert torch.equal(part, runs[0][0][17:40])


def test_a_nan_stays_in_its_row(packs):
    x, w = torch.randn(40, 300), torch.randn(35, 300)
    x[13, 299] = float("nan")
    out = library()._packed_linear_native_fwd(x, library()._packed_linear_native_pack(w, packs), 35)
    assert out[13].isnan().all() and not out[torch.arange(40) != 13].isnan().any()


def tensors(generator, form, dtype=torch.float32, tokens=21, d_in=24, d_out=40, r_pos=5, r_neg=3, m=11):
    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype) / shape[-1] ** 0.5

    factors = [
        draw(r_pos, d_in),
        draw(d_out, r_pos),
        draw(r_neg, d_in),
        draw(d_out, r_neg),
        draw(7, d_in),
        draw(7, d_out),
    ]
    value = (draw(m, d_out), draw(d_out, m))
    x, y = draw(tokens, d_in) * d_in**0.5, draw(tokens, d_out) * d_out**0.5
    return x, y, factors, value, "gelu" if form == "released" else "none"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["released", "paper"])
def test_kept_factors_are_packed_and_give_what_one_call_gives(form, dtype):
    x, y, factors, value, activation = tensors(torch.Generator().manual_seed(2), form, dtype)
    folded = fold_dual_lora(*factors, value, (2.0, 2.0), activation)
    packed = pack_folded(folded)
    expected = dual_lora(x, y, *factors, value, scaling=2.0, activation=activation, impl="native")
    out = dual_lora_folded(project_folded(x, packed), y, packed, 5, impl="native")
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    if dtype != torch.float32:
        assert packed.packed_down is None
        # where this CPU has no products of the dtype, the public op and the module compute in float32
        assert torch.equal(out, expected) or product_dtype("cpu", dtype) == torch.float32


@pytest.mark.parametrize("form", ["released", "paper"])
def test_explicit_gradients_equal_autograd(form):
    x, y, factors, value, activation = tensors(torch.Generator().manual_seed(4), form, torch.float64)
    folded = fold_dual_lora(*factors, value, (2.0, 0.5), activation)
    zg = project(x, folded)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (zg, y, folded.up, folded.c1, folded.c2)]
    whole = Folded(folded.down, *leaves[2:])
    out = dual_lora_torch(leaves[0], leaves[1], whole, 5)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    present = [t for t in leaves if t is not None]
    expected = torch.autograd.grad(out, present, dout)
    got = [g for g in dual_lora_backward_torch(dout, zg, y, whole, 5) if g is not None]
    for grad, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["released", "paper"])
def test_registered_op_passes_opcheck(form):
    x, y, factors, value, activation = tensors(torch.Generator().manual_seed(6), form)
    folded = fold_dual_lora(*factors, value, (2.0, 2.0), activation)
    args = (project(x, folded), y, folded.up, folded.c1, folded.c2, None, None, 5)
    torch.library.opcheck(torch.ops.calm_fast.dual_lora_native_fwd, args)
    leaves = tuple(a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args)
    torch.library.opcheck(torch.ops.calm_fast.dual_lora_native_fwd, leaves)


def test_auto_chooses_native_where_autograd_records_nothing():
    x, y, factors, value, activation = tensors(torch.Generator().manual_seed(7), "released")
    options = {"scaling": 2.0, "activation": activation}
    assert decide(x, y, *factors, value, **options).impl == "native"
    auto, native = (dual_lora(x, y, *factors, value, **options, impl=impl) for impl in ("auto", "native"))
    assert torch.equal(auto, native)
    x.requires_grad_()
    assert decide(x, y, *factors, value, **options).impl == "torch"
    with torch.no_grad():
        assert decide(x, y, *factors, value, **options).impl == "native"
    wide = [t.double() for t in (x, y, *factors)]
    assert decide(*wide, tuple(t.double() for t in value), **options).impl == "torch"


def test_layer_in_inference_sees_every_change_of_a_parameter():
    torch.manual_seed(0)
    layer = calm_fast.DualLoRALinear(torch.nn.Linear(48, 40), 4, 8.0, value_dim=33, variant="released")
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) / p.shape[-1] ** 0.5)
    x = torch.randn(3, 5, 48)
    expected = layer(x).detach()  # parameters train: autograd records, torch runs
    with torch.no_grad(), calm_fast.fixed_weights(layer):
        once, again = layer(x), layer(x)
        torch.testing.assert_close(once, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(once, again)
        layer.value_up.mul_(2.0)
        changed = layer(x)
    torch.testing.assert_close(changed, layer(x).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(changed, once)


def test_wrong_direct_calls_are_refused(lane):
    ops, zg, u, up = library(), torch.zeros(3, 4), torch.zeros(3, 6), torch.zeros(6, 2)
    for args, message in (
        ((torch.zeros(3, 5), u, up, 1), "dual_lora: `zg` must have shape"),
        ((zg, torch.zeros(2, 6), up, 1), "dual_lora: `u` must have shape"),
        ((zg, u, torch.zeros(5, 2), 1), "dual_lora: `up` must have shape"),
        ((zg, u, up.half(), 1), "`up` must be float32, got float16"),
        ((zg, torch.zeros(6, 3).mT, up, 1), "`u` must be contiguous"),
        ((zg.double(), u.double(), up.double(), 1), "`zg` must be float32, bfloat16 or float16, got float64"),
        ((zg, u, up, 3), "`r_pos` must lie in"),
        ((zg, u, up, 1, 9), "`lane` must be -1 or at most .* got 9"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops._dual_lora_native_mix(*args)
