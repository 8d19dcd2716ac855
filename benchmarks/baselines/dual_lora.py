"""Baselines of dual_lora: the released and the paper's formula, step by step and rearranged by hand, and one LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from calm_fast.benchmarks.baselines.vocabulary import imported

Weights = Mapping[str, torch.Tensor]


def formula(w: Weights, x: torch.Tensor, y: torch.Tensor, scale: float, variant: str) -> torch.Tensor:
    """Return the layer's output for x (T, d_in) and the base output y (T, d_out), one product per step.

    w: a_pos, b_pos, a_neg, b_neg, w_q, w_k, and w_v or c1 and c2. variant: "released" or "paper".
    """
    h_pos = scale * F.linear(F.linear(x, w["a_pos"]), w["b_pos"])
    h_neg = scale * F.linear(F.linear(x, w["a_neg"]), w["b_neg"])
    if variant == "released":
        h_pos, h_neg = y + h_pos, y + h_neg
    query = F.linear(x, w["w_q"])
    logits = torch.stack([(query * F.linear(h, w["w_k"])).sum(-1) for h in (h_pos, h_neg)], -1)
    p_pos, p_neg = logits.softmax(-1).unsqueeze(-2).unbind(-1)
    if variant == "released":
        f_pos, f_neg = (F.linear(F.gelu(F.linear(h, w["c1"])), w["c2"]) for h in (h_pos, h_neg))
        return y + (p_pos + 0.5) * f_pos + (p_neg - 0.5) * f_neg
    mixed = (p_pos + 0.5) * h_pos + (p_neg - 0.5) * h_neg
    if "w_v" in w:
        return y + F.linear(mixed, w["w_v"])
    return y + F.linear(F.linear(mixed, w["c1"]), w["c2"])


def concatenated(w: Weights, x: torch.Tensor, y: torch.Tensor, scale: float, variant: str) -> torch.Tensor:
    """Return the result of `formula`, arranged as a careful user would, with nothing precomputed from the weights.

    The factors of both LoRAs share one product. The query goes through W_k instead of both LoRAs' outputs. Both outputs
    go through the value's first factor at once and are mixed before the second, which is linear.
    """
    rank = w["a_pos"].shape[0]
    u = scale * F.linear(x, torch.cat([w["a_pos"], w["a_neg"]]))
    query = F.linear(x, w["w_q"]) @ w["w_k"]
    if variant == "released":
        each, up = u.unflatten(-1, (2, rank)).transpose(0, 1), torch.stack([w["b_pos"], w["b_neg"]]).transpose(1, 2)
        h = torch.baddbmm(y.expand(2, *y.shape), each, up)
        p_pos, p_neg = (query * h).sum(-1).softmax(0).unsqueeze(-1)
        f_pos, f_neg = F.gelu(F.linear(h, w["c1"]))
        return torch.addmm(y, (p_pos + 0.5) * f_pos + (p_neg - 0.5) * f_neg, w["c2"].T)
    b = torch.cat([w["b_pos"], w["b_neg"]], 1)
    u_pos, u_neg = u.split(rank, -1)
    p_pos, p_neg = (query @ b * u).unflatten(-1, (2, rank)).sum(-1).softmax(-1).split(1, -1)
    mixed = F.linear(torch.cat([(p_pos + 0.5) * u_pos, (p_neg - 0.5) * u_neg], -1), b)
    if "w_v" in w:
        return torch.addmm(y, mixed, w["w_v"].T)
    return torch.addmm(y, F.linear(mixed, w["c1"]), w["c2"].T)


def single_lora(w: Weights, x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    """Return y + s B (A x), which PEFT computes for one LoRA."""
    return y + F.linear(F.linear(x, w["a_pos"]), w["b_pos"]) * scale


def peft_layer(base: nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    """Return PEFT's layer around `base`, with one LoRA of factors a (R, d_in) and b (d_out, R).

    Raises:
        CannotRunError: PEFT is not installed.
    """
    config = imported("peft", "peft", "LoraConfig")
    inject = imported("peft", "peft", "inject_adapter_in_model")
    model, rank = nn.ModuleDict({"base": base}), a.shape[0]
    inject(config(r=rank, lora_alpha=scale * rank, lora_dropout=0.0, target_modules=["base"], bias="none"), model)
    layer: Any = model["base"]  # PEFT's own class
    for part, values in ((layer.lora_A["default"], a), (layer.lora_B["default"], b)):
        part.weight = nn.Parameter(values.detach().clone())
    return layer
