"""One small call of every Triton kernel, for compute-sanitizer to watch: forward, decode with a combine, backward.

Shapes are odd on purpose: partial tiles on every axis, a head dim that is no power of two, empty intervals. Each result
is compared with float64 as well, so that a silent wrong answer does not pass for a clean run.
"""

from __future__ import annotations

import sys

import torch

from calm_fast import ops
from calm_fast.reference import cross_attention_reference

# name: B, M, N, H, Hkv, D, causal, with backward
CALLS = {
    "forward and backward, causal, grouped heads": (1, 67, 67, 4, 2, 64, True, True),
    "forward and backward, intervals, head dim 40": (2, 35, 81, 2, 2, 40, False, True),
    "decode, keys split over programs": (2, 1, 1100, 4, 2, 64, False, False),
}


def run_call(name: str, device: torch.device, dtype: torch.dtype = torch.float16) -> float:
    """Run one entry of CALLS with impl="triton"; returns the largest relative error over its results."""
    b, m, n, h, kv, d, causal, backward = CALLS[name]
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(b, t, heads, d, generator=g).to(device, dtype) for t, heads in ((m, h), (n, kv), (n, kv), (m, h))
    )
    lo = hi = None
    if not causal and m > 1:
        lo, hi = (t.int().to(device) for t in torch.randint(0, n + 1, (2, b, m), generator=g).sort(0).values)
        hi = torch.where(torch.arange(m, device=device) % 5 == 0, lo, hi)  # some rows see nothing
    leaves = [t.requires_grad_(backward) for t in (q, k, v)]
    wide = [t.detach().double().requires_grad_(backward) for t in leaves]
    out = ops.cross_attention(*leaves, lo=lo, hi=hi, causal=causal, impl="triton")
    truth, _ = cross_attention_reference(*wide, lo, hi, causal)
    found, expected = [out], [truth]
    if backward:
        found += torch.autograd.grad(out, leaves, dout)
        expected += torch.autograd.grad(truth, wide, dout.double())
    pairs = zip(found, expected, strict=True)
    return max(float((a.detach().double() - t.detach()).norm() / t.detach().norm()) for a, t in pairs)


def main() -> int:
    """Run every call on the GPU; exit 1 if a result is off by more than a hundredth."""
    if not torch.cuda.is_available():
        print(f"sanitize: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    worst = 0.0
    for name in CALLS:
        error = run_call(name, torch.device("cuda"))
        print(f"{name}: relative error {error:.1e}")
        worst = max(worst, error) if error == error else float("inf")
    torch.cuda.synchronize()
    return 0 if worst < 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
