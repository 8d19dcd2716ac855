"""linear_nce in Triton; matrix products outside the sweep are torch's. Triton is imported on first use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calm_fast._ops.linear_nce.schedule import Forward, sort_and_cut_valid, triton_rows
from calm_fast._ops.vocabulary.schedule import HeadGradients, head_gradients


def linear_nce_triton_fwd(
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
) -> Forward:
    """Compute the loss in one sweep; arguments and results as in `linear_nce_torch_fwd`."""
    from calm_fast.kernels.linear_nce import launch

    return launch.launch_linear_nce_fwd(
        student, nat, neg, weight, bias, targets, seq_ids, alpha, temperature, offset, softcap, ignore_index
    )


def linear_nce_triton_bwd(
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
    ignore_index: int,
    needs: Sequence[bool],
) -> HeadGradients:
    """Compute the gradients of student, weight and bias; arguments and results as in `linear_nce_torch_bwd`."""
    from calm_fast.kernels.linear_nce import launch

    hidden = student
    if needs[1]:
        # dweight multiplies by these rows: 0 times anything an ignored row holds must be 0
        hidden = student.masked_fill((targets == ignore_index).unsqueeze(1), 0.0)
    tensors = (dloss, hidden, nat, weight, bias, targets, norms, coefficients)

    def fill(rows: slice, columns: slice, chunk: torch.Tensor) -> None:
        launch.launch_linear_nce_dlogits(*tensors, temperature, softcap, rows, columns, chunk)

    return head_gradients(hidden, weight, needs, fill)


def linear_nce_triton_step(
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
    *,
    rows: int | None = None,
    whole: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss and the student's gradient in one pass; results as in `linear_nce_torch_step`.

    Args:
        rows: tokens of a chunk; None = chosen by the size of the vocabulary.
        whole: True = chunks of whole sequences (four products; waits for the device once), False = chunks of any tokens
            (five products). None = whole sequences if each fits a chunk and no CUDA graph is being captured.
    Raises:
        ValueError: whole=True, and a sequence does not fit a chunk.
    """
    from calm_fast.kernels.linear_nce import launch

    rows, most = triton_rows(weight) if rows is None else (rows, rows)
    plan = None
    if targets.shape[0] and whole is not False and (whole or not _capturing(targets.device)):
        plan = sort_and_cut_valid(targets, seq_ids, ignore_index, rows, most)
        if whole and plan is None:
            raise ValueError(
                f"linear_nce: `whole` must be None or False where a sequence exceeds a chunk of {most} tokens, got True"
            )
    return launch.launch_linear_nce_step(
        student, nat, neg, weight, bias, targets, seq_ids, alpha, temperature, offset, softcap, ignore_index,
        rows=rows, plan=plan,
    )  # fmt: skip


def _capturing(device: torch.device) -> bool:
    """Return True while a CUDA graph is being captured: the device cannot be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
