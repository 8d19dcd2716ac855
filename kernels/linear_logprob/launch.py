"""Launchers of the Triton kernels of linear_logprob.

The public op (calm_fast.ops.linear_logprob) has validated the arguments. It also calls torch's own products, which
consume each chunk of logit gradients.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common.launching import addressable, interpreted, launch
from calm_fast.kernels.linear_logprob.configs import COMBINE, DLOGITS, SWEEP, TARGET
from calm_fast.kernels.linear_logprob.kernels import (
    _linear_logprob_combine_kernel,
    _linear_logprob_dlogits_kernel,
    _linear_logprob_sweep_kernel,
    _linear_logprob_target_kernel,
)
from calm_fast.kernels.vocabulary.configs import DlogitsConfig, SweepConfig
from calm_fast.kernels.vocabulary.launch import constants, pick_config

__all__ = ["launch_linear_logprob_dlogits", "launch_linear_logprob_fwd"]

_INTERPRETED = interpreted(_linear_logprob_sweep_kernel)


def launch_linear_logprob_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    want_entropy: bool,
    want_rank: bool,
    config: SweepConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability, entropy and rank of each target, by one sweep over the vocabulary.

    Args:
        hidden: (T, d) float32, bfloat16 or float16, any strides.
        weight: (V, d), hidden's dtype, any strides.
        bias: (V,) or None.
        targets: (T,) int64; ignore_index marks tokens that do not count.
        temperature, softcap: of the logits.
        want_entropy, want_rank: results to compute; the others come back empty.
        config: launch config of the sweep. None chooses one.
    Returns:
        logprob, entropy (T,) float32, rank (T,) int64, and norms (2, T) float32: the largest logit and the sum of
        exp((z - top) / temperature). Ignored tokens have 0; a target outside the vocabulary has NaN and rank 0.

    Deterministic: a token's results do not depend on the other tokens.
    """
    tokens, v, device = hidden.shape[0], weight.shape[0], hidden.device
    logprob = torch.empty(tokens, dtype=torch.float32, device=device)
    norms = logprob.new_empty((2, tokens))
    entropy, rank = logprob.new_empty(tokens if want_entropy else 0), targets.new_empty(tokens if want_rank else 0)
    if tokens == 0:
        return logprob, entropy, rank, norms
    plain = bias is None and softcap is None and not want_entropy and not want_rank
    config = config or pick_config(SWEEP, weight, tokens, plain, _INTERPRETED)
    splits, tau = triton.cdiv(v, config.split_v), 1.0 / temperature
    part = logprob.new_empty((2 + want_entropy, splits, tokens))
    above = torch.empty((splits, tokens), dtype=torch.int32, device=device) if want_rank else None
    at_target, threshold = logprob.new_empty(tokens), logprob.new_empty(tokens) if want_rank else None
    hidden, weight, targets = addressable(hidden), addressable(weight), targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    if want_rank:
        launch(
            _linear_logprob_target_kernel,
            triton.cdiv(tokens, TARGET.block_t),
            device,
            TARGET,
            *(hidden, weight, bias, targets, threshold, hidden.stride(0), weight.stride(0)),
            T=tokens,
            V=v,
            softcap=softcap or 0.0,
            ignore_index=ignore_index,
            D=weight.shape[1],
            BLOCK_T=TARGET.block_t,
            BLOCK_D=TARGET.block_d,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
        )
    wanted = {"HAS_ENTROPY": want_entropy, "HAS_RANK": want_rank}
    launch(
        _linear_logprob_sweep_kernel,
        triton.cdiv(tokens, config.block_t) * splits,
        device,
        config,
        *(hidden, weight, bias, targets, threshold, part, above, at_target, hidden.stride(0), weight.stride(0)),
        T=tokens,
        V=v,
        splits=splits,
        tau=tau,
        softcap=softcap or 0.0,
        ignore_index=ignore_index,
        SPLIT_V=config.split_v,
        **wanted,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )
    launch(
        _linear_logprob_combine_kernel,
        triton.cdiv(tokens, COMBINE.block_t),
        device,
        COMBINE,
        *(part, above, at_target, targets, logprob, entropy, rank, norms),
        T=tokens,
        V=v,
        splits=splits,
        tau=tau,
        ignore_index=ignore_index,
        BLOCK_T=COMBINE.block_t,
        **wanted,
    )
    return logprob, entropy, rank, norms


def launch_linear_logprob_dlogits(
    dlogprob: torch.Tensor,
    dentropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    norms: torch.Tensor,
    entropy: torch.Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    rows: slice,
    columns: slice,
    out: torch.Tensor,
    config: DlogitsConfig | None = None,
) -> None:
    """Fill `out` with a chunk of the gradient of the logits before the softcap.

    Args:
        dlogprob: (T,) float32.
        dentropy: (T,) float32 or None.
        hidden, weight, bias, targets, temperature, softcap, ignore_index: as in the forward pass.
        norms, entropy: results of the forward pass.
        rows, columns: tokens and vocabulary entries of the chunk.
        out: (rows, columns) contiguous, in the inputs' dtype.
        config: launch config. None chooses one.

    Deterministic.
    """
    if out.numel() == 0:
        return
    plain = bias is None and softcap is None and dentropy is None
    config = config or pick_config(DLOGITS, weight, hidden.shape[0], plain, _INTERPRETED)
    hidden, weight, targets = addressable(hidden), addressable(weight), targets.contiguous()
    blocks = triton.cdiv(columns.stop - columns.start, config.block_v)
    launch(
        _linear_logprob_dlogits_kernel,
        triton.cdiv(rows.stop - rows.start, config.block_t) * blocks,
        hidden.device,
        config,
        *(
            hidden,
            weight,
            None if bias is None else bias.contiguous(),
            targets.contiguous(),
            norms.contiguous(),
            entropy,
        ),
        *(dlogprob.contiguous(), None if dentropy is None else dentropy.contiguous(), out),
        *(hidden.stride(0), weight.stride(0)),
        first_row=rows.start,
        end_row=rows.stop,
        first_column=columns.start,
        end_column=columns.stop,
        T=hidden.shape[0],
        V=weight.shape[0],
        blocks=blocks,
        tau=1.0 / temperature,
        softcap=softcap or 0.0,
        ignore_index=ignore_index,
        HAS_DENTROPY=dentropy is not None,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )
