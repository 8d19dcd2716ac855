"""dual_lora on folded factors: one narrow product of x, then work R or m wide, then one product into the output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Folded(NamedTuple):
    """The factors of dual_lora, multiplied out once. R = R_pos + R_neg, positive columns first.

    down: (2R, d_in) = [A_pos; A_neg; -G_pos; G_neg] with G_* = s_* (W_k B_*)^T W_q. The minus sign makes the difference
        of the two gate logits one dot product of the two halves of `down x`.
    up: (d_out, R) = W_v [s_pos B_pos, s_neg B_neg] in the form "none"; (m, R) = C1 [s_pos B_pos, s_neg B_neg] in the
        form "gelu".
    c1 (m, d_out), c2 (d_out, m): the value factors of "gelu"; both None in "none".
    packed_down, packed_c1, packed_last: the panels (`_ops.packed_linear`) of `down`, of `c1` and of the last factor,
        which is `up` in "none" and `c2` in "gelu"; None where nothing is packed.
    """

    down: torch.Tensor
    up: torch.Tensor
    c1: torch.Tensor | None = None
    c2: torch.Tensor | None = None
    packed_down: torch.Tensor | None = None
    packed_c1: torch.Tensor | None = None
    packed_last: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Folded:
        """Return the factors in `dtype`, not packed."""
        return Folded(
            self.down.to(dtype),
            self.up.to(dtype),
            None if self.c1 is None else self.c1.to(dtype),
            None if self.c2 is None else self.c2.to(dtype),
        )


def fold_dual_lora(
    a_pos: torch.Tensor,
    b_pos: torch.Tensor,
    a_neg: torch.Tensor,
    b_neg: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    value: Sequence[torch.Tensor],
    scaling: tuple[float, float],
    activation: str,
    dtype: torch.dtype | None = None,
) -> Folded:
    """Return the folded factors (arguments as in `dual_lora_reference`) in their dtype or `dtype`, differentiable.

    W_k B comes first: it has G R numbers, where W_k^T W_q would be d_out x d_in.
    """
    if dtype is not None:
        a_pos, b_pos, a_neg, b_neg, w_q, w_k = (t.to(dtype) for t in (a_pos, b_pos, a_neg, b_neg, w_q, w_k))
        value = [t.to(dtype) for t in value]
    b = torch.cat((b_pos * scaling[0], b_neg * scaling[1]), dim=1)  # (d_out, R)
    keys = w_k @ b  # (G, R)
    keys_pos, keys_neg = keys.split((b_pos.shape[1], b_neg.shape[1]), dim=1)
    gate = torch.cat((-keys_pos, keys_neg), dim=1).mT @ w_q  # (R, d_in)
    down = torch.cat((a_pos, a_neg, gate))
    if activation == "gelu":
        c1, c2 = value
        return Folded(down, c1 @ b, c1, c2)
    for factor in value:
        b = factor @ b
    return Folded(down, b)


def project(x: torch.Tensor, folded: Folded, lora_x: torch.Tensor | None = None) -> torch.Tensor:
    """Return zg = [z, g] = down x, (..., 2R). Where `lora_x` (x after dropout) is given, z is computed from it."""
    if lora_x is None:
        return F.linear(x, folded.down)
    a, gate = folded.down.chunk(2)
    return torch.cat((F.linear(lora_x, a), F.linear(x, gate)), dim=-1)


def negative_share(zg: torch.Tensor) -> torch.Tensor:
    """Return p_neg = sigmoid(logit) (..., 1), the gate's share of the negative LoRA, from zg (..., 2R) of `project`.

    In float32, float64 for float64.
    """
    return gate_logit(zg).sigmoid()


def gate_logit(zg: torch.Tensor) -> torch.Tensor:
    """Return the gate's logit g . z (..., 1) from zg (..., 2R) of `project`, in float32, float64 for float64."""
    z, g = zg.to(torch.promote_types(zg.dtype, torch.float32)).chunk(2, dim=-1)
    return (z * g).sum(-1, keepdim=True)


