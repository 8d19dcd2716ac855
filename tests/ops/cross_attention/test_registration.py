"""cross_attention as torch sees it: schema, fakes, autograd, torch.compile, export; kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from calm_fast.ops import cross_attention

FWD, BWD = "cross_attention_triton_fwd", "cross_attention_triton_bwd"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(b=2, m=5, n=7, h=2, hkv=1, d=16, device="cpu", dtype=torch.float32, grad=True):
    g = torch.Generator().manual_seed(1)
    shapes = ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d))
    return [torch.randn(s, generator=g).to(device, dtype).requires_grad_(grad) for s in shapes]


def intervals(m=5, n=7, device="cpu"):
    hi = (torch.arange(m) + n - m).clamp(0, n).int()
    return (hi - 3).clamp(min=0).to(device), hi.to(device)


def options(device):
    lo, hi = intervals(device=device)
    return {
        "full": (None, None, False, 0.25),
        "causal": (None, None, True, 0.25),
        "intervals": (lo.expand(2, 5), hi.repeat(2, 1), False, 0.25),
        "hi": (None, hi.expand(2, 5), False, 0.25),
    }


@pytest.mark.parametrize("name", ["full", "causal", "intervals", "hi"])
def test_opcheck_forward(name, kernel_device):
    args = (*tensors(device=kernel_device), *options(kernel_device)[name])
    torch.library.opcheck(getattr(torch.ops.calm_fast, FWD), args)


@pytest.mark.parametrize("name", ["full", "intervals"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_opcheck_backward(name, with_lse, kernel_device):
    q, k, v = tensors(device=kernel_device, grad=False)
    rest = options(kernel_device)[name]
    out, lse = getattr(torch.ops.calm_fast, FWD)(q, k, v, *rest)
    args = (torch.randn_like(out), torch.randn_like(lse) if with_lse else None, q, k, v, out, lse, *rest)
    torch.library.opcheck(getattr(torch.ops.calm_fast, BWD), args)


def test_double_backward_is_refused(kernel_device):
    q, k, v = tensors(device=kernel_device)
    out = cross_attention(q, k, v, impl="triton")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='triton' has no double backward. Use impl='reference'"):
        torch.autograd.grad(dq.sum(), q)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_fake_tensors_give_shapes_and_dtypes(impl):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(s, dtype=torch.bfloat16) for s in ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16)))
        hi = torch.empty(2, 5, dtype=torch.int32)
        out, lse = cross_attention(q, k, v, hi=hi, return_lse=True, impl=impl)
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, 4, 16), torch.bfloat16, "cpu")
    assert (lse.shape, lse.dtype, lse.device.type) == ((2, 4, 5), torch.float32, "cpu")


# ---- torch.compile --------------------------------------------------------------------------------------------------


def attend(impl, q, k, v, lo, hi, causal):
    out, lse = cross_attention(q, k, v, lo=lo, hi=hi, causal=causal, return_lse=True, impl=impl)
    return out * 2, lse.clamp(min=-9.0)


def attend_plain(impl, q, k, v, lo, hi, causal):
    return (cross_attention(q, k, v, lo=lo, hi=hi, causal=causal, impl=impl) * 2,)


def same_with_gradients(eager, compiled, impl, mask, device):
    q, k, v = tensors(device=device)
    lo, hi = intervals(device=device) if mask == "intervals" else (None, None)
    results = []
    for f in (eager, compiled):
        out = f(impl, q, k, v, lo, hi, mask == "causal")
        g = torch.Generator().manual_seed(2)
        upstream = [torch.randn(o.shape, generator=g).to(device) for o in out]
        results.append((*out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # the same sums in another order


@pytest.mark.parametrize("mask", ["full", "causal", "intervals"])
@pytest.mark.parametrize("f", [attend, attend_plain], ids=["lse", "no lse"])
def test_compile_torch(f, mask):
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    same_with_gradients(f, compiled, "torch", mask, "cpu")


@pytest.mark.slow
def test_compile_torch_inductor():
    compiled = torch.compile(attend_plain, fullgraph=True, dynamic=True, backend="inductor")
    same_with_gradients(attend_plain, compiled, "torch", "intervals", "cpu")


@pytest.mark.parametrize("mask", ["full", "causal", "intervals"])
@pytest.mark.parametrize("f", [attend, attend_plain], ids=["lse", "no lse"])
def test_compile_triton(f, mask, kernel_device):
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    same_with_gradients(f, compiled, "triton", mask, kernel_device)


@pytest.mark.parametrize("mask", ["causal", "intervals"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fifty_lengths_compile_a_handful_of_times(impl, mask, monkeypatch):
    """Lengths are symbols in the graph; only 0, 1 and M == N may have graphs of their own.

    What a graph computes is the other tests' business: here the kernel is replaced by an empty one for speed.
    """
    from calm_fast.kernels.cross_attention import launch as kernels

    def empty(q, k, v, lo, hi, causal, scale):
        return torch.zeros(q.shape), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(kernels, "launch_cross_attention_fwd", empty)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for step in range(50):
        m, n = 2 + step, 2 + step * 5 % 53
        q, k, v = tensors(m=m, n=n, grad=False)
        lo, hi = intervals(m, n) if mask == "intervals" else (None, None)
        out, lse = compiled(impl, q, k, v, lo, hi, mask == "causal")
        assert out.shape == q.shape and lse.shape == (2, 2, m)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_decode_steps_share_one_graph(impl, monkeypatch):
    """N grows by one per step, as in generation."""
    from calm_fast.kernels.cross_attention import launch as kernels

    def empty(q, k, v, lo, hi, causal, scale):
        return torch.zeros(q.shape), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(kernels, "launch_cross_attention_fwd", empty)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend_plain, fullgraph=True, dynamic=True, backend=counter)
    for n in range(3, 53):
        q, k, v = tensors(m=1, n=n, grad=False)
        (out,) = compiled(impl, q, k, v, None, None, True)
        assert out.shape == q.shape
    assert counter.frame_count <= 2


# ---- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_export_with_dynamic_lengths(impl, kernel_device):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, hi):
            return cross_attention(q, k, v, hi=hi, impl=impl)

    device = kernel_device if impl == "triton" else torch.device("cpu")
    q, k, v = tensors(device=device, grad=False)
    m, n = torch.export.Dim("m", min=2), torch.export.Dim("n", min=2)
    shapes = {"q": {1: m}, "k": {1: n}, "v": {1: n}, "hi": {0: m}}
    program = torch.export.export(Attend(), (q, k, v, intervals(device=device)[1]), dynamic_shapes=shapes)
    assert (FWD in str(program.graph)) == (impl == "triton")
    q, k, v = tensors(m=9, n=12, device=device, grad=False)
    hi = intervals(9, 12, device)[1]
    torch.testing.assert_close(
        program.module()(q, k, v, hi), cross_attention(q, k, v, hi=hi, impl="reference"), rtol=1e-5, atol=1e-5
    )
