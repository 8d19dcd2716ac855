"""linear_nce in torch, from blocked products and running sums: no (T, V) logits, forward or backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.linear_nce.schedule import Forward, combine, step
from calm_fast._ops.vocabulary.products import exact_product
from calm_fast._ops.vocabulary.schedule import (
    HeadGradients,
    head_gradients,
    nan_where_unknown,
    put,
    take,
    valid_rows,
    within,
)
from calm_fast._ops.vocabulary.torch_impl import (
    LogitTiles,
    RunningSum,
    TargetLogits,
    powers,
    subtract_at_targets_,
)

# norms (5, t), hard and soft cross-entropy (t,), KL (t,)
_Statistics = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _sweep(
    tiles: LogitTiles,
    student: torch.Tensor | None,
    nat: torch.Tensor,
    neg: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    keep: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> _Statistics:
    """Sweep the vocabulary for one block of tokens.

    Args:
        student, nat, neg: (t, d). Without a student only the KL is meaningful, without neg everything but the KL.
        targets: (t,).
        keep: two tensors (t, V) in the inputs' dtype that receive the products of student and nat.
    Returns:
        norms (5, t), as `linear_nce_torch_fwd`; the hard and the soft cross-entropy and KL(p_neg || p_nat), each (t,).
    """
    t, like, tau = targets.shape[0], tiles.like, 1.0 / temperature
    # the last scale weights the soft cross-entropy, temperature 1 is the first; they may be one
    scales = (1.0,) if temperature == 1.0 else (1.0, tau)
    student_sum, nat_sum, neg_sum = RunningSum(t, like, *scales), RunningSum(t, like, *scales), RunningSum(t, like, 1.0)
    at_target = TargetLogits(targets, tiles.columns, tiles.weight.shape[0], like)
    for columns in tiles.column_blocks():
        keep_student, keep_nat = (None, None) if keep is None else (keep[0][:, columns], keep[1][:, columns])
        z = None if student is None else tiles.logits(student, columns, 0, keep_student)
        z_nat = tiles.logits(nat, columns, 1, keep_nat)
        z_neg = None if neg is None else tiles.logits(neg, columns, 2)
        spare = tiles.spare(z_nat)
        # from here on the tiles hold differences to the running maxima, and the averages are those of differences:
        # two large averages would cancel
        moved_nat = nat_sum.raise_(z_nat)
        if z is not None:
            at_target.add(z, columns)
            nat_sum.follow(student_sum.raise_(z))
            student_sum.add(z, spare)
        weights = nat_sum.add(z_nat, spare)
        if z is not None:
            nat_sum.add_weighted(weights, tiles.zero_banned_(z))
        if z_neg is not None:
            neg_sum.follow(neg_sum.raise_(z_neg) - moved_nat)
            weights = neg_sum.add(z_neg, spare)
            neg_sum.add_weighted(weights, tiles.zero_banned_(z_neg).sub_(tiles.zero_banned_(z_nat)))
    norms = torch.stack(
        (student_sum.top, student_sum.totals[0], student_sum.totals[-1], nat_sum.top, nat_sum.totals[-1])
    )
    hard = student_sum.log_total() + (student_sum.top - at_target.values)
    kl = neg_sum.mean() - neg_sum.log_total() + nat_sum.log_total()
    return norms, hard, student_sum.log_total(-1) - tau * nat_sum.mean(), kl


def linear_nce_torch_fwd(
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
    """Compute `linear_nce_reference` block by block; the arguments have been checked.

    Returns:
        the loss (); norms (5, T): the largest logit of the student and its sums exp(z - top) and exp((z - top) / tau),
        the largest logit of nat and its sum exp((z - top) / tau); coefficients (2, T): factors of the hard and the soft
        cross-entropy in the loss. norms and coefficients are 0 for ignored tokens. All are in the compute dtype.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, neg, targets, seq_ids = take(rows, student, nat, neg, targets, seq_ids)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0], streams=3)
    parts = [
        _sweep(tiles, student[block], nat[block], neg[block], targets[block], temperature)
        for block in tiles.row_blocks(slice(0, targets.shape[0]))
    ]
    nothing = tiles.like.new_zeros(0)
    parts = parts or [(nothing.view(5, 0), nothing, nothing, nothing)]
    norms, hard, soft, kl = (torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
    return combine(norms, hard, soft, kl, seq_ids, rows, tokens, alpha, temperature, offset)


def linear_nce_torch_bwd(
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
    """Compute the gradients of student, weight and bias from logit tiles that are computed again.

        dz = dloss (c_hard (softmax(z) - 1_target) + c_soft / tau (softmax(z / tau) - softmax(z_nat / tau)))

    Args:
        dloss: (). norms (5, T), coefficients (2, T): as returned by the forward pass.
        needs: which of the three gradients are wanted.
    Returns:
        (T, d), (V, d) and (V,) in the inputs' dtype; an empty tensor for a gradient that is not wanted.
    """
    rows, tokens = valid_rows(targets, ignore_index), student.shape[0]
    student, nat, targets = take(rows, student, nat, targets)
    norms, coefficients = (t if rows is None else t[:, rows] for t in (norms, coefficients))
    hard, soft = coefficients * dloss
    hard, soft = nan_where_unknown(hard, targets, weight.shape[0]), soft / temperature
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0], streams=2)

    def fill(chunk_rows: slice, chunk_columns: slice, chunk: torch.Tensor) -> None:
        for r in tiles.row_blocks(chunk_rows):
            for c in tiles.column_blocks(chunk_columns):
                z, z_nat = tiles.logits(student[r], c, 0), tiles.logits(nat[r], c, 1)
                dz = _dlogits(tiles, z, z_nat, c, norms[:, r], hard[r], soft[r], temperature, targets[r])
                chunk[within(r, chunk_rows), within(c, chunk_columns)] = dz

    dstudent, dweight, dbias = head_gradients(student, weight, needs, fill)
    return put(rows, dstudent, tokens) if needs[0] else dstudent, dweight, dbias


