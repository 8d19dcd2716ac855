"""linear_logprob in the compiled library; the products that consume logit gradients are torch's.

Few logits (`at_once`) are one product of torch's; the library turns its rows into results, and later into gradients.
With matrix units torch multiplies tiles of more logits, and the library reads their rows (`tiles`); gradients are then
those of the torch implementation. All others are computed and summed by the library tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.linear_logprob.tiles import score_tiles
from calm_fast._ops.linear_logprob.torch_impl import linear_logprob_torch_bwd
from calm_fast._ops.vocabulary.decide import at_once, in_tiles
from calm_fast._ops.vocabulary.products import guarded, multiply
from calm_fast._ops.vocabulary.schedule import (
    HeadGradients,
    head_gradients,
    known_targets,
    put,
    take,
    valid_rows,
)
from calm_fast.core.dispatch import active_transform, autograd_records

_OP = "linear_logprob"


def score_few(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float, ignore_index: int
) -> torch.Tensor | None:
    """Return logprob (T,) of few logits, or None for a call that is wrong or needs another form: `decide` knows which.

    A product of few tokens takes 0.1 to 1 ms and leaves nothing in a core's caches: each Python call around it then
    costs several times as much as alone. This path has a tenth of them.
    """
    if torch.compiler.is_compiling() or type(hidden) is not torch.Tensor or type(targets) is not torch.Tensor:
        return None
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or type(ignore_index) is not int:
        return None
    if not (hidden.is_cpu and weight.is_cpu and targets.is_cpu) or hidden.dtype != weight.dtype:
        return None
    if not hidden.dim() == weight.dim() == 2 or hidden.shape[1] != weight.shape[1] or targets.dtype != torch.int64:
        return None
    if targets.shape != hidden.shape[:1] or not (type(temperature) is float and 0.0 < temperature < float("inf")):
        return None
    if hidden.numel() == 0 or not hidden.layout is weight.layout is targets.layout is torch.strided:
        return None
    if not at_once(_OP, hidden, weight, False):
        return None
    if autograd_records(hidden, weight) or active_transform() is not None or torch.is_autocast_enabled("cpu"):
        return None
    logits = torch.mm(guarded(hidden), weight.T)
    logprob: torch.Tensor = torch.ops.calm_fast._linear_logprob_native_rows(
        logits, None, targets.contiguous(), temperature, None, ignore_index, False, False, True
    )[0]
    return logprob if logprob.numel() else None  # empty: a target is not in the vocabulary


def linear_logprob_native_fwd(
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
    """Score the tokens that are not ignored; arguments and results as in `linear_logprob_torch_fwd`."""
    tokens, bias = targets.shape[0], None if bias is None else bias.float().contiguous()
    if at_once(_OP, hidden, weight, keep_logits):
        logits = multiply(hidden, weight.T)
        results = torch.ops.calm_fast._linear_logprob_native_rows(
            logits, bias, targets.contiguous(), temperature, softcap, ignore_index, want_entropy, want_rank, False
        )
        return *results, logits if keep_logits else logits.new_empty(0)
    rows = valid_rows(targets, ignore_index)
    hidden, targets = take(rows, hidden, targets.contiguous())
    if in_tiles(_OP, hidden) and not want_rank and targets.shape[0]:
        logprob, entropy, norms = score_tiles(hidden, weight, bias, targets, temperature, softcap, want_entropy)
        entropy = put(rows, entropy, tokens) if want_entropy else entropy
        norms = put(rows, norms.T, tokens).T.contiguous()
        return put(rows, logprob, tokens), entropy, targets.new_empty(0), norms, hidden.new_empty(0)
    known = known_targets(targets, weight.shape[0])
    logprob, entropy, rank, norms = torch.ops.calm_fast._linear_logprob_native_fwd(
        hidden, weight, bias, targets * known, temperature, softcap, want_entropy, want_rank
    )
    logprob = logprob.masked_fill_(~known, float("nan"))
    rank = rank * known if want_rank else rank
    entropy = put(rows, entropy, tokens) if want_entropy else entropy
    rank = put(rows, rank, tokens) if want_rank else rank
    norms = put(rows, norms.T, tokens).T.contiguous()
    return put(rows, logprob, tokens), entropy, rank, norms, hidden.new_empty(0)


def linear_logprob_native_bwd(
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
    """Compute the gradients of hidden, weight and bias; arguments and results as in `linear_logprob_torch_bwd`."""
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    if not logits.numel() and in_tiles(_OP, hidden):
        return linear_logprob_torch_bwd(
            dlogprob, dentropy, hidden, weight, bias, targets, norms, entropy, logits, temperature, softcap,
            ignore_index, needs,
        )  # fmt: skip
    up, hidden, targets, norms = take(rows, dlogprob.float().contiguous(), hidden, targets.contiguous(), norms.T)
    down = None
    if dentropy is not None:
        down, entropy = take(rows, dentropy.float().contiguous(), entropy)
    bias = None if bias is None else bias.float().contiguous()
    if logits.numel():
        (logits,) = take(rows, logits)
        dlogits = torch.ops.calm_fast._linear_logprob_native_row_gradients(
            up, down, logits, bias, targets, norms.T.contiguous(), None if down is None else entropy, temperature,
            softcap,
        )  # fmt: skip
        dhidden = put(rows, multiply(dlogits, weight), tokens) if needs[0] else weight.new_empty(0)
        dweight = multiply(dlogits.T, hidden) if needs[1] else weight.new_empty(0)
        dbias = dlogits.sum(dim=0, dtype=torch.float32).to(weight.dtype) if needs[2] else weight.new_empty(0)
        return dhidden, dweight, dbias
    known = known_targets(targets, weight.shape[0])
    up, targets = up.masked_fill(~known, float("nan")), targets * known

    def fill(r: slice, c: slice, chunk: torch.Tensor) -> None:
        torch.ops.calm_fast._linear_logprob_native_dlogits(
            up[r], None if down is None else down[r], hidden[r], weight, bias, targets[r], norms[r].T.contiguous(),
            None if down is None else entropy[r], temperature, softcap, c.start, chunk.T,
        )  # fmt: skip

    dhidden, dweight, dbias = head_gradients(hidden, weight, needs, fill, by_token=False)
    return put(rows, dhidden, tokens) if needs[0] else dhidden, dweight, dbias
