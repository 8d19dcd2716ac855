"""Definition of dual_lora: a frozen linear layer with a positive and a negative LoRA, integrated by a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def dual_lora_reference(
    x: torch.Tensor,
    y: torch.Tensor,
    a_pos: torch.Tensor,
    b_pos: torch.Tensor,
    a_neg: torch.Tensor,
    b_neg: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    value: Sequence[torch.Tensor],
    scaling: tuple[float, float],
    activation: str = "none",
) -> torch.Tensor:
    """Compute both forms of the attention-gated integration, unfolded, as the equations read.

        h_* = s_* B_* A_* x                      (activation "gelu", the released code: h_* = y + s_* B_* A_* x)
        (p_pos, p_neg) = softmax( (W_q x) . (W_k h_pos), (W_q x) . (W_k h_neg) )
        "none":  out = y + W_v ( (p_pos + 1/2) h_pos + (p_neg - 1/2) h_neg )
        "gelu":  out = y + (p_pos + 1/2) f(h_pos) + (p_neg - 1/2) f(h_neg),   f(h) = C2 gelu(C1 h), exact gelu

    Args:
        x: (..., d_in), any float dtype.
        y: (..., d_out), the frozen layer's output for x.
        a_pos (R_pos, d_in), b_pos (d_out, R_pos), a_neg (R_neg, d_in), b_neg (d_out, R_neg): the LoRA factors.
        w_q (G, d_in), w_k (G, d_out): the gate.
        value: (w_v (d_out, d_out),) or (c1 (m, d_out), c2 (d_out, m)) with w_v = c2 c1; "gelu" needs two factors.
        scaling: (s_pos, s_neg).
        activation: "none" (the paper's form) or "gelu" (the released code's).
    Returns:
        out (..., d_out) in y's dtype, computed in float32 (float64 for float64).
    Autograd differentiates it any number of times. Arguments are not checked.
    Source: NAT (arXiv 2312.12832) section 3.2 and its released code.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    dtype = y.dtype
    x, y, a_pos, b_pos, a_neg, b_neg, w_q, w_k, *value = (
        t.to(compute) for t in (x, y, a_pos, b_pos, a_neg, b_neg, w_q, w_k, *value)
    )
    h_pos = scaling[0] * F.linear(F.linear(x, a_pos), b_pos)
    h_neg = scaling[1] * F.linear(F.linear(x, a_neg), b_neg)
    if activation == "gelu":
        h_pos, h_neg = y + h_pos, y + h_neg
    query = F.linear(x, w_q)
    logits = [(query * F.linear(h, w_k)).sum(-1) for h in (h_pos, h_neg)]
    p_pos, p_neg = torch.stack(logits).softmax(0).unsqueeze(-1).unbind()
    weight_pos, weight_neg = p_pos + 0.5, p_neg - 0.5

    if activation == "gelu":
        down, up = value

        def f(h: torch.Tensor) -> torch.Tensor:
            return F.linear(F.gelu(F.linear(h, down)), up)

        out = y + weight_pos * f(h_pos) + weight_neg * f(h_neg)
    else:
        mixed = weight_pos * h_pos + weight_neg * h_neg
        for factor in value:
            mixed = F.linear(mixed, factor)
        out = y + mixed
    return out.to(dtype)
