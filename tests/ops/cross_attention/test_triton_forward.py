"""The forward kernel's two ways to read keys and values, and the rows that it computes again."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton; it has wheels for Linux only")
from calm_fast.kernels.common.launching import describable, describe
from calm_fast.kernels.cross_attention import launch as kernels
from calm_fast.kernels.cross_attention.configs import attention_tile

TILE = attention_tile(16, 32, 4, 1)  # given, so that the decode kernel does not take these small calls
B, M, N, H, D = 2, 37, 75, 2, 24


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, kernel_device):
    """The CPU through the interpreter, or the GPU: one session compiles kernels or interprets them, never both."""
    if request.param == "interpreter" and kernel_device.type != "cpu":
        pytest.skip("this session has a GPU: its kernels are compiled")
    return kernel_device


def make(device, d=D, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, rows, heads, d, generator=g).to(dtype) for rows, heads in ((M, H), (N, 1), (N, 1)))
    return q.to(device), k.to(device), v.to(device)


def masks(device):
    hi = 20 + torch.arange(M, device=device).expand(B, M)
    lo = (hi - 33).clamp(min=0)
    hi = torch.where(torch.arange(M, device=device) == 5, 0, hi)  # a row that sees nothing
    return {"full": (None, None, False), "causal": (None, None, True), "interval": (lo.int(), hi.int(), False)}


def forward(q, k, v, mask):
    return kernels.launch_cross_attention_fwd(q, k, v, *mask, 0.2, TILE)


def unaligned(t):
    """The same numbers, one element behind a multiple of 16 bytes."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@pytest.mark.parametrize("mask", ["full", "causal", "interval"])
@pytest.mark.parametrize("d", [8, D, 80, 88, 96, 192])  # from 80 on two boxes a tensor, 88 ends inside the second
def test_descriptors_and_pointers_give_the_same_bits(d, mask, device):
    q, k, v = make(device, d)
    mask = masks(device)[mask]
    assert describable(k) and not describable(unaligned(k))
    for found, expected in zip(forward(q, k, v, mask), forward(q, unaligned(k), v, mask), strict=True):
        assert torch.equal(found, expected)


def test_a_descriptor_is_read_with_the_strides_of_its_tensor(device):
    """Heads outside rows, a slice of a packed tensor, one sequence of a batch: never a copy, always the same bits."""
    q, k, v = make(device)
    mask = masks(device)["causal"]
    expected = forward(q, k, v, mask)
    packed = torch.stack([k, v], 3)  # (B, N, 1, 2, D)
    views = [packed[..., 0, :], k.transpose(1, 2).contiguous().transpose(1, 2)]
    for view in views:
        assert describable(view)
        assert torch.equal(forward(q, view, v, mask)[0], expected[0])
    alone = forward(q[1:], k[1:], v[1:], mask)
    assert torch.equal(alone[0], expected[0][1:]) and torch.equal(alone[1], expected[1][1:])


def test_tensors_that_a_descriptor_can_address():
    t = torch.zeros(2, 5, 3, 16, dtype=torch.bfloat16)
    assert describable(t) and describable(t.transpose(1, 2)) and describable(t[:, 1:])
    assert not describable(t[..., 1:])  # begins at byte 2
    assert not describable(t.transpose(2, 3))  # columns are not neighbours
    assert not describable(t[:, :, :1].expand(2, 5, 3, 16))  # a stride of 0
    assert not describable(torch.zeros(2, 5, 3, 20, dtype=torch.bfloat16))  # heads are 40 bytes apart
    one = torch.zeros(20, dtype=torch.bfloat16).as_strided((1, 1, 1, 20), (7, 3, 1, 1))
    assert describable(one)  # a stride that is never used
    assert describe(one, [1, 16, 1, 32]).strides == [8, 8, 8, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["causal", "interval"])
@pytest.mark.parametrize(("d", "column"), [(D, 3), (80, 3), (80, 70)], ids=["one part", "first part", "second part"])
def test_a_hidden_value_that_is_not_finite_reaches_nobody(d, column, mask, dtype, bad, device):
    """A 16-bit row that is computed again has weights of its final maximum, and lse depends on keys alone."""
    q, k, v = make(device, d, dtype)
    mask = masks(device)[mask]
    out, lse = forward(q, k, v, mask)
    key = 45
    v[0, key, 0, column] = bad
    found, found_lse = forward(q, k, v, mask)
    lo, hi, causal = mask
    rows = torch.arange(M, device=device)
    sees = key < rows + 1 + N - M if causal else (lo[0] <= key) & (key < hi[0])
    assert 0 < int(sees.sum()) < M
    kept = ~sees if dtype == torch.float32 else sees | ~sees
    assert torch.equal(found_lse[..., kept], lse[..., kept])
    assert not bool(found[0, sees].isfinite().all(-1).any())
    # twice half a unit for each weight as an operand and for the result; sums of 75 numbers in another order
    bound = (2 * torch.finfo(dtype).eps + 75 * 2**-23) * float(v[v.isfinite()].abs().max())
    torch.testing.assert_close(found[0, ~sees], out[0, ~sees], rtol=0, atol=bound)
    assert torch.equal(found[1], out[1])
