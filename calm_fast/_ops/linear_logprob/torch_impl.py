"""linear_logprob from blocked products and running sums: no (T, V) logits, forward or backward."""

from __future__ import annotations

import torch

from calm_fast._ops.vocabulary.torch_impl import (
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


def _targets_alone(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, targets: torch.Tensor
) -> torch.Tensor:
    """The logits of the targets before any sweep, rounded as the tiles are: (t,) in the compute dtype."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    z = (hidden.to(compute) * weight[targets].to(compute)).sum(dim=1).to(weight.dtype).to(compute)
    if bias is not None:
        z = z + bias[targets].to(compute)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def linear_logprob_torch_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    want_entropy: bool,
    want_rank: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `linear_logprob_reference`; arguments are validated already.

    Returns:
        logprob (T,), entropy (T,), rank (T,) int64 (the two empty where not wanted) and the log-sum-exp of the logits
        over the temperature (T,), in the compute dtype; all 0 for ignored tokens.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    hidden, targets = take(rows, hidden, targets)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0])
    found = [
        _sweep(tiles, hidden[block], targets[block], temperature, want_entropy, want_rank)
        for block in tiles.row_blocks(slice(0, targets.shape[0]))
    ]
    like = tiles.like
    empty = (like.new_zeros(0), like.new_zeros(0), targets[:0].clone(), like.new_zeros(0))
    parts = list(zip(*found, strict=True)) if found else [(t,) for t in empty]
    logprob, entropy, rank, lse = (torch.cat(p) for p in parts)
    wanted = (True, want_entropy, want_rank, True)
    results = (logprob, entropy, rank, lse)
    return tuple(put(rows, t, tokens) if want else t for t, want in zip(results, wanted, strict=True))


def _sweep(
    tiles: LogitTiles,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    want_entropy: bool,
    want_rank: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One block of tokens (t, d) against the vocabulary: logprob, entropy, rank and log-sum-exp, (t,) or empty."""
    like, tau = tiles.like, 1.0 / temperature
    running, at_target = RunningSum(targets.shape[0], like, tau), TargetLogits(targets, tiles.columns, like)
    rank = targets.new_ones(targets.shape[0] if want_rank else 0)
    if want_rank:
        alone = _targets_alone(hidden, tiles.weight, tiles.bias, tiles.softcap, targets)
    for columns in tiles.column_blocks():
        z = tiles.logits(hidden, columns)
        here = at_target.add(z, columns)
        if want_rank:  # the target's own logit, computed twice, may differ by a rounding: it never counts
            rank += (z > alone.unsqueeze(1)).sum(dim=1) - (here & (at_target.values > alone)).long()
        weights = running.add(z, tiles.spare(z) if want_entropy else z)
        if want_entropy:
            running.weigh(weights, tiles.without_banned(z))
    # relative to the maximum, so that a certain token loses nothing to the size of its logit
    entropy = running.entropy() if want_entropy else like.new_zeros(0)
    return running.log_share(at_target.values), entropy, rank, running.log_sum()


def linear_logprob_torch_bwd(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias: logit tiles are computed again, then

        dz = (dlogprob (1_target - p) - dentropy p (log p + entropy)) / temperature

    Args:
        dlogprob: (T,). dentropy: (T,) or None. lse, entropy: what the forward pass returned.
        needs: which of the three are wanted.
    Returns:
        (T, d), (V, d) and (V,) in the inputs' dtype; an empty tensor for what is not wanted.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    tau = 1.0 / temperature
    hidden, targets, lse, dlogprob = take(rows, hidden, targets, lse, dlogprob * tau)
    if dentropy is not None:
        entropy, dentropy = take(rows, entropy, dentropy * tau)

    gradients = Gradients(hidden, weight, needs)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0])
    for chunk_rows, chunk_columns, chunk in gradients.chunks():
        for r in tiles.row_blocks(chunk_rows):
            for c in tiles.column_blocks(chunk_columns):
                z = tiles.logits(hidden[r], c)
                p = probabilities(z, lse[r], tau, tiles.spare(z))
                if dentropy is None:
                    dz = p.mul_(-dlogprob[r].unsqueeze(1))
                else:  # p (-dlogprob - dentropy (log p + entropy)), log p = tau z - lse
                    constant = dentropy[r] * (lse[r] - entropy[r]) - dlogprob[r]
                    slope = torch.mul(tiles.without_banned(z), (-tau * dentropy[r]).unsqueeze(1), out=tiles.spare(z, 1))
                    dz = p.mul_(slope.add_(constant.unsqueeze(1)))
                subtract_at(dz, targets[r], -dlogprob[r], c)
                chunk[within(r, chunk_rows), within(c, chunk_columns)] = tiles.through_softcap(dz, z)
        gradients.add(chunk_rows, chunk_columns, chunk)
    dhidden, dweight, dbias = gradients.results()
    return put(rows, dhidden, tokens) if needs[0] else dhidden, dweight, dbias