def gate_weights(logit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight_pos, weight_neg) = (p_pos + 1/2, p_neg - 1/2), where p_neg = sigmoid(logit) = 1 - p_pos.

    weight_neg is tanh(logit / 2) / 2, which keeps the bits of a small logit that the subtraction would lose. For a
    large one the subtraction is as good, and its derivative p_neg (1 - p_neg) is better.
    """
    weight_neg = torch.where(logit.abs() < 1, (logit / 2).tanh() / 2, logit.sigmoid() - 0.5)
    return 1 - weight_neg, weight_neg


def dual_lora_torch(zg: torch.Tensor, y: torch.Tensor, folded: Folded, r_pos: int) -> torch.Tensor:
    """Return out (..., d_out) from zg (..., 2R) of `project` and the frozen layer's output y (..., d_out).

        "none": y + [weight_pos z_pos, weight_neg z_neg] up^T
        "gelu": y + (weight_pos gelu(u + z_pos up_pos^T) + weight_neg gelu(u + z_neg up_neg^T)) C2^T,  u = y C1^T

    The gate and the mix are float32.
    """
    shape, dtype = y.shape, y.dtype
    zg, y = zg.reshape(-1, zg.shape[-1]), y.reshape(-1, shape[-1])
    r = zg.shape[1] // 2
    weight_pos, weight_neg = gate_weights(gate_logit(zg))
    z_pos, z_neg = zg[:, :r_pos], zg[:, r_pos:r]
    if folded.c1 is None or folded.c2 is None:
        mixed = torch.cat((weight_pos * z_pos, weight_neg * z_neg), dim=1).to(dtype)
        return torch.addmm(y, mixed, folded.up.mT).view(shape)
    base = F.linear(y, folded.c1)
    up_pos, up_neg = folded.up.split((r_pos, r - r_pos), dim=1)
    pos, neg = (F.gelu(torch.addmm(base, z, up.mT)) for z, up in ((z_pos, up_pos), (z_neg, up_neg)))
    mixed = (weight_pos * pos + weight_neg * neg).to(dtype)
    return torch.addmm(y, mixed, folded.c2.mT).view(shape)


def dual_lora_backward_torch(
    dout: torch.Tensor, zg: torch.Tensor, y: torch.Tensor, folded: Folded, r_pos: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of zg, y, up, c1 and c2 of `dual_lora_torch` on flat tensors.

    For a forward pass that autograd cannot see into. docs/ops/dual_lora.md derives the formulas. Everything but the
    products is float32.

    Args:
        dout, y: (T, d_out). zg: (T, 2R). folded: its `down` is not read.
    Returns:
        (dzg, dy, dup, dc1, dc2); dc1 and dc2 are None in the form "none".
    """
    r, dtype = zg.shape[1] // 2, y.dtype
    wide = zg.to(torch.promote_types(dtype, torch.float32))
    z, g = wide.chunk(2, dim=-1)
    logit = gate_logit(zg)
    p_neg, weights = logit.sigmoid(), gate_weights(logit)
    if folded.c1 is None or folded.c2 is None:
        weighted = [w * part for w, part in zip(weights, z.split((r_pos, r - r_pos), dim=1), strict=True)]
        dmix = (dout @ folded.up).to(wide.dtype)
        dpos, dneg = (dmix * z).split((r_pos, r - r_pos), dim=1)
        dlogit = p_neg * (1 - p_neg) * (dneg.sum(-1, keepdim=True) - dpos.sum(-1, keepdim=True))
        dz = torch.cat([w * d for w, d in zip(weights, dmix.split((r_pos, r - r_pos), dim=1), strict=True)], dim=1)
        dup = dout.mT @ torch.cat(weighted, dim=1).to(dtype)
        return torch.cat((dz + dlogit * g, dlogit * z), dim=1).to(dtype), dout, dup, None, None
    u = F.linear(y, folded.c1)
    parts = [
        (torch.addmm(u, part, up.mT).to(wide.dtype), part, up, w)
        for part, up, w in zip(
            zg[:, :r].split((r_pos, r - r_pos), dim=1), folded.up.split((r_pos, r - r_pos), dim=1), weights, strict=True
        )
    ]
    dmix = (dout @ folded.c2).to(wide.dtype)
    pos, neg = (F.gelu(h) for h, *_ in parts)
    dlogit = p_neg * (1 - p_neg) * (dmix * (neg - pos)).sum(-1, keepdim=True)
    dh = [torch.ops.aten.gelu_backward(w * dmix, h).to(dtype) for h, _, _, w in parts]
    dz = torch.cat([d @ up for d, (_, _, up, _) in zip(dh, parts, strict=True)], dim=1)
    dup = torch.cat([d.mT @ part for d, (_, part, _, _) in zip(dh, parts, strict=True)], dim=1)
    du, mix = dh[0] + dh[1], (weights[0] * pos + weights[1] * neg).to(dtype)
    dzg = torch.cat((dz + dlogit * g, dlogit * z), dim=1).to(dtype)
    return dzg, torch.addmm(dout, du, folded.c1), dup, du.mT @ y, dout.mT @ mix
