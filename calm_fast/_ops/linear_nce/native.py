"""linear_nce in the compiled library; loss weights and the products of the backward pass are torch's.

With matrix units all products are torch's (`tiles`), and the gradients of a trained head those of the torch
implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.linear_nce.schedule import Forward, combine, step
from calm_fast._ops.linear_nce.tiles import linear_nce_row_fwd, linear_nce_row_step
from calm_fast._ops.linear_nce.torch_impl import linear_nce_torch_bwd
from calm_fast._ops.vocabulary.decide import in_tiles
from calm_fast._ops.vocabulary.schedule import HeadGradients, head_gradients, known_targets, put, take, valid_rows


def linear_nce_native_fwd(
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
) -> Forward:
    """Compute the loss from the tokens that are not ignored; arguments and results as in `linear_nce_torch_fwd`."""
    if in_tiles("linear_nce", student):
        return linear_nce_row_fwd(
            student, nat, neg, weight, bias, targets, seq_ids, alpha, temperature, offset, softcap, ignore_index
        )
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    streams = take(rows, student, nat, neg)
    targets, seq_ids = take(rows, targets.contiguous(), seq_ids)
    bias = None if bias is None else bias.float().contiguous()
    known = known_targets(targets, weight.shape[0])
    norms, losses, _ = torch.ops.calm_fast._linear_nce_native_fwd(
        *streams, weight, bias, targets * known, temperature, softcap, None
    )
    hard, soft, kl = losses
    hard = hard.masked_fill(~known, float("nan"))
    return combine(norms, hard, soft, kl, seq_ids, rows, tokens, alpha, temperature, offset)


def linear_nce_native_bwd(
    dloss: torch.Tensor,
    student: torch.Tensor,
    nat: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    norms: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    needs: Sequence[bool],
) -> HeadGradients:
    """Compute the gradients of student, weight and bias; arguments and results as in `linear_nce_torch_bwd`."""
    if in_tiles("linear_nce", student):
        return linear_nce_torch_bwd(
            dloss, student, nat, weight, bias, targets, norms, coefficients, temperature, softcap, ignore_index, needs
        )
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, targets = take(rows, student, nat, targets.contiguous())
    norms, coefficients = (t if rows is None else t[:, rows] for t in (norms, coefficients * dloss))
    bias = None if bias is None else bias.float().contiguous()
    known = known_targets(targets, weight.shape[0])
    targets, coefficients = targets * known, _nan_unless(known, coefficients)

    def fill(r: slice, c: slice, chunk: torch.Tensor) -> None:
        torch.ops.calm_fast._linear_nce_native_dlogits(
            coefficients[:, r].contiguous(), student[r], nat[r], weight, bias, targets[r], norms[:, r].contiguous(),
            temperature, softcap, c.start, chunk.T,
        )  # fmt: skip

    dstudent, dweight, dbias = head_gradients(student, weight, needs, fill, by_token=False)
    return put(rows, dstudent, tokens) if needs[0] else dstudent, dweight, dbias


def _nan_unless(known: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Return coefficients (2, t) with NaN for the cross-entropy of a target that is not in the vocabulary."""
    return torch.stack((coefficients[0].masked_fill(~known, float("nan")), coefficients[1]))


class _NativeEngine:
    """Engine of `schedule.step`; kept logits are float32, or float16 relative to the target's for bfloat16 inputs."""

    def __init__(
        self,
        student: torch.Tensor,
        nat: torch.Tensor,
        neg: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        temperature: float,
        most: int,
    ) -> None:
        """Take the tokens (t, d) and (t,) in the order of the schedule; most: tokens of the largest chunk."""
        self.student, self.nat, self.neg = student, nat, neg
        self.known = known_targets(targets, weight.shape[0])
        self.targets = targets * self.known
        self.weight, self.softcap, self.temperature = weight, softcap, temperature
        self.bias = None if bias is None else bias.float().contiguous()
        self.memory = weight.new_empty(2 * weight.shape[0] * _padded(most), dtype=_kept_dtype(weight))
        # the logits that the kept ones of the chunk swept last are relative to
        self.references = weight.new_empty(0)

    def _kept(self, rows: slice) -> torch.Tensor:
        """Return the memory of a chunk's kept logits: (2, V, t), t in whole vectors."""
        height, width = self.weight.shape[0], _padded(rows.stop - rows.start)
        return self.memory[: 2 * height * width].view(2, height, width)

    def _sweep(
        self, rows: slice, student: torch.Tensor | None, neg: torch.Tensor | None, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return norms (5, t), losses (3, t) and references of a chunk."""
        norms, losses, references = torch.ops.calm_fast._linear_nce_native_fwd(
            student, self.nat[rows], neg, self.weight, self.bias, self.targets[rows], self.temperature, self.softcap,
            kept,
        )  # fmt: skip
        return norms, losses, references

    def calibrate(self, rows: slice) -> torch.Tensor:
        """See `Engine.calibrate`."""
        return self._sweep(rows, None, self.neg[rows], None)[1][2]

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        """See `Engine.sweep`."""
        neg = None if calibrated else self.neg[rows]
        norms, losses, self.references = self._sweep(rows, self.student[rows], neg, self._kept(rows))
        losses[0].masked_fill_(~self.known[rows], float("nan"))
        return norms, *losses[: 2 if calibrated else 3]

    def gradient(self, rows: slice, norms: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """See `Engine.gradient`."""
        gradient: torch.Tensor = torch.ops.calm_fast._linear_nce_native_gradient(
            _nan_unless(self.known[rows], coefficients), self._kept(rows), self.references, self.weight,
            self.targets[rows], norms, self.temperature, self.softcap,
        )  # fmt: skip
        return gradient


def _kept_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the dtype of a kept logit; for bfloat16 inputs one with three more bits."""
    return torch.float16 if weight.dtype == torch.bfloat16 else torch.float32


def _padded(tokens: int) -> int:
    """Round up to whole vectors of 16 tokens."""
    return -(-tokens // 16) * 16


def linear_nce_native_step(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss and the student's gradient in one pass; arguments and results as in `linear_nce_torch_step`."""
    if in_tiles("linear_nce", student):
        return linear_nce_row_step(
            student, nat, neg, weight, bias, targets, seq_ids, alpha, temperature, offset, softcap, ignore_index
        )

    def make_engine(*streams: torch.Tensor, most: int) -> _NativeEngine:
        student, nat, neg, targets = streams
        return _NativeEngine(student, nat, neg, targets, weight, bias, softcap, temperature, most)

    return step(
        make_engine, student, nat, neg, weight, targets.contiguous(), seq_ids, alpha, temperature, offset,
        ignore_index, _kept_dtype(weight),
    )  # fmt: skip
