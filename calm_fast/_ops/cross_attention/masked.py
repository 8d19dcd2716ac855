"""Products over the visible pairs of rows and keys alone: what is hidden may hold NaN or Inf.

A hidden pair's weight is 0, but 0 times NaN is NaN, so hidden numbers must not enter a product at all. The two products
are each other's derivatives, and so can be differentiated in any order:

    masked_scores(a, b)_ij = a_i . b_j  if visible_ij, else 0
    masked_sum(w, x)_i     = sum of w_ij x_j over the visible j

`visible` is bool and broadcasts to (B, H, M, N); None = every pair, a plain product.
"""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.core.dispatch import FORWARD, active_transform


def masked_scores(a: torch.Tensor, b: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return a_i . b_j for visible pairs and 0 for hidden ones: a (B, H, M, D), b (B, H, N, D) -> (B, H, M, N)."""
    if visible is None:
        return a @ b.mT
    function = _ForwardScores if active_transform() == FORWARD else _Scores
    scores: torch.Tensor = function.apply(a, b, visible)
    return scores


def masked_sum(weights: torch.Tensor, x: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Return sum_j w_ij x_j over visible pairs: weights (B, H, M, N), x (B, H, N, D) -> (B, H, M, D).

    A row that sees an x_j with a NaN or Inf is NaN as a whole.
    """
    if visible is None:
        return weights @ x
    function = _ForwardSum if active_transform() == FORWARD else _Sum
    total: torch.Tensor = function.apply(weights, x, visible)
    return total


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


class _Scores(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_save)

    @staticmethod
    def forward(a: torch.Tensor, b: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return (a @ b.mT).masked_fill(~visible, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a, b, visible = ctx.saved_tensors
        return masked_sum(grad, b, visible), masked_sum(grad.mT, a, visible.mT), None


class _Sum(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_save)

    @staticmethod
    def forward(weights: torch.Tensor, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        finite = x.isfinite()
        exposed = visible & ~finite.all(dim=-1).unsqueeze(-2)
        weights = weights.masked_fill(~visible, 0.0).masked_fill(exposed, float("nan"))
        return weights @ x.masked_fill(~finite, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights, x, visible = ctx.saved_tensors
        return masked_scores(grad, x, visible), masked_sum(weights.mT, grad, visible.mT), None


# forward mode in classes of their own: torch.compile refuses a function with a jvp


class _ForwardScores(_Scores):
    @staticmethod
    def jvp(ctx: Any, da: torch.Tensor | None, db: torch.Tensor | None, _: None) -> torch.Tensor:
        a, b, visible = ctx.saved_tensors
        left = None if da is None else masked_scores(da, b, visible)
        right = None if db is None else masked_scores(a, db, visible)
        return _total(left, right)


class _ForwardSum(_Sum):
    @staticmethod
    def jvp(ctx: Any, dw: torch.Tensor | None, dx: torch.Tensor | None, _: None) -> torch.Tensor:
        weights, x, visible = ctx.saved_tensors
        left = None if dw is None else masked_sum(dw, x, visible)
        right = None if dx is None else masked_sum(weights, dx, visible)
        return _total(left, right)


def _total(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    if left is None or right is None:
        one = right if left is None else left
        assert one is not None  # a jvp has at least one tangent
        return one
    return left + right
