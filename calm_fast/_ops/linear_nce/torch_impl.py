"""linear_nce from blocked products and running sums: no (T, V) logits, forward or backward."""

from __future__ import annotations

import torch

from calm_fast._ops.linear_nce.schedule import combine, step
from calm_fast._ops.vocabulary.torch_impl import (
    Gradients,
    LogitTiles,
    RunningSum,
    TargetLogits,
    exact_product,
    probabilities,
    put,
    subtract_at,
    take,
    valid_rows,
    within,
)

Stats = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _sweep(
    tiles: LogitTiles,
    streams: Stats,
    targets: torch.Tensor,
    temperature: float,
    keep: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block of tokens against the whole vocabulary.

    Args:
        streams: student, nat, neg, each (t, d), or None for what nobody needs. targets: (t,). keep: two (t, V), get the
            products of student and nat.
    Returns:
        lse (3, t): log-sum-exps of the student, of the student over tau, of nat over tau; the hard and the soft
        cross-entropy and KL(p_neg || p_nat), each (t,).
    """
    t, like, tau = targets.shape[0], tiles.like, 1.0 / temperature
    plain, (with_student, _, with_neg) = temperature == 1.0, (h is not None for h in streams)
    student, nat, neg = (RunningSum(t, like) for _ in range(3))
    soft_student, soft_nat = (student, nat) if plain else (RunningSum(t, like, tau), RunningSum(t, like, tau))
    at_target = TargetLogits(targets, tiles.columns, like)
    for columns in tiles.column_blocks():
        kept = (None,) * 3 if keep is None else (keep[0][:, columns], keep[1][:, columns], None)
        z, z_nat, z_neg = (h if h is None else tiles.logits(h, columns, i, kept[i]) for i, h in enumerate(streams))
        spare = tiles.spare(z_nat)
        if with_student:
            at_target.add(z, columns)
            student.add(z, spare)
        if not plain:
            nat.add(z_nat, spare)
        if with_student and not plain:
            soft_student.add(z, spare)
        powers = soft_nat.add(z_nat, spare)
        if with_student:
            soft_nat.weigh(powers, tiles.without_banned(z))
        if with_neg:
            powers = neg.add(z_neg, spare)
            neg.weigh(powers, tiles.without_banned(z_neg).sub_(tiles.without_banned(z_nat)))
    lse, lse_soft, lse_nat = student.log_sum(), soft_student.log_sum(), soft_nat.log_sum()
    kl = neg.mean() - neg.log_sum() + nat.log_sum()
    return torch.stack((lse, lse_soft, lse_nat)), lse - at_target.values, lse_soft - tau * soft_nat.mean(), kl


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
) -> Stats:
    """See `linear_nce_reference`; arguments are validated already.

    Returns:
        the loss (); lse (3, T): log-sum-exps of the student, of the student over tau, of nat over tau; coefficients
        (2, T) of the hard and the soft cross-entropy in the loss, 0 for ignored tokens. All in the compute dtype.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, neg, targets, seq_ids = take(rows, student, nat, neg, targets, seq_ids)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0], streams=3)
    parts = [
        _sweep(tiles, (student[block], nat[block], neg[block]), targets[block], temperature)
        for block in tiles.row_blocks(slice(0, targets.shape[0]))
    ]
    nothing = tiles.like.new_zeros(0)
    parts = parts or [(nothing.view(3, 0), nothing, nothing, nothing)]
    lse, hard, soft, kl = (torch.cat(p, dim=-1) for p in zip(*parts, strict=True))
    return combine(lse, hard, soft, kl, seq_ids, rows, tokens, alpha, temperature, offset)


def linear_nce_torch_bwd(
    dloss: torch.Tensor,
    student: torch.Tensor,
    nat: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> Stats:
    """Gradients of student, weight and bias: logit tiles are computed again, then

        dz = dloss (c_hard (softmax(z) - 1_target) + c_soft / tau (softmax(z / tau) - softmax(z_nat / tau)))

    Args:
        dloss: (). lse, coefficients: what the forward pass returned. needs: which of the three are wanted.
    Returns:
        (T, d), (V, d) and (V,) in the inputs' dtypes; an empty tensor for what is not wanted.
    """
    rows, tokens = valid_rows(targets, ignore_index), student.shape[0]
    student, nat, targets = take(rows, student, nat, targets)
    lse, coefficients = (t if rows is None else t[:, rows] for t in (lse, coefficients))
    hard, soft = coefficients * dloss
    soft = soft / temperature

    gradients = Gradients(student, weight, needs)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0], streams=2)
    for chunk_rows, chunk_columns, chunk in gradients.chunks():
        for r in tiles.row_blocks(chunk_rows):
            for c in tiles.column_blocks(chunk_columns):
                z, z_nat = (tiles.logits(h[r], c, i) for i, h in enumerate((student, nat)))
                dz = _dlogits(tiles, z, z_nat, c, lse[:, r], hard[r], soft[r], temperature, targets[r])
                chunk[within(r, chunk_rows), within(c, chunk_columns)] = dz
        gradients.add(chunk_rows, chunk_columns, chunk)
    dstudent, dweight, dbias = gradients.results()
    return put(rows, dstudent, tokens) if needs[0] else dstudent, dweight, dbias


