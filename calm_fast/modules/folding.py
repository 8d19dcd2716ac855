"""Folding: the cost of both orders of a chain of products. modules/fixed_weights.py keeps folded weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Time per FLOP relative to a bfloat16 product on the same device. A GPU's float32 product without TF32 runs outside the
# tensor cores (H100 and H200: about 60 against 800 TFLOP/s). CPUs without AMX do both at one rate.
_GPU_SLOWNESS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 14.0, torch.float64: 14.0}
_GPU_TF32_SLOWNESS = 2.0


def _tf32_allowed() -> bool:
    # torch.get_float32_matmul_precision raises where TF32 was allowed through torch.backends
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# torch.compiler.assume_constant_result sets this: torch.compile cannot trace the backend's attribute
_tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def slowness(dtype: torch.dtype, device_type: str) -> float:
    """Return the time per FLOP of a matrix product in `dtype`, relative to bfloat16 on the same device."""
    if device_type != "cuda":
        return 2.0 if dtype == torch.float64 else 1.0
    if dtype == torch.float32 and _tf32_allowed():
        return _GPU_TF32_SLOWNESS
    return _GPU_SLOWNESS.get(dtype, 14.0)


@dataclass(frozen=True)
class KeyValueCost:
    """Relative cost of the two association orders of k = W_k (P h) and v = W_v (P h); see `key_value_cost`."""

    folded: float
    unfolded: float

    @property
    def fold(self) -> bool:
        """True if folding does not cost more."""
        return self.folded <= self.unfolded


def key_value_cost(
    tokens: int,
    augmenter_dim: int,
    inner_dim: int,
    kv_dim: int,
    *,
    training: bool,
    augmenter_grad: bool,
    cached: bool,
    param_slowness: float = 1.0,
    compute_slowness: float = 1.0,
) -> KeyValueCost:
    """Return the FLOPs of both orders, weighted by the rate of the dtype each product runs in (docs/folding.md).

        folded     h [W_k P; W_v P]^T, with the fold in the parameter dtype
        unfolded   (h P^T) W_k^T and (h P^T) W_v^T

    A GEMM costs once forward, once more for the gradient of its weight, and once more for that of its input.

    Args:
        tokens: B * N tokens of the augmenter.
        augmenter_dim, inner_dim, kv_dim: DA, DB (P's output) and Hkv * D.
        training: the factors need gradients.
        augmenter_grad: h needs a gradient.
        cached: the folded weight is kept between calls, so that folding costs nothing per call.
        param_slowness, compute_slowness: `slowness` of the parameters' dtype and of the computation's.
    """
    train, into_h = float(training), float(augmenter_grad)
    per_call = 4.0 * tokens * augmenter_dim * kv_dim * (1 + train + into_h) * compute_slowness
    fold = 0.0 if cached else 4.0 * kv_dim * inner_dim * augmenter_dim * (1 + 2 * train) * param_slowness
    project = 2.0 * tokens * augmenter_dim * inner_dim * (1 + train + into_h)
    into_inner = float(training or augmenter_grad)
    keys_values = 4.0 * tokens * inner_dim * kv_dim * (1 + train + into_inner)
    return KeyValueCost(per_call + fold, (project + keys_values) * compute_slowness)