def _dlogits(
    tiles: LogitTiles,
    z: torch.Tensor,
    z_nat: torch.Tensor,
    columns: slice,
    norms: torch.Tensor,
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float,
    targets: torch.Tensor,
) -> torch.Tensor:
    """Return one tile of dz (t, columns) from two tiles of logits, in the compute dtype.

    norms: (5, t). hard, soft, targets: (t,); `soft` is already divided by the temperature.
    """
    tau = 1.0 / temperature
    top, total, total_soft, top_nat, total_nat = norms
    # a probability is a power over the sum of powers; the division is one per token
    dz = powers(z, top, tau, tiles.spare(z))
    if temperature == 1.0:
        dz.mul_(((hard + soft) / total).unsqueeze(1))
    else:
        dz.mul_((soft / total_soft).unsqueeze(1))
        dz.addcmul_(powers(z, top, 1.0, tiles.spare(z, 1)), (hard / total).unsqueeze(1))
    dz.addcmul_(powers(z_nat, top_nat, tau, z_nat), (soft / total_nat).unsqueeze(1), value=-1.0)
    subtract_at_targets_(dz, targets, hard, columns)
    return tiles.softcap_backward_(dz, z)


# ---- loss and gradient in one pass, for a frozen head ---------------------------------------------------------------


class _TorchEngine:
    """Engine of `schedule.step` that keeps bare products in the inputs' dtype, as full logits would be stored."""

    def __init__(
        self,
        student: torch.Tensor,
        nat: torch.Tensor,
        neg: torch.Tensor,
        targets: torch.Tensor,
        tiles: LogitTiles,
        temperature: float,
        most: int,
    ) -> None:
        """Take the tokens (t, d) and (t,) in the order of the schedule; most: tokens of the largest chunk."""
        self.student, self.nat, self.neg, self.targets = student, nat, neg, targets
        self.tiles, self.weight, self.temperature = tiles, tiles.weight, temperature
        self.memory = self.weight.new_empty((2, most * self.weight.shape[0]))

    def _kept(self, rows: slice) -> torch.Tensor:
        """Return the memory of a chunk's kept products: (2, t, V)."""
        height, width = rows.stop - rows.start, self.weight.shape[0]
        return self.memory[:, : height * width].view(2, height, width)

    def calibrate(self, rows: slice) -> torch.Tensor:
        """See `Engine.calibrate`."""
        found = [
            _sweep(self.tiles, None, self.nat[r], self.neg[r], self.targets[r], self.temperature)
            for r in self.tiles.row_blocks(rows)
        ]
        return torch.cat([kl for _, _, _, kl in found])

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        """See `Engine.sweep`."""
        kept, parts = self._kept(rows), []
        for r in self.tiles.row_blocks(rows):
            neg, block = None if calibrated else self.neg[r], within(r, rows)
            keep = kept[0, block], kept[1, block]
            parts.append(_sweep(self.tiles, self.student[r], self.nat[r], neg, self.targets[r], self.temperature, keep))
        return tuple(torch.cat(p, dim=-1) for p in zip(*parts, strict=True))[: 3 if calibrated else 4]

    def gradient(self, rows: slice, norms: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """See `Engine.gradient`."""
        tiles, kept = self.tiles, self._kept(rows)
        hard = nan_where_unknown(coefficients[0], self.targets[rows], self.weight.shape[0])
        soft = coefficients[1] / self.temperature
        # Scale a token's logit gradients to -1 .. 1 before they are rounded, so that its weight in the loss costs no
        # precision. In float16, whose smallest number is 2^-24, to -1024 .. 1024.
        size = hard.abs() + soft.abs()
        size = torch.where(size > 0, size, 1.0) / (1024.0 if self.weight.dtype == torch.float16 else 1.0)
        hard, soft = hard / size, soft / size
        for r in tiles.row_blocks(slice(0, rows.stop - rows.start)):
            targets = self.targets[rows][r]
            for c in tiles.column_blocks():
                z, z_nat = (tiles.finish(kept[i, r, c], c, i) for i in (0, 1))
                dz = _dlogits(tiles, z, z_nat, c, norms[:, r], hard[r], soft[r], self.temperature, targets)
                kept[0, r, c] = dz
        return exact_product(kept[0], self.weight).mul_(size.unsqueeze(1))


def linear_nce_torch_step(
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
    """Compute the loss and the student's gradient at dloss = 1 without computing logits twice; see `schedule.step`.

    Returns:
        the loss () and the gradient (T, d), both in the compute dtype; the gradient is 0 for ignored tokens.
    """

    def make_engine(*streams: torch.Tensor, most: int) -> _TorchEngine:
        student, nat, neg, targets = streams
        tiles = LogitTiles(weight, bias, softcap, most, streams=3)
        return _TorchEngine(student, nat, neg, targets, tiles, temperature, most)

    return step(
        make_engine, student, nat, neg, weight, targets, seq_ids, alpha, temperature, offset, ignore_index, weight.dtype
    )
