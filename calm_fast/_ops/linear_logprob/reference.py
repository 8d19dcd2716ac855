"""Definition of linear_logprob: log-probabilities of target tokens from hidden states and the LM head."""

from __future__ import annotations

import torch

from calm_fast._ops.vocabulary.reference import expectation, known_targets, logits_at, logits_reference


def linear_logprob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each target's log-probability, the entropy of its distribution and its rank, with all logits in memory.

        p_t = softmax(z_t / temperature),  z = softcap(hidden weight^T + bias)
        logprob_t = log p_t[target_t];  entropy_t = -sum_v p_t[v] log p_t[v]
        rank_t = 1 + #{v : z_t[v] > z_t[target_t]}

    Args:
        hidden: (T, d), any float dtype. weight: (V, d).
        targets: (T,) int64; one outside the vocabulary has logprob NaN and rank 0.
        bias: (V,) or None; -inf rules a token out, which then adds 0 to the entropy.
        temperature: positive. softcap: positive or None. ignore_index: the target that marks an ignored token.
    Returns:
        logprob, entropy (T,) float32 (float64 for float64 input), rank (T,) int64; all 0 for ignored tokens.
    Source: ASC scoring, NAT (arXiv 2312.12832) section 3.4.
    """
    # an ignored row is dropped, not multiplied by 0: nothing it holds may matter, NaN included
    valid = targets != ignore_index
    rows = valid.nonzero().squeeze(1)
    z = logits_reference(hidden[rows], weight, bias, softcap)
    at = targets[rows]
    log_p = (z / temperature).log_softmax(-1)
    logprob, entropy = logits_at(log_p, at), -expectation(log_p.exp(), log_p)
    at_target = logits_at(z, at)
    rank = (1 + (z > at_target.unsqueeze(1)).sum(-1)) * known_targets(at, z.shape[1])
    nothing = z.new_zeros(targets.shape[0])
    return (
        nothing.index_copy(0, rows, logprob),
        nothing.index_copy(0, rows, entropy),
        torch.zeros_like(targets).index_copy(0, rows, rank),
    )
