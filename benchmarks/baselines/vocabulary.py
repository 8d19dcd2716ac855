"""Baselines of linear_nce and linear_logprob: plain torch with full or chunked logits, and other packages' losses.

Shapes: hidden states (T, d), weight (V, d), targets and seq_ids (T,) int64.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from calm_fast.benchmarks.registry import CannotRunError


def log_softmax_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities (T,) from full logits, every step in the tensors' dtype."""
    return F.linear(hidden, weight).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def chunked_logprob(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return `log_softmax_logprob` with the logits of `chunk` tokens in memory; backward computes them again."""
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(log_softmax_logprob, h, weight, t, use_reentrant=False) for h, t in parts])
    return torch.cat([log_softmax_logprob(h, weight, t) for h, t in parts])


def mean_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean () of -logprob."""
    return -log_softmax_logprob(hidden, weight, targets).mean()


def three_softmax_nce(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
) -> torch.Tensor:
    """Return the NCE loss () as released (alpha 1/2, temperature 1, offset 1/2) from three full log-softmaxes."""
    log_p = F.linear(student, weight).log_softmax(-1)
    with torch.no_grad():
        log_nat, log_neg = (F.linear(h, weight).log_softmax(-1) for h in (nat, neg))
        kl = (log_neg.exp() * (log_neg - log_nat)).sum(-1)
        members = torch.zeros_like(kl).index_add(0, seq_ids, torch.ones_like(kl))
        per_sequence = torch.zeros_like(kl).index_add(0, seq_ids, kl) / members.clamp(min=1)
        beta = torch.tanh(per_sequence)[seq_ids]
    soft = -(log_nat.exp() * log_p).sum(-1)
    hard = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    return (0.5 * hard + 0.5 * (0.5 + beta) * soft).mean()


def chunked_nce(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    chunk: int,
    head: bool,
) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients of student and, with `head`, of weight, with `chunk` tokens' logits in memory.

    Each chunk's gradients are taken before the next chunk begins, so nothing is computed twice, as checkpoints would.
    chunk: a number of tokens that holds whole sequences, because beta belongs to a sequence.
    """
    w = weight.detach().requires_grad_(head)
    parts = zip(*(t.split(chunk) for t in (student, nat, neg, targets, seq_ids)), strict=True)
    losses: list[torch.Tensor] = []
    grads: list[torch.Tensor] = []
    for s, n, g, own, ids in parts:
        leaf = s.detach().requires_grad_()
        loss = three_softmax_nce(leaf, n, g, w, own, ids - ids[0]) * (len(own) / len(targets))
        loss.backward()  # adds to w's gradient
        losses.append(loss.detach())
        grads.append(cast(torch.Tensor, leaf.grad))  # backward has set it
    found = {"loss": torch.stack(losses).sum(), "d_student": torch.cat(grads)}
    return found | {"d_weight": cast(torch.Tensor, w.grad)} if head else found


def js_divergence(student: torch.Tensor, teacher: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the mean Jensen-Shannon divergence () of two next-token distributions, a related loss of two streams."""
    log_p, log_q = (F.linear(h, weight).log_softmax(-1) for h in (student, teacher))
    middle = (0.5 * (log_p.exp() + log_q.exp())).log()
    parts = [(x.exp() * (x - middle)).sum(-1) for x in (log_p, log_q)]
    return 0.5 * (parts[0] + parts[1]).mean()


def imported(package: str, module: str, name: str) -> Callable[..., Any]:
    """Return `name` of `module`.

    Raises:
        CannotRunError: `package` is not installed or has moved it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as reason:
        raise CannotRunError(f"{package} cannot be used here: {reason}") from reason
