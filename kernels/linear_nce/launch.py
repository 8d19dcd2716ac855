"""Launchers of the Triton kernels of linear_nce.

The public op (calm_fast.ops.linear_nce) has validated the arguments. It also calls torch's own products, which consume
each chunk of logit gradients.
"""

from __future__ import annotations

import torch
import triton

from calm_fast.kernels.common.launching import addressable, interpreted, launch
from calm_fast.kernels.linear_nce.bwd import _linear_nce_dlogits_kernel
from calm_fast.kernels.linear_nce.configs import CALIBRATE, COMBINE, DLOGITS, SWEEP
from calm_fast.kernels.linear_nce.fwd import (
    PARTS_ANY_TAU,
    PARTS_TAU_1,
    _linear_nce_calibrate_kernel,
    _linear_nce_combine_kernel,
    _linear_nce_sweep_kernel,
)
from calm_fast.kernels.linear_nce.step import launch_linear_nce_step
from calm_fast.kernels.vocabulary.configs import DlogitsConfig, SweepConfig
from calm_fast.kernels.vocabulary.launch import constants, pick_config

__all__ = ["launch_linear_nce_dlogits", "launch_linear_nce_fwd", "launch_linear_nce_step"]

_INTERPRETED = interpreted(_linear_nce_sweep_kernel)


def _plain(temperature: float, bias: torch.Tensor | None, softcap: float | None) -> bool:
    """Return True for temperature 1 without bias and softcap, which the measured configs are for."""
    return temperature == 1.0 and bias is None and softcap is None


def launch_linear_nce_fwd(
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
    config: SweepConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The NCE loss, by one sweep over the vocabulary.

    Args:
        student, nat, neg: (T, d) float32, bfloat16 or float16, any strides.
        weight: (V, d), the same dtype, any strides.
        bias: (V,) or None.
        targets, seq_ids: (T,) int64; ignore_index marks tokens that do not count.
        alpha, temperature, offset, softcap: as in the op.
        config: launch config of the sweep. None chooses one.
    Returns:
        loss () float32; norms (5, T) float32: the largest logit of the student and its sums exp(z - top) and
        exp((z - top) / temperature), the largest logit of nat and its sum exp((z - top) / temperature); coefficients
        (2, T) float32 of the hard and the soft cross-entropy.

    Deterministic: a token's norms do not depend on the other tokens.
    """
    tokens, v, device = student.shape[0], weight.shape[0], student.device
    norms, terms, coefficients = (torch.empty((n, tokens), dtype=torch.float32, device=device) for n in (5, 3, 2))
    if tokens == 0:
        return norms.new_zeros(()), norms, coefficients
    config = config or pick_config(SWEEP, weight, tokens, _plain(temperature, bias, softcap), _INTERPRETED)
    tau_is_1, tau = temperature == 1.0, 1.0 / temperature
    splits = triton.cdiv(v, config.split_v)
    part = norms.new_empty((PARTS_TAU_1 if tau_is_1 else PARTS_ANY_TAU, splits, tokens))
    at_target = norms.new_empty(tokens)
    student, nat, neg, weight = (addressable(t) for t in (student, nat, neg, weight))
    targets, seq_ids = targets.contiguous(), seq_ids.contiguous()
    bias = None if bias is None else bias.contiguous()
    launch(
        _linear_nce_sweep_kernel,
        triton.cdiv(tokens, config.block_t) * splits,
        device,
        config,
        *(student, nat, neg, weight, bias, targets, part, at_target),
        *(t.stride(0) for t in (student, nat, neg, weight)),
        T=tokens,
        V=v,
        splits=splits,
        tau=tau,
        softcap=softcap or 0.0,
        ignore_index=ignore_index,
        SPLIT_V=config.split_v,
        TAU_IS_1=tau_is_1,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )
    launch(
        _linear_nce_combine_kernel,
        triton.cdiv(tokens, COMBINE.block_t),
        device,
        COMBINE,
        *(part, at_target, targets, norms, terms),
        T=tokens,
        V=v,
        splits=splits,
        tau=tau,
        ignore_index=ignore_index,
        TAU_IS_1=tau_is_1,
        BLOCK_T=COMBINE.block_t,
    )
    launch(
        _linear_nce_calibrate_kernel,
        triton.cdiv(tokens, CALIBRATE.block_t),
        device,
        CALIBRATE,
        *(terms, targets, seq_ids, coefficients),
        T=tokens,
        alpha=alpha,
        tau=tau,
        offset=offset,
        ignore_index=ignore_index,
        BLOCK_T=CALIBRATE.block_t,
        BLOCK_J=CALIBRATE.block_j,
    )
    return (coefficients * terms[:2]).sum(), norms, coefficients


def launch_linear_nce_dlogits(
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
    rows: slice,
    columns: slice,
    out: torch.Tensor,
    config: DlogitsConfig | None = None,
) -> None:
    """Fill `out` with a chunk of the gradient of the student's logits before the softcap.

    Args:
        dloss: () float32.
        student, nat, weight, bias, targets, temperature, softcap: as in the forward pass.
        norms, coefficients: results of the forward pass.
        rows, columns: tokens and vocabulary entries of the chunk.
        out: (rows, columns) contiguous, in the inputs' dtype.
        config: launch config. None chooses one.

    Deterministic.
    """
    if out.numel() == 0:
        return
    plain = _plain(temperature, bias, softcap)
    config = config or pick_config(DLOGITS, weight, student.shape[0], plain, _INTERPRETED)
    student, nat, weight = (addressable(t) for t in (student, nat, weight))
    blocks = triton.cdiv(columns.stop - columns.start, config.block_v)
    launch(
        _linear_nce_dlogits_kernel,
        triton.cdiv(rows.stop - rows.start, config.block_t) * blocks,
        student.device,
        config,
        *(student, nat, weight, None if bias is None else bias.contiguous(), targets.contiguous()),
        *(norms.contiguous(), coefficients, dloss, out),
        *(t.stride(0) for t in (student, nat, weight)),
        first_row=rows.start,
        end_row=rows.stop,
        first_column=columns.start,
        end_column=columns.stop,
        T=student.shape[0],
        V=weight.shape[0],
        blocks=blocks,
        tau=1.0 / temperature,
        softcap=softcap or 0.0,
        TAU_IS_1=temperature == 1.0,
        **constants(weight, bias, softcap, config, _INTERPRETED),
    )
