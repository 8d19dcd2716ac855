"""Definition of the logits of linear_nce and linear_logprob."""

from __future__ import annotations

import torch


def logits_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    """Return z = hidden weight^T + bias, or softcap * tanh(z / softcap) with a softcap.

    Args:
        hidden: (T, d), any float dtype. weight: (V, d). bias: (V,) or None.
        softcap: positive, or None.
    Returns:
        (T, V) float32 (float64 for float64 input).
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(compute) @ weight.to(compute).T
    if bias is not None:
        z = z + bias.to(compute)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def expectation(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return sum_v p_v values_v over the last dim; a token of probability 0 adds 0 even where its value is infinite.

    This is the limit of p log p. A bias of -inf rules a token out: its probability is 0 and its logarithm -inf.
    """
    return (p * values.masked_fill(p == 0, 0.0)).sum(-1)


def known_targets(targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return where 0 <= target < V. In a graph and on a GPU nobody has refused the others."""
    return (targets >= 0) & (targets < vocabulary)


def logits_at(values: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return values (T, V) at targets (T,): (T,). A target outside the vocabulary gives NaN and NaN gradients."""
    known = known_targets(targets, values.shape[-1])
    picked = values.gather(-1, (targets * known).unsqueeze(-1)).squeeze(-1)
    return picked * torch.where(known, 1.0, float("nan")).to(values.dtype)
