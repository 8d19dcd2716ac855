"""The NCE loss from hidden states and the LM head they share, without logits in memory."""

from __future__ import annotations

import torch

from calm_fast._ops.linear_nce.reference import linear_nce_reference
from calm_fast._ops.linear_nce.registered import forward_op, step_op
from calm_fast._ops.vocabulary.decide import (
    DTYPES,
    check_dtype,
    check_head,
    check_indices,
    check_numbers,
    check_targets,
    choose,
)
from calm_fast.core.checks import bad_value, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import Decision, check_impl

_OP = "linear_nce"


def linear_nce(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    offset: float = 0.5,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """Return the negative calibrated enhancement loss: cross-entropy plus distillation, calibrated by a second teacher.

        KL_s = mean over the tokens of sequence s of KL(p_neg || p_nat);   beta_s = tanh(KL_s)
        L    = (1 - alpha) mean_t(-log p_student(target_t)) + alpha tau^2 mean_t((offset + beta_s(t)) H_t)
        H_t  = cross-entropy of p_student at temperature tau under p_nat at temperature tau

    with p = softmax(softcap(hidden weight^T + bias)). KL_s is at temperature 1. The vocabulary is swept in blocks:
    forward and backward keep a few numbers per token and never (T, V) logits. Where only the student's hidden states
    require a gradient, the forward pass computes it from logits kept for some whole sequences at a time: 4 products
    instead of 6.

    Args:
        student, nat, neg: (T, d) float32, bfloat16 or float16 (float64 with impl "reference" or "torch"); hidden
            states of the student, the NAT teacher and the negative teacher for the same tokens.
        weight: (V, d), student's dtype and device.
        targets: (T,) int64, 0 <= target < V or ignore_index.
        seq_ids: (T,) int64, 0 <= id < T; tokens of one sequence carry the same id, in any order.
        alpha: share of the distillation.
        temperature: tau > 0.
        offset: added to beta.
        bias: (V,) in weight's dtype, or None; -inf rules a token out.
        softcap: > 0; logits become softcap * tanh(logits / softcap). None = no cap.
        ignore_index: the target that marks an ignored token, which takes no part in the loss or in KL_s.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        a scalar, float32 (float64 for float64 input); 0 if no target is valid. It is differentiable in student, weight
        and bias; weight and bias get gradients through the student's logits only, because the teachers are constants.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Hardware: "native" runs on a CPU, "triton" on a GPU (compute capability 8.0 or newer), the others anywhere.
    Deterministic. Only "reference" has a double backward. Source: NAT/NCE (arXiv 2312.12832) section 3.3; the
    constants are those of its released code, which counts other tokens (docs/ops/linear_nce.md).
    """
    numbers = {"alpha": alpha, "temperature": temperature, "offset": offset}
    decision = decide(
        student, nat, neg, weight, targets, seq_ids,
        **numbers, bias=bias, softcap=softcap, ignore_index=ignore_index, impl=impl,
    )  # fmt: skip
    alpha, temperature, offset = (float(x) for x in (alpha, temperature, offset))
    softcap = None if softcap is None else float(softcap)
    options = (alpha, temperature, offset)
    if decision.impl == "reference":
        return linear_nce_reference(student, nat, neg, weight, targets, seq_ids, *options, bias, softcap, ignore_index)
    op = step_op(decision.impl) if _only_student_learns(student, weight, bias) else forward_op(decision.impl)
    return op(student, nat, neg, weight, bias, targets, seq_ids, *options, softcap, ignore_index)[0]


def _only_student_learns(student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Return True if the student's gradient is the only one: the forward pass can compute it from the same logits."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and student.requires_grad and not trained


def decide(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    offset: float = 0.5,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Decision:
    """Return the implementation that the same call of `linear_nce` would run, and why. Raise the same errors.

    "auto" picks native on a CPU and Triton on a GPU where they can run, else torch. On a CPU it also picks torch
    without vector instructions, and for few tokens with a large weight (`vocabulary.decide.choose`), but not for 16-bit
    inputs where the CPU has matrix units: there native multiplies by torch (`in_tiles`).
    """
    check_impl(_OP, impl)
    check_head(_OP, "student", student, weight, bias)
    _check_teachers(student, nat, neg)
    check_numbers(_OP, temperature, softcap, ignore_index)
    for name, value in (("alpha", alpha), ("offset", offset)):
        check_finite_number(_OP, name, value)
    check_targets(_OP, targets, student, weight.shape[0], ignore_index)
    _check_sequences(seq_ids, student)
    return choose(_OP, impl, student, weight, few=False, tiles=True)


def _check_teachers(student: torch.Tensor, nat: torch.Tensor, neg: torch.Tensor) -> None:
    for name, t in (("nat", nat), ("neg", neg)):
        check_tensor(_OP, name, t, "(T, d)", DTYPES, student.device)
        check_dtype(_OP, name, t, "student", student.dtype)
        if t.shape != student.shape:
            raise bad_value(_OP, name, f"of student's shape {tuple(student.shape)}", f"shape {tuple(t.shape)}")


def _check_sequences(seq_ids: torch.Tensor, student: torch.Tensor) -> None:
    tokens = student.shape[0]
    check_indices(_OP, "seq_ids", seq_ids, tokens, student.device)
    if tokens and values_checked(seq_ids):
        least, most = (int(x) for x in torch.aminmax(seq_ids))
        if least < 0 or most >= tokens:
            raise bad_value(_OP, "seq_ids", f"within 0 <= id < T = {tokens}", f"values from {least} to {most}")
