"""linear_nce from blocked products and running sums: no (T, V) logits, forward or backward."""

from __future__ import annotations

import torch

from calm_fast.torch_impl.vocabulary import (
    Gradients,
    LogitTiles,
    RunningSum,
    TargetLogits,
    probabilities,
    put,
    subtract_at,
    take,
    valid_rows,
    within,
)

Stats = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _sweep(
    tiles: LogitTiles, streams: Stats, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block of tokens against the whole vocabulary.

    Args:
        streams: student, nat, neg, each (t, d). targets: (t,).
    Returns:
        lse (3, t): log-sum-exps of the student, of the student over tau, of nat over tau; the hard and the soft
        cross-entropy and KL(p_neg || p_nat), each (t,).
    """
    t, like, tau = targets.shape[0], tiles.like, 1.0 / temperature
    plain = temperature == 1.0
    student, nat, neg = (RunningSum(t, like) for _ in range(3))
    soft_student, soft_nat = (student, nat) if plain else (RunningSum(t, like, tau), RunningSum(t, like, tau))
    at_target = TargetLogits(targets, tiles.columns, like)
    for columns in tiles.column_blocks():
        z, z_nat, z_neg = (tiles.logits(h, columns, i) for i, h in enumerate(streams))
        at_target.add(z, columns)
        spare = tiles.spare(z)
        student.add(z, spare)
        if not plain:
            soft_student.add(z, spare)
            nat.add(z_nat, spare)
        soft_nat.weigh(soft_nat.add(z_nat, spare), z)
        neg.weigh(neg.add(z_neg, spare), z_neg.sub_(z_nat))
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


def combine(
    lse: torch.Tensor,
    hard: torch.Tensor,
    soft: torch.Tensor,
    kl: torch.Tensor,
    seq_ids: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: int,
    alpha: float,
    temperature: float,
    offset: float,
) -> Stats:
    """The loss from the numbers of the tokens that count.

    Args:
        lse (3, t), hard, soft, kl (t,): see `_sweep`. seq_ids: (t,). rows: which of the `tokens` they are, None = all.
    Returns:
        what `linear_nce_torch_fwd` does.
    """
    count = kl.shape[0]
    if count == 0:
        return lse.new_zeros(()), lse.new_zeros((3, tokens)), lse.new_zeros((2, tokens))
    members = torch.bincount(seq_ids, minlength=tokens)
    per_sequence = kl.new_zeros(tokens).index_add_(0, seq_ids, kl) / members.clamp(min=1)
    calibration = offset + torch.tanh(per_sequence[seq_ids])
    some = torch.stack((torch.full_like(kl, (1 - alpha) / count), alpha * temperature**2 / count * calibration))
    loss = (some * torch.stack((hard, soft))).sum()
    if rows is None:
        return loss, lse, some
    return loss, *(t.new_zeros((t.shape[0], tokens)).index_copy_(1, rows, t) for t in (lse, some))


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
                dz = _dlogits(tiles, (student[r], nat[r]), c, lse[:, r], hard[r], soft[r], temperature, targets[r])
                chunk[within(r, chunk_rows), within(c, chunk_columns)] = dz
        gradients.add(chunk_rows, chunk_columns, chunk)
    dstudent, dweight, dbias = gradients.results()
    return put(rows, dstudent, tokens) if needs[0] else dstudent, dweight, dbias


def _dlogits(
    tiles: LogitTiles,
    streams: tuple[torch.Tensor, torch.Tensor],
    columns: slice,
    lse: torch.Tensor,
    hard: torch.Tensor,
    soft: torch.Tensor,
    temperature: float,
    targets: torch.Tensor,
) -> torch.Tensor:
    """One tile of dz before the softcap: (t, columns) in the compute dtype. lse (3, t), the rest (t,)."""
    z, z_nat = (tiles.logits(h, columns, i) for i, h in enumerate(streams))
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
