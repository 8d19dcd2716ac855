"""Loss and student gradient of linear_nce in one pass over chunks of tokens: torch's products, row kernels between.

For a frozen head on a GPU, where torch's products are faster than those inside our kernels. There are two forms: chunks
of whole sequences, or chunks of any tokens and one more product. See docs/ops/linear_nce.md, "On a GPU".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from calm_fast.kernels.common.launching import interpreted, launch
from calm_fast.kernels.linear_nce.configs import CALIBRATE, DzConfig, StatsConfig, dz_config, stats_config
from calm_fast.kernels.linear_nce.fwd import _linear_nce_calibrate_kernel
from calm_fast.kernels.linear_nce.rows import STATS, _linear_nce_dz_kernel, _linear_nce_stats_kernel

__all__ = ["launch_linear_nce_step"]

_INTERPRETED = interpreted(_linear_nce_stats_kernel)

# dz lies within +-1. Times this it is well within float16's range, where probabilities below 2^-24 would vanish.
_SCALE = 2.0**14
_ALIGN = 16  # logits a row is padded to, so that every row begins at a whole vector

# order, ids and chunks of tokens sorted by sequence, as calm_fast/_ops/linear_nce/schedule.py cuts them
Plan = tuple[torch.Tensor, torch.Tensor, list[slice]]


@dataclass(frozen=True)
class _Problem:
    """One call's inputs as the row kernels take them.

    streams: student, nat, neg, (T, d) each. targets, seq_ids: contiguous. tau: 1 / temperature. softcap: 0 for none.
    """

    streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    seq_ids: torch.Tensor
    alpha: float
    tau: float
    offset: float
    softcap: float
    ignore_index: int


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, also for 16-bit operands with a float32 result; into `out`, so that autocast leaves it alone."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter's tensors: a CPU has no such product
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _Chunks:
    """Buffers for a chunk of at most `rows` tokens, with the products and the row kernels that work on them."""

    def __init__(self, problem: _Problem, rows: int, parts: int) -> None:
        """problem: targets and seq_ids in the order in which tokens are worked on. parts: gradient rows a token."""
        self.problem, self.parts = problem, parts
        weight = problem.weight
        v, d = weight.shape
        self.width = triton.cdiv(v, _ALIGN) * _ALIGN
        self.hidden = weight.new_empty((3 * rows, d))
        self.logits = weight.new_empty(3 * rows * self.width)
        self.product = weight.new_empty((parts * rows, d), dtype=torch.float32)
        self.stats = self.product.new_empty(STATS * rows)
        self.terms = self.product.new_empty((3, problem.targets.shape[0]))

    def _rows(self, count: int) -> torch.Tensor:
        """Return the first logits of the buffer as (count, V)."""
        return self.logits[: count * self.width].view(count, self.width)[:, : self.problem.weight.shape[0]]

    def _launch(
        self, kernel: Any, config: StatsConfig | DzConfig, first: int, rows: int, *tensors: torch.Tensor, **named: Any
    ) -> None:
        """Start one program for each token."""
        p = self.problem
        launch(
            kernel,
            rows,
            p.weight.device,
            config,
            *(self.logits, p.bias, p.targets, *tensors),
            first=first,
            rows=rows,
            total=p.targets.shape[0],
            V=p.weight.shape[0],
            stride=self.width,
            tau=p.tau,
            softcap=p.softcap,
            ignore_index=p.ignore_index,
            TAU_IS_1=p.tau == 1.0,
            HAS_BIAS=p.bias is not None,
            HAS_SOFTCAP=p.softcap != 0.0,
            **named,
        )

    def read(self, first: int, rows: int, order: torch.Tensor | None) -> None:
        """Compute logits and statistics of tokens first .. first + rows; order: their rows in the streams."""
        for i, stream in enumerate(self.problem.streams):
            hidden = self.hidden[i * rows : (i + 1) * rows]
            if order is None:
                hidden.copy_(stream[first : first + rows])
            else:
                torch.index_select(stream, 0, order[first : first + rows], out=hidden)
        _multiply(self.hidden[: 3 * rows], self.problem.weight.T, self._rows(3 * rows))
        config = stats_config(self.problem.weight.dtype, _INTERPRETED)
        self._launch(
            _linear_nce_stats_kernel, config, first, rows, self.stats, self.terms,
            LANES=config.lanes, WIDTH=config.width,
        )  # fmt: skip

    def gradients(self, first: int, rows: int, scale: float, losses: torch.Tensor) -> torch.Tensor:
        """Return (parts * rows, d) float32: scale times the gradient, or its parts, of the chunk last read."""
        config = dz_config(_INTERPRETED)
        self._launch(
            _linear_nce_dz_kernel, config, first, rows, self.problem.seq_ids, self.stats, self.terms, losses,
            alpha=self.problem.alpha, offset=self.problem.offset, scale=scale,
            tokens=self.problem.streams[0].shape[0], PARTS=self.parts == 2, BLOCK_J=config.block_j,
            BLOCK=config.block_v,
        )  # fmt: skip
        product = self.product[: self.parts * rows]
        _multiply(self._rows(self.parts * rows), self.problem.weight, product)
        return product


def launch_linear_nce_step(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    alpha: float,
    temperature: float,
    offset: float,
    softcap: float | None,
    ignore_index: int,
    *,
    rows: int,
    plan: Plan | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The NCE loss and its gradient with respect to the student's hidden states; weight and bias are frozen.

    Args:
        student, nat, neg: (T, d) float32, bfloat16 or float16, any strides.
        weight: (V, d), the same dtype.
        bias: (V,) or None.
        targets, seq_ids: (T,) int64; ignore_index marks tokens that do not count.
        alpha, temperature, offset, softcap: as in the op.
        rows: tokens of a chunk of any tokens.
        plan: order (T,), ids (T,) and the chunks of whole sequences (four products). None = chunks of any tokens (five
            products).
    Returns:
        loss () and gradient (T, d), both float32. The gradient of an ignored token is 0.
    Deterministic.
    """
    tokens, device = student.shape[0], student.device
    gradient = torch.zeros((tokens, student.shape[1]), dtype=torch.float32, device=device)
    if tokens == 0:
        return gradient.new_zeros(()), gradient
    problem = _Problem(
        streams=(student, nat, neg),
        weight=weight,
        bias=None if bias is None else bias.contiguous(),
        targets=targets.contiguous(),
        seq_ids=seq_ids.contiguous(),
        alpha=alpha,
        tau=1.0 / temperature,
        offset=offset,
        softcap=softcap or 0.0,
        ignore_index=ignore_index,
    )
    return _any_tokens(problem, rows, gradient) if plan is None else _whole_sequences(problem, plan, gradient)


