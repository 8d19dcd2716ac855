"""Definition of linear_nce: the NCE (negative calibrated enhancement) loss from hidden states and a shared LM head."""

from __future__ import annotations

import torch

from calm_fast._ops.vocabulary.reference import expectation, logits_at, logits_reference


def linear_nce_reference(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
    offset: float = 0.5,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Return the NCE loss, computed with all logits in memory.

        KL_s = sum_t m_t KL(p_neg(.|t) || p_nat(.|t)) / sum_t m_t over the tokens of sequence s;  beta_s = tanh(KL_s)
        L_kd = tau^2 sum_t m_t (offset + beta_s(t)) H(p_nat^tau(.|t), p_student^tau(.|t)) / sum_t m_t
        L    = (1 - alpha) L_ce + alpha L_kd,   L_ce the mean of -log p_student(target) over the tokens with m_t = 1

    m_t = 1 where the target is not ignore_index. KL_s is at temperature 1 for every tau. Without a valid target
    L = 0, with zero gradients.

    Args:
        student, nat, neg: (T, d) hidden states of the student and the two teachers, any float dtype.
        weight: (V, d), the LM head they share. bias: (V,) or None; -inf rules a token out, which then adds 0.
        targets: (T,) int64; one outside the vocabulary makes the loss NaN. seq_ids: (T,) int64, the sequence of each
            token; one outside 0 <= id < T makes the loss NaN.
        alpha, temperature (tau), offset: numbers. softcap: positive or None.
        ignore_index: the target that marks m_t = 0.
    Returns:
        a scalar, float32 (float64 for float64 input). Gradients reach student, and weight and bias through the
        student's logits only; the teachers are constants.
    Source: NAT/NCE (arXiv 2312.12832) section 3.3; alpha = 1/2, tau = 1 and offset 1/2 are the released code's.
    """
    # an ignored row is dropped, not multiplied by 0: nothing it holds may matter, NaN included
    valid = targets != ignore_index
    student, nat, neg, targets, seq_ids = (t[valid] for t in (student, nat, neg, targets, seq_ids))
    z = logits_reference(student, weight, bias, softcap)
    if targets.numel() == 0:
        # 0, and still a function of student and weight
        return z.sum()
    with torch.no_grad():
        z_nat = logits_reference(nat, weight, bias, softcap)
        z_neg = logits_reference(neg, weight, bias, softcap)
        log_nat, log_neg = z_nat.log_softmax(-1), z_neg.log_softmax(-1)
        kl = expectation(log_neg.exp(), log_neg - log_nat)  # (valid tokens,)
        sequences, index = seq_ids.unique(return_inverse=True)
        per_sequence = kl.new_zeros(sequences.numel()).index_add(0, index, kl)
        beta = torch.tanh(per_sequence / index.bincount())[index]  # (valid tokens,)
        beta = beta.masked_fill((seq_ids < 0) | (seq_ids >= valid.numel()), float("nan"))
        teacher = (z_nat / temperature).softmax(-1)
    cross_entropy = -expectation(teacher, (z / temperature).log_softmax(-1))
    distillation = temperature**2 * ((offset + beta) * cross_entropy).mean()
    hard = -logits_at(z.log_softmax(-1), targets).mean()
    return (1 - alpha) * hard + alpha * distillation
