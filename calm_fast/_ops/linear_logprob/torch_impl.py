"""linear_logprob in torch, from blocked products and running sums: no (T, V) logits, forward or backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.vocabulary.schedule import HeadGradients, head_gradients, put, take, valid_rows, within
from calm_fast._ops.vocabulary.torch_impl import (
    LogitTiles,
    RunningSum,
    TargetLogits,
    probabilities,
    softcap_,
    subtract_at_targets_,
)


def _target_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the targets alone, rounded as the tiles are: (t,) in the compute dtype."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    z = (hidden.to(compute) * weight[targets].to(compute)).sum(dim=1).to(weight.dtype).to(compute)
    if bias is not None:
        z = z + bias[targets].to(compute)
    return softcap_(z, softcap)


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
    """Compute `linear_logprob_reference` block by block; the arguments have been checked.

    Returns:
        logprob (T,), entropy (T,), rank (T,) int64, and lse (T,), the log-sum-exp of the logits over the temperature.
        All are 0 for ignored tokens; entropy and rank are empty unless wanted. Floats are in the compute dtype.
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
    entropy = put(rows, entropy, tokens) if want_entropy else entropy
    rank = put(rows, rank, tokens) if want_rank else rank
    return put(rows, logprob, tokens), entropy, rank, put(rows, lse, tokens)


def _sweep(
    tiles: LogitTiles,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    want_entropy: bool,
    want_rank: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sweep the vocabulary for one block of tokens (t, d); return logprob, entropy, rank and lse, (t,) or empty."""
    like, tau = tiles.like, 1.0 / temperature
    running, at_target = RunningSum(targets.shape[0], like, tau), TargetLogits(targets, tiles.columns, like)
    rank = targets.new_ones(targets.shape[0] if want_rank else 0)
    if want_rank:
        alone = _target_logits(hidden, tiles.weight, tiles.bias, tiles.softcap, targets)
    for columns in tiles.column_blocks():
        z = tiles.logits(hidden, columns)
        here = at_target.add(z, columns)
        if want_rank:
            # the target's own logit is computed twice and may differ by a rounding: it never counts
            rank += (z > alone.unsqueeze(1)).sum(dim=1) - (here & (at_target.values > alone)).long()
        weights = running.add(z, tiles.spare(z) if want_entropy else z)
        if want_entropy:
            running.add_weighted(weights, tiles.zero_banned_(z))
    # relative to the maximum, so that a nearly certain token loses no digits to the size of its logit
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
    needs: Sequence[bool],
) -> HeadGradients:
    """Compute the gradients of hidden, weight and bias from logit tiles that are computed again.

        dz = (dlogprob (1_target - p) - dentropy p (log p + entropy)) / temperature

    Args:
        dlogprob: (T,). dentropy: (T,) or None.
        lse, entropy: (T,), as returned by the forward pass.
        needs: which of the three gradients are wanted.
    Returns:
        (T, d), (V, d) and (V,) in the inputs' dtype; an empty tensor for a gradient that is not wanted.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    tau = 1.0 / temperature
    hidden, targets, lse, dlogprob = take(rows, hidden, targets, lse, dlogprob * tau)
    if dentropy is not None:
        entropy, dentropy = take(rows, entropy, dentropy * tau)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0])

    def fill(chunk_rows: slice, chunk_columns: slice, chunk: torch.Tensor) -> None:
        for r in tiles.row_blocks(chunk_rows):
            for c in tiles.column_blocks(chunk_columns):
                z = tiles.logits(hidden[r], c)
                p = probabilities(z, lse[r], tau, tiles.spare(z))
                if dentropy is None:
                    dz = p.mul_(-dlogprob[r].unsqueeze(1))
                else:
                    # p (-dlogprob - dentropy (log p + entropy)), where log p = tau z - lse
                    constant = dentropy[r] * (lse[r] - entropy[r]) - dlogprob[r]
                    slope = torch.mul(tiles.zero_banned_(z), (-tau * dentropy[r]).unsqueeze(1), out=tiles.spare(z, 1))
                    dz = p.mul_(slope.add_(constant.unsqueeze(1)))
                subtract_at_targets_(dz, targets[r], -dlogprob[r], c)
                chunk[within(r, chunk_rows), within(c, chunk_columns)] = tiles.softcap_backward_(dz, z)

    dhidden, dweight, dbias = head_gradients(hidden, weight, needs, fill)
    return put(rows, dhidden, tokens) if needs[0] else dhidden, dweight, dbias
