"""linear_logprob in Triton; the products that consume logit gradients are torch's. Triton is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.vocabulary.schedule import HeadGradients, head_gradients


def linear_logprob_triton_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    want_entropy: bool,
    want_rank: bool,
    keep_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Score every token in one sweep and keep no logits; arguments and results as in `linear_logprob_torch_fwd`."""
    from calm_fast.kernels.linear_logprob import launch

    results: tuple[torch.Tensor, ...] = launch.launch_linear_logprob_fwd(
        hidden, weight, bias, targets, temperature, softcap, ignore_index, want_entropy, want_rank
    )
    return *results, hidden.new_empty(0)


def linear_logprob_triton_bwd(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    norms: torch.Tensor,
    entropy: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    needs: Sequence[bool],
) -> HeadGradients:
    """Compute the gradients of hidden, weight and bias; arguments and results as in `linear_logprob_torch_bwd`."""
    from calm_fast.kernels.linear_logprob import launch

    if needs[1]:
        # dweight multiplies by these rows: 0 times anything an ignored row holds must be 0
        hidden = hidden.masked_fill((targets == ignore_index).unsqueeze(1), 0.0)
    tensors = (dlogprob, dentropy, hidden, weight, bias, targets, norms, entropy)

    def fill(rows: slice, columns: slice, chunk: torch.Tensor) -> None:
        launch.launch_linear_logprob_dlogits(*tensors, temperature, softcap, ignore_index, rows, columns, chunk)

    return head_gradients(hidden, weight, needs, fill)