def _whole_sequences(problem: _Problem, plan: Plan, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradient with one gradient row a token: dz is final as soon as a chunk has been read."""
    order, ids, chunks_of_tokens = plan
    if not chunks_of_tokens:
        return gradient.new_zeros(()), gradient
    count, alpha, tau = chunks_of_tokens[-1].stop, problem.alpha, problem.tau
    order, ids = order[:count], ids[:count]
    rows = max(cut.stop - cut.start for cut in chunks_of_tokens)
    problem = replace(problem, targets=problem.targets.index_select(0, order), seq_ids=ids)
    chunks = _Chunks(problem, rows, parts=1)
    losses = gradient.new_empty(count)
    # the bound of dz before scaling, so that it neither vanishes nor overflows in float16
    size = abs(1.0 - alpha) + abs(alpha) / tau * (abs(problem.offset) + 1.0)
    for cut in chunks_of_tokens:
        first, length = cut.start, cut.stop - cut.start
        chunks.read(first, length, order)
        product = chunks.gradients(first, length, _SCALE / size, losses)
        gradient.index_copy_(0, order[cut], product.mul_(size / _SCALE / count))
    return losses.sum() / count, gradient


def _any_tokens(problem: _Problem, rows: int, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return loss and gradient with two gradient rows a token, weighted when the KL of all sequences is known."""
    targets, tau = problem.targets, problem.tau
    tokens = targets.shape[0]
    half = max(1, min(rows // 2, tokens))  # the gradient's product has `rows` rows here too
    chunks = _Chunks(problem, half, parts=2)
    soft = torch.empty_like(gradient)
    for first in range(0, tokens, half):
        end = min(first + half, tokens)
        chunks.read(first, end - first, None)
        product = chunks.gradients(first, end - first, _SCALE, chunks.stats)
        gradient[first:end] = product[: end - first]
        soft[first:end] = product[end - first :]
    coefficients = gradient.new_empty((2, tokens))
    launch(
        _linear_nce_calibrate_kernel,
        triton.cdiv(tokens, CALIBRATE.block_t),
        targets.device,
        CALIBRATE,
        *(chunks.terms, targets, problem.seq_ids, coefficients),
        T=tokens,
        alpha=problem.alpha,
        tau=tau,
        offset=problem.offset,
        ignore_index=problem.ignore_index,
        BLOCK_T=CALIBRATE.block_t,
        BLOCK_J=CALIBRATE.block_j,
    )
    loss = (coefficients * chunks.terms[:2]).sum()
    hard_weight, soft_weight = (coefficients / _SCALE).unsqueeze(2)
    gradient.mul_(hard_weight).addcmul_(soft.mul_(tau), soft_weight)
    # so far an ignored row is 0 times the weight: NaN if the weight holds an infinity
    return loss, gradient.masked_fill_((targets == problem.ignore_index).unsqueeze(1), 0.0)
