"""linear_logprob in torch, from blocked products and running sums: no (T, V) logits, forward or backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.vocabulary.products import multiply
from calm_fast._ops.vocabulary.schedule import (
    HeadGradients,
    head_gradients,
    known_targets,
    nan_where_unknown,
    put,
    take,
    valid_rows,
    within,
)
from calm_fast._ops.vocabulary.torch_impl import (
    LN_2,
    LOG2_E,
    LogitTiles,
    RunningSum,
    TargetLogits,
    powers,
    softcap_,
    subtract_at_targets_,
)


def _target_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, targets: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the targets alone, rounded as the tiles are: (t,) in the compute dtype; any if unknown."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    at = targets.clamp(0, weight.shape[0] - 1)
    z = (hidden.to(compute) * weight[at].to(compute)).sum(dim=1).to(weight.dtype).to(compute)
    if bias is not None:
        z = z + bias[at].to(compute)
    return softcap_(z, softcap)


# Elements of logits that are computed at once where they are few: 8 MiB in float32. One product and one softmax then
# take 10 calls of torch's ops, where a sweep in tiles takes 20 for each tile (16 tokens, d 256, V 8192: 2 ms of 4).
_AT_ONCE = 1 << 21


def _at_once(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logprob (t,) and norms (2, t) of few tokens, as `_sweep` does: one tile holds their logits."""
    vocabulary, scale = weight.shape[0], LOG2_E / temperature
    z = multiply(hidden, weight.T).to(torch.promote_types(weight.dtype, torch.float32))
    if bias is not None:
        z += bias
    z = softcap_(z, softcap)
    top = z.amax(dim=1)
    at_target = z.gather(1, targets.clamp(0, vocabulary - 1).unsqueeze(1)).squeeze(1)
    at_target = nan_where_unknown(at_target - top, targets, vocabulary)
    total = z.sub_(top.unsqueeze(1)).mul_(scale).exp2_().sum(dim=1)
    return ((at_target * scale - total.log2()) * LN_2).clamp_(max=0.0), torch.stack((top, total))


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
    keep_logits: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Compute `linear_logprob_reference` block by block; the arguments have been checked.

    keep_logits: a backward pass may follow. Only the compiled library keeps any (`vocabulary.decide.at_once`).

    Returns:
        logprob (T,), entropy (T,), rank (T,) int64, norms (2, T): the largest logit and the sum of
        exp((z - top) / temperature), and logits (T, V) before bias and softcap, in the inputs' dtype, or an empty
        tensor. All are 0 for ignored tokens; entropy and rank are empty unless wanted. A target outside the vocabulary
        has logprob NaN and rank 0. The other floats are in the compute dtype.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    hidden, targets = take(rows, hidden, targets)
    if not (want_entropy or want_rank) and 0 < targets.shape[0] * weight.shape[0] <= _AT_ONCE:
        logprob, norms = _at_once(hidden, weight, bias, targets, temperature, softcap)
        norms = put(rows, norms.T, tokens).T.contiguous()
        none = hidden.new_empty(0)
        return put(rows, logprob, tokens), logprob.new_empty(0), targets.new_empty(0), norms, none
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0])
    found = [
        _sweep(tiles, hidden[block], targets[block], temperature, want_entropy, want_rank)
        for block in tiles.row_blocks(slice(0, targets.shape[0]))
    ]
    like = tiles.like
    empty = (like.new_zeros(0), like.new_zeros(0), targets[:0].clone(), like.new_zeros((2, 0)))
    parts = list(zip(*found, strict=True)) if found else [(t,) for t in empty]
    logprob, entropy, rank, norms = (torch.cat(p, dim=-1) for p in parts)
    entropy = put(rows, entropy, tokens) if want_entropy else entropy
    rank = put(rows, rank, tokens) if want_rank else rank
    norms = put(rows, norms.T, tokens).T.contiguous()
    return put(rows, logprob, tokens), entropy, rank, norms, hidden.new_empty(0)


