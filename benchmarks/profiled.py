"""Launch the forward kernel of cross_attention three times at the shape of case X1, for a profiler to look at.

    ncu --clock-control none --kernel-name regex:cross_attention_fwd --launch-skip 2 --launch-count 1 \\
        python -m calm_fast.benchmarks.profiled
"""

from __future__ import annotations

import torch

from calm_fast import ops
from calm_fast.benchmarks.registry import cases


def main() -> int:
    """Run attention with the inputs of X1, and wait for it."""
    if not torch.cuda.is_available():
        print(f"profiled: torch {torch.__version__} sees no GPU")
        return 1
    device = torch.device("cuda")
    (sizes,) = (case.shape for case in cases("cross_attention", device, "quick") if case.name == "x1_core_d128")
    b, m, n, h, d = (sizes[letter] for letter in "BMNHD")
    q = torch.randn(b, m, h, d, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(b, n, h, d, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        ops.cross_attention(q, k, v, causal=True, impl="triton")
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
