"""linear_logprob in the compiled library; the products that consume logit gradients are torch's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.vocabulary.schedule import HeadGradients, head_gradients, put, take, valid_rows


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score the tokens that are not ignored; arguments and results as in `linear_logprob_torch_fwd`."""
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    hidden, targets = take(rows, hidden, targets.contiguous())
    bias = None if bias is None else bias.float().contiguous()
    logprob, entropy, rank, lse = torch.ops.calm_fast._linear_logprob_native_fwd(
        hidden, weight, bias, targets, temperature, softcap, want_entropy, want_rank
    )
    entropy = put(rows, entropy, tokens) if want_entropy else entropy
    rank = put(rows, rank, tokens) if want_rank else rank
    return put(rows, logprob, tokens), entropy, rank, put(rows, lse, tokens)


def linear_logprob_native_bwd(
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
    """Compute the gradients of hidden, weight and bias; arguments and results as in `linear_logprob_torch_bwd`."""
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    up, hidden, targets, lse = take(rows, dlogprob.float().contiguous(), hidden, targets.contiguous(), lse)
    down = None
    if dentropy is not None:
        down, entropy = take(rows, dentropy.float().contiguous(), entropy)
    bias = None if bias is None else bias.float().contiguous()

    def fill(r: slice, c: slice, chunk: torch.Tensor) -> None:
        torch.ops.calm_fast._linear_logprob_native_dlogits(
            up[r], None if down is None else down[r], hidden[r], weight, bias, targets[r], lse[r],
            None if down is None else entropy[r], temperature, softcap, c.start, chunk.T,
        )  # fmt: skip

    dhidden, dweight, dbias = head_gradients(hidden, weight, needs, fill, by_token=False)
    return put(rows, dhidden, tokens) if needs[0] else dhidden, dweight, dbias