def _sweep(
    tiles: LogitTiles,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
    want_entropy: bool,
    want_rank: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sweep the vocabulary for tokens (t, d); return logprob, entropy, rank, (t,) or empty, and norms (2, t)."""
    like, tau = tiles.like, 1.0 / temperature
    vocabulary = tiles.weight.shape[0]
    running = RunningSum(targets.shape[0], like, tau)
    at_target = TargetLogits(targets, tiles.columns, vocabulary, like)
    rank = targets.new_ones(targets.shape[0] if want_rank else 0)
    if want_rank:
        alone = _target_logits(hidden, tiles.weight, tiles.bias, tiles.softcap, targets)
    for columns in tiles.column_blocks():
        z = tiles.logits(hidden, columns)
        here = at_target.add(z, columns)
        if want_rank:
            # the target's own logit is computed twice and may differ by a rounding: it never counts
            rank += (z > alone.unsqueeze(1)).sum(dim=1) - (here & (at_target.values > alone)).long()
        moved = running.raise_(z)
        if want_entropy:
            running.follow(moved)
            running.add_weighted(running.add(z, tiles.spare(z)), tiles.zero_banned_(z))
        else:
            running.add(z, z)
    if want_rank:
        rank.masked_fill_(~known_targets(targets, vocabulary), 0)
    entropy = (running.log_total() - running.mean() * tau).clamp_(min=0.0) if want_entropy else like.new_zeros(0)
    return running.log_share(at_target.values), entropy, rank, torch.stack((running.top, running.totals[0]))


def linear_logprob_torch_bwd(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    norms: torch.Tensor,
    entropy: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    needs: Sequence[bool],
) -> HeadGradients:
    """Compute the gradients of hidden, weight and bias from logit tiles that are computed again.

        dz = (dlogprob (1_target - p) - dentropy p (log p + entropy)) / temperature

    Args:
        dlogprob: (T,). dentropy: (T,) or None.
        norms (2, T), entropy (T,), logits: as returned by the forward pass; kept logits are not computed again.
        needs: which of the three gradients are wanted.
    Returns:
        (T, d), (V, d) and (V,) in the inputs' dtype; an empty tensor for a gradient that is not wanted.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    tau = 1.0 / temperature
    hidden, targets, top, total, dlogprob = take(rows, hidden, targets, *norms, dlogprob * tau)
    dlogprob = nan_where_unknown(dlogprob, targets, weight.shape[0])
    if dentropy is not None:
        entropy, dentropy = take(rows, entropy, dentropy * tau)
    tiles = LogitTiles(weight, bias, softcap, targets.shape[0])

    def fill(chunk_rows: slice, chunk_columns: slice, chunk: torch.Tensor) -> None:
        for r in tiles.row_blocks(chunk_rows):
            for c in tiles.column_blocks(chunk_columns):
                z = tiles.logits(hidden[r], c)
                p = powers(z, top[r], tau, tiles.spare(z))
                if dentropy is None:
                    dz = p.mul_((-dlogprob[r] / total[r]).unsqueeze(1))
                else:
                    # p (-dlogprob - dentropy (log p + entropy)), where log p = tau (z - top) - log total
                    constant = dentropy[r] * (total[r].log() - entropy[r]) - dlogprob[r]
                    slope = torch.sub(z, top[r].unsqueeze(1), out=tiles.spare(z, 1))
                    tiles.zero_banned_(slope).mul_((-tau * dentropy[r] / total[r]).unsqueeze(1))
                    dz = p.mul_(slope.add_((constant / total[r]).unsqueeze(1)))
                subtract_at_targets_(dz, targets[r], -dlogprob[r], c)
                chunk[within(r, chunk_rows), within(c, chunk_columns)] = tiles.softcap_backward_(dz, z)

    dhidden, dweight, dbias = head_gradients(hidden, weight, needs, fill)
    return put(rows, dhidden, tokens) if needs[0] else dhidden, dweight, dbias