def _dlogits(
    tiles: LogitTiles,
    z: torch.Tensor,
    z_nat: torch.Tensor,
    columns: slice,
    lse: torch.Tensor,
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float,
    targets: torch.Tensor,
) -> torch.Tensor:
    """One tile of dz from two tiles of logits: (t, columns) in the compute dtype. lse (3, t), the rest (t,)."""
    tau = 1.0 / temperature
    dz = probabilities(z, lse[1], tau, tiles.spare(z))
    if temperature == 1.0:
        dz.mul_((hard + soft).unsqueeze(1))
    else:
        dz.mul_(soft.unsqueeze(1))
        dz.addcmul_(probabilities(z, lse[0], 1.0, tiles.spare(z, 1)), hard.unsqueeze(1))
    dz.addcmul_(probabilities(z_nat, lse[2], tau, z_nat), soft.unsqueeze(1), value=-1.0)
    subtract_at(dz, targets, hard, columns)
    return tiles.through_softcap(dz, z)


# ---- loss and gradient in one pass, for a head that is not trained --------------------------------------------------


class _TorchEngine:
    """See `steps.linear_nce.Engine`: what is kept are bare products in the inputs' dtype, as full logits would be."""

    def __init__(self, streams: tuple[torch.Tensor, ...], head: tuple, temperature: float, most: int) -> None:
        """streams: student, nat, neg, targets. head: weight, bias, softcap. most: tokens of the largest chunk."""
        *self.streams, self.targets = streams
        self.weight, self.temperature = head[0], temperature
        self.tiles = LogitTiles(*head, most, streams=3)
        self.memory = self.weight.new_empty((2, most * self.weight.shape[0]))

    def _kept(self, rows: slice) -> torch.Tensor:
        shape = (2, rows.stop - rows.start, self.weight.shape[0])
        return self.memory[:, : shape[1] * shape[2]].view(shape)

    def _swept(self, rows: slice, wanted: tuple[bool, bool, bool], kept: torch.Tensor | None) -> tuple:
        parts = []
        for r in self.tiles.row_blocks(rows):
            streams = tuple(h[r] if want else None for h, want in zip(self.streams, wanted, strict=True))
            keep = None if kept is None else kept[:, within(r, rows)]
            parts.append(_sweep(self.tiles, streams, self.targets[r], self.temperature, keep))
        return tuple(torch.cat(p, dim=-1) for p in zip(*parts, strict=True))

    def calibrate(self, rows: slice) -> torch.Tensor:
        return self._swept(rows, (False, True, True), None)[3]

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        return self._swept(rows, (True, True, not calibrated), self._kept(rows))[: 3 if calibrated else 4]

    def gradient(self, rows: slice, lse: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        tiles, kept = self.tiles, self._kept(rows)
        hard, soft = coefficients[0], coefficients[1] / self.temperature
        # a token's logit gradients lie within -1 .. 1 before they are rounded, whatever its weight in the loss is, and
        # in float16, which ends at 2^-24, within -1024 .. 1024
        size = hard.abs() + soft.abs()
        size = torch.where(size > 0, size, 1.0) / (1024.0 if self.weight.dtype == torch.float16 else 1.0)
        hard, soft = hard / size, soft / size
        for r in tiles.row_blocks(slice(0, rows.stop - rows.start)):
            targets = self.targets[rows][r]
            for c in tiles.column_blocks():
                z, z_nat = (tiles.finish(kept[i, r, c], c, i) for i in (0, 1))
                dz = _dlogits(tiles, z, z_nat, c, lse[:, r], hard[r], soft[r], self.temperature, targets)
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
    """The loss and the student's gradient at dloss = 1, without recomputing logits: see `step`.

    Returns:
        the loss () and (T, d), both in the compute dtype; 0 for ignored tokens.
    """

    def engine_of(*streams: torch.Tensor, most: int) -> _TorchEngine:
        return _TorchEngine(streams, (weight, bias, softcap), temperature, most)

    options = (alpha, temperature, offset, ignore_index, weight.dtype)
    return step(engine_of, student, nat, neg, weight, targets, seq_ids, *options)
