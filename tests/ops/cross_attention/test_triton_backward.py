"""Forms of cross_attention's Triton backward: tensor descriptors or pointers, one launch or two, the repair."""

from __future__ import annotations

import math

import pytest
import torch

from calm_fast._ops.cross_attention.reference import cross_attention_reference

pytest.importorskip("triton", reason="the kernels need Triton; it has wheels for Linux only")
from calm_fast.kernels.cross_attention import launch, launch_bwd
from calm_fast.kernels.cross_attention.configs import BackwardConfig, attention_tile

M, N, D = 20, 45, 16
TILE = attention_tile(16, 32, 4, 1)
SQUARE = attention_tile(16, 16, 4, 1)
ONE_LAUNCH = BackwardConfig(dkdv=TILE, dq=TILE)
TWO_LAUNCHES = BackwardConfig(dkdv=TILE, dq=TILE, dv=TILE)  # dk and dv have a launch each


def problem(device, dtype=torch.bfloat16, mask="interval", d=D):
    generator = torch.Generator().manual_seed(3)
    q, dout = (torch.randn(1, M, 2, d, generator=generator).to(device, dtype) for _ in range(2))
    k, v = (torch.randn(1, N, 1, d, generator=generator).to(device, dtype) for _ in range(2))
    lo = torch.arange(M, dtype=torch.int32, device=device)[None]
    hi = (lo + 18).clamp(max=N)
    hi[0, :2] = 0  # these rows see nothing
    if mask == "wide":  # every row of a tile sees all of keys 16 to 31
        return q, k, v, dout, (lo // 4, (lo // 4 + 40).int(), False)
    return q, k, v, dout, (lo, hi, False) if mask == "interval" else (None, None, mask == "causal")


def gradients(q, k, v, dout, mask, config=None):
    scale = q.shape[3] ** -0.5
    out, lse = launch.launch_cross_attention_fwd(q, k, v, *mask, scale)
    return launch_bwd.launch_cross_attention_bwd(dout, None, q, k, v, out, lse, *mask, scale, config)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("mask", "d"),
    [
        ("full", D),
        ("causal", D),
        ("interval", D),
        ("interval", 80),
        ("causal", 192),
        ("causal", 256),
        ("interval", 256),
    ],
)
def test_descriptors_and_pointers_give_the_same_bits(mask, d, kernel_device, monkeypatch):
    q, k, v, dout, mask = problem(kernel_device, mask=mask, d=d)
    read = []
    boxes_of = launch_bwd.boxes_of
    monkeypatch.setattr(launch_bwd, "boxes_of", lambda t, rows, parts: read.append(rows) or boxes_of(t, rows, parts))
    found = gradients(q, k, v, dout, mask, ONE_LAUNCH)
    if kernel_device.type == "cuda" and not read:
        pytest.skip("this GPU has no tensor descriptors")
    assert read == [16, 16, 32, 32]  # q and dout for dk and dv, k and v for dq
    for name, still in (("q", [32, 32]), ("v", [16, 16])):  # the launch that reads it otherwise takes pointers
        read.clear()
        given = {"q": q, "k": k, "v": v}
        unaligned = torch.zeros(*given[name].shape[:3], d + 1, device=kernel_device, dtype=q.dtype)[..., 1:]
        given[name] = unaligned.copy_(given[name])
        assert equal(gradients(**given, dout=dout, mask=mask, config=ONE_LAUNCH), found)
        assert read == still


@pytest.mark.parametrize("mask", ["full", "causal", "interval", "wide"])
def test_dk_and_dv_by_a_launch_each_are_those_of_one(mask, kernel_device):
    q, k, v, dout, mask = problem(kernel_device, torch.float32, mask)
    one = gradients(q, k, v, dout, mask, BackwardConfig(dkdv=SQUARE, dq=SQUARE))
    two = gradients(q, k, v, dout, mask, BackwardConfig(dkdv=SQUARE, dq=SQUARE, dv=SQUARE))
    assert equal((two[0], two[2]), (one[0], one[2]))
    # dk alone has its scores the other way round: (queries, keys), so its sums may have another order. Two sums of D
    # products are in ds, and one over 2 M rows is dk; a rounding is 2**-24, and p = exp2 adds a few.
    bound = (2 * D + 2 * M + 8) * 2**-24 * one[1].abs().max().item()
    torch.testing.assert_close(two[1], one[1], rtol=0, atol=bound)


@pytest.mark.parametrize("d", [192, 256])
@pytest.mark.parametrize("mask", ["causal", "interval", "wide"])
def test_steps_without_a_mask_in_the_one_loop_of_wide_heads(mask, d, kernel_device):
    """The loops of dq and of dk alone at head dims above 128, some of whose steps branch around the mask."""
    q, k, v, dout, mask = problem(kernel_device, mask=mask, d=d)
    found = gradients(q, k, v, dout, mask, BackwardConfig(dkdv=SQUARE, dq=SQUARE, dv=SQUARE))
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    lo, hi, causal = mask
    out, _ = cross_attention_reference(*inputs, lo=lo, hi=hi, causal=causal, scale=d**-0.5)
    expected = torch.autograd.grad(out, inputs, dout.double())
    # rounded to bfloat16, 2**-9 each: the output that delta takes, p, ds, and the gradient
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4 * 2**-9, atol=4 * 2**-9 * b.abs().max().item())


@pytest.mark.parametrize("place", ["q", "dout"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", [ONE_LAUNCH, TWO_LAUNCHES])
def test_a_query_that_is_not_finite_reaches_the_keys_it_sees_and_no_others(config, place, bad, kernel_device):
    q, k, v, dout, mask = problem(kernel_device, torch.float32)
    clean = gradients(q, k, v, dout, mask, config)
    {"q": q, "dout": dout}[place][0, 1, 0] = bad  # sees nothing
    for found, expected in zip(gradients(q, k, v, dout, mask, config), clean, strict=True):
        # finite_or_zero makes a copy of q, for which the interpreter's BLAS may add in another order than for a view
        bound = (2 * D + 2 * M + 8) * 2**-24 * expected.abs().max().item() if found.device.type == "cpu" else 0
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    {"q": q, "dout": dout}[place][0, 12, 0] = bad  # sees keys 12 to 29
    _, dk, dv = gradients(q, k, v, dout, mask, config)
    seen = torch.zeros(N, dtype=torch.bool)
    seen[12:30] = True
    for found, expected in ((dk, clean[1]), (dv, clean[2])):
        assert torch.equal(found.isfinite().all(-1)[0, :, 0].cpu(), ~seen)
        torch.testing.assert_close(found[:, ~seen], expected[:, ~seen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [ONE_LAUNCH, TWO_LAUNCHES])
def test_infinite_and_nan_keys_and_values_stay_with_those_who_see_them(config, kernel_device):
    q, k, v, dout, mask = problem(kernel_device, torch.float32)
    k[0, 40:], v[0, 40:] = math.nan, math.inf  # nobody sees them
    k[0, 0], v[0, 1] = math.inf, math.nan  # nor these: rows 0 and 1 see nothing
    found = gradients(q, k, v, dout, mask, config)
    lo, hi, _ = mask
    inputs = [t.double().nan_to_num(0.0, 0.0, 0.0).requires_grad_() for t in (q, k, v)]
    out, _ = cross_attention_reference(*inputs, lo=lo, hi=hi, scale=D**-0.5)
    expected = torch.autograd.grad(out, inputs, dout.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
