"""linear_nce on a CPU with matrix units: torch's products, their rows in the compiled library.

Sums of the rows of three products (`csrc/vocabulary/nce_rows_lane.h`) give the statistics of every token. In a training
step of the student alone the same rows become logit gradients where they lie, once the weights in the loss are known.
"""

from __future__ import annotations

import torch

from calm_fast._ops.linear_nce.schedule import Forward, chunk_tokens, combine, step
from calm_fast._ops.vocabulary.products import exact_product, guarded
from calm_fast._ops.vocabulary.schedule import blocks, known_targets, nan_where_unknown, take, valid_rows
from calm_fast._ops.vocabulary.torch_impl import softcap_

# Elements of a tile of neg's logits, which are not kept: 2 MiB in 16 bits.
_TILE = 1 << 20
_NOTHING = torch.finfo(torch.float32).min  # the largest of no logits


class _RowEngine:
    """Engine of `schedule.step` that keeps bare products in the inputs' dtype, as full logits would be stored."""

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
        self.student, self.nat, self.neg = guarded(student), guarded(nat), guarded(neg)
        self.targets, self.weight = targets, weight
        self.bias = None if bias is None else bias.float().contiguous()
        self.softcap, self.temperature = softcap, temperature
        self.columns = min(weight.shape[0], max(1, _TILE // most))
        self.memory = weight.new_empty(2 * most * weight.shape[0])
        self.tile = weight.new_empty(most * self.columns)

    def _kept(self, rows: slice) -> torch.Tensor:
        """Return the memory of a chunk's kept products: (2, t, V)."""
        height, width = rows.stop - rows.start, self.weight.shape[0]
        return self.memory[: 2 * height * width].view(2, height, width)

    def _sums(self, rows: slice, with_student: bool, with_neg: bool) -> torch.Tensor:
        """Multiply, keep the products of student and nat, and return the sums of every tile: (10, tiles, t) float64."""
        kept, found = self._kept(rows), []
        torch.mm(self.nat[rows], self.weight.T, out=kept[1])
        if with_student:
            torch.mm(self.student[rows], self.weight.T, out=kept[0])
        for c in blocks(0, self.weight.shape[0], self.columns):
            neg = None
            if with_neg:
                neg = self.tile[: kept.shape[1] * (c.stop - c.start)].view(kept.shape[1], -1)
                torch.mm(self.neg[rows], self.weight[c].T, out=neg)
            found.append(
                torch.ops.calm_fast._linear_nce_native_rows(
                    kept[0, :, c] if with_student else None, kept[1, :, c], neg,
                    None if self.bias is None else self.bias[c], self.temperature, self.softcap,
                )
            )  # fmt: skip
        return torch.stack(found, dim=1)

    def _target_logits(self, rows: slice) -> torch.Tensor:
        """Return the student's logits of the targets (t,), of any value where a target is not in the vocabulary."""
        at = self.targets[rows].clamp(0, self.weight.shape[0] - 1)
        z = self._kept(rows)[0].gather(1, at.unsqueeze(1)).squeeze(1).float()
        return softcap_(z if self.bias is None else z + self.bias[at], self.softcap)

    def calibrate(self, rows: slice) -> torch.Tensor:
        """See `Engine.calibrate`."""
        return _Statistics(self._sums(rows, False, True), self.temperature).kl().float()

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        """See `Engine.sweep`."""
        found = _Statistics(self._sums(rows, True, not calibrated), self.temperature)
        hard = found.log_total - (self._target_logits(rows) - found.top).clamp(max=0.0)
        hard = hard.clamp(min=0.0).masked_fill(~known_targets(self.targets[rows], self.weight.shape[0]), float("nan"))
        results = (found.norms(), hard, found.soft(), *(() if calibrated else (found.kl(),)))
        return tuple(t.float() for t in results)

    def gradient(self, rows: slice, norms: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """See `Engine.gradient`."""
        kept, targets = self._kept(rows), self.targets[rows]
        hard = nan_where_unknown(coefficients[0], targets, self.weight.shape[0])
        # Gradients of a token are scaled to -1 .. 1 (float16: 1024 times that) before they are rounded, so that its
        # weight in the loss costs no precision.
        size = hard.abs() + coefficients[1].abs() / self.temperature
        size = torch.where(size > 0, size, 1.0) / (1024.0 if self.weight.dtype == torch.float16 else 1.0)
        torch.ops.calm_fast._linear_nce_native_row_gradients(
            torch.stack((hard, coefficients[1])) / size, kept[0], kept[1], self.bias, targets, norms.contiguous(),
            self.temperature, self.softcap,
        )  # fmt: skip
        return exact_product(kept[0], self.weight).mul_(size.unsqueeze(1))


class _Statistics:
    """What the sums of all tiles (10, tiles, t), in float64, say together. Sums of a stream that is missing are 0."""

    def __init__(self, sums: torch.Tensor, temperature: float) -> None:
        tau = 1.0 / temperature
        top, total, soft, nat_top, nat, nat_soft, mean, neg_top, neg, gap = sums
        self.tau, self.top, self.nat_top, neg_most = tau, top.amax(0), nat_top.amax(0), neg_top.amax(0)
        moved, nat_moved, neg_moved = top - self.top, nat_top - self.nat_top, neg_top - neg_most
        # NaN where every logit is -inf, as in a softmax
        self.total = (total * moved.exp()).sum(0).masked_fill(self.top == _NOTHING, float("nan"))
        self.soft_total = (soft * (tau * moved).exp()).sum(0)
        share, neg_share = (tau * nat_moved).exp(), neg_moved.exp()
        self.nat_total = (nat_soft * share).sum(0)
        # the student's logits, relative to the largest of all, averaged over nat's probabilities
        self.mean = ((mean + moved * nat_soft) * share).sum(0) / self.nat_total
        self.log_nat = (nat * nat_moved.exp()).sum(0).log()
        self.neg_total = (neg * neg_share).sum(0)
        # neg - nat, each relative to its largest of all, averaged over neg's probabilities
        self.gap = ((gap + (neg_moved - nat_moved) * neg) * neg_share).sum(0) / self.neg_total
        self.log_total = self.total.log()

    def norms(self) -> torch.Tensor:
        """Return norms (5, t), as `linear_nce_torch_fwd`."""
        return torch.stack((self.top, self.total, self.soft_total, self.nat_top, self.nat_total))

    def soft(self) -> torch.Tensor:
        """Return the soft cross-entropy, (t,)."""
        return self.soft_total.log() - self.tau * self.mean

    def kl(self) -> torch.Tensor:
        """Return KL(p_neg || p_nat), (t,)."""
        return self.gap - self.neg_total.log() + self.log_nat


def linear_nce_row_fwd(
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
    """Compute the loss chunk by chunk; arguments and results as in `linear_nce_torch_fwd`."""
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, neg, targets, seq_ids = take(rows, student, nat, neg, targets.contiguous(), seq_ids)
    count = targets.shape[0]
    most = max(1, min(count, chunk_tokens(count, weight, weight.dtype)))
    engine = _RowEngine(student, nat, neg, targets, weight, bias, softcap, temperature, most)
    parts = [engine.sweep(block) for block in blocks(0, count, most)]
    nothing = weight.new_zeros(0, dtype=torch.float32)
    parts = parts or [(nothing.view(5, 0), nothing, nothing, nothing)]
    norms, hard, soft, kl = (torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
    return combine(norms, hard, soft, kl, seq_ids, rows, tokens, alpha, temperature, offset)


def linear_nce_row_step(
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

    def make_engine(*streams: torch.Tensor, most: int) -> _RowEngine:
        student, nat, neg, targets = streams
        return _RowEngine(student, nat, neg, targets, weight, bias, softcap, temperature, most)

    return step(
        make_engine, student, nat, neg, weight, targets.contiguous(), seq_ids, alpha, temperature, offset,
        ignore_index, weight.dtype,
    )  # fmt: skip
