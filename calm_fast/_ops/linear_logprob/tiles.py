"""linear_logprob on a CPU with matrix units: torch multiplies tiles of logits, the compiled library reads their rows.

A product of all tokens with some columns of the vocabulary leaves a tile in the L2 cache, where the library sums its
rows (`csrc/vocabulary/rows_lane.h`). Each tile gives a largest logit, a sum and an entropy for every token; what all of
them give together is the last step.
"""

from __future__ import annotations

import torch

from calm_fast._ops.vocabulary.products import guarded
from calm_fast._ops.vocabulary.schedule import blocks, known_targets
from calm_fast._ops.vocabulary.torch_impl import softcap_

# Elements of a tile, 4 MiB in 16 bits, and its fewest columns. Twice or half as many elements took 0.9 to 1.3 times as
# long (48 to 2048 tokens, d 64 to 4096, V 8192 to 49152).
_TILE = 1 << 21
_COLUMNS = 4096
_NOTHING = torch.finfo(torch.float32).min  # the largest of no logits


def score_tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    want_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score tokens none of which is ignored; arguments as in `linear_logprob_torch_fwd`.

    Returns:
        logprob (T,), NaN where a target is not in the vocabulary; entropy (T,), empty unless wanted; norms (2, T).
    """
    hidden, vocabulary = guarded(hidden), weight.shape[0]
    columns = min(vocabulary, max(_COLUMNS, _TILE // max(1, hidden.shape[0])))
    rows = max(1, _TILE // columns)
    buffer = hidden.new_empty(min(rows, hidden.shape[0]) * columns)
    found = [
        _score_rows(hidden[r], weight, bias, targets[r], temperature, softcap, want_entropy, buffer, columns)
        for r in blocks(0, hidden.shape[0], rows)
    ]
    logprob, entropy, norms = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return logprob.masked_fill_(~known_targets(targets, vocabulary), float("nan")), entropy, norms


def _score_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    want_entropy: bool,
    buffer: torch.Tensor,
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logprob (t,), of any value for a target that is not in the vocabulary, entropy (t,) and norms (2, t)."""
    compute, tokens = torch.float32, hidden.shape[0]
    at_target, anywhere = hidden.new_zeros(tokens, dtype=compute), targets.new_zeros(tokens)
    entropies, norms = [], []
    for c in blocks(0, weight.shape[0], columns):
        tile = buffer[: tokens * (c.stop - c.start)].view(tokens, -1)
        torch.mm(hidden, weight[c].T, out=tile)
        # sums are those of every column, whatever the target is
        _, entropy, _, sums = torch.ops.calm_fast._linear_logprob_native_rows(
            tile, None if bias is None else bias[c], anywhere, temperature, softcap, -1, want_entropy, False, False
        )
        entropies.append(entropy)
        norms.append(sums)
        local = targets - c.start
        inside = (local >= 0) & (local < tile.shape[1])
        mine = tile.gather(1, local.clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1).to(compute)
        at_target = torch.where(inside, mine, at_target)
    if bias is not None:
        at_target += bias[targets.clamp(0, weight.shape[0] - 1)]
    top, total = torch.stack(norms).unbind(1)  # (tiles, t)
    highest = top.amax(0)
    shares = total * ((top - highest) / temperature).exp()
    whole = shares.sum(0).masked_fill(highest == _NOTHING, float("nan"))  # as in a softmax of nothing but -inf
    logprob = ((softcap_(at_target, softcap) - highest) / temperature - whole.log()).clamp_(max=0.0)
    if not want_entropy:
        return logprob, logprob.new_empty(0), torch.stack((highest, whole))
    # sum over tiles of w (entropy - log w), where w is the tile's share of all; a tile of banned tokens has none
    w = shares / whole
    parts = w * torch.stack(entropies) - torch.special.xlogy(w, w)
    return logprob, torch.where(w == 0, 0.0, parts).sum(0), torch.stack((highest, whole))
