"""Chunk schedule of the one-pass training step of linear_nce, for a frozen head: cuts, loss weights, and the loop.

The torch and native engines run in `step`. Triton's chunks are cut here too (`sort_and_cut_valid`); its loop is in
kernels/linear_nce/step.py, because its row kernels compute the loss weights of a chunk's tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from calm_fast._ops.vocabulary.schedule import take, valid_rows

# Bytes of the logits of two streams that a step keeps until the KL of their sequences is known: on a CPU, 128 tokens of
# 49152 columns in 16 bits.
_KEPT = 24 << 20
_KEPT_GPU = 256 << 20
# Minimum tokens of a chunk where memory allows: below it, reading the weight takes a growing share of the time.
_TOKENS = 128

# Triton: rows of the gradient's product. At d 4096, 1024 rows are 128 output tiles of 128 x 256 for the 132
# multiprocessors of an H200.
_PRODUCT_ROWS = 1024
# Triton: limit of the bytes of a chunk's logits in three streams. A large vocabulary gets fewer rows; a long sequence
# may have more.
_LOGIT_BYTES = 1 << 30
# logits by which the Triton step may pad a row
_PADDING = 16
_NO_SEQUENCE = torch.iinfo(torch.int64).max

# loss (), norms (5, T) and coefficients (2, T) of a forward pass
Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# order, ids (T,) and the chunks of `sort_and_cut_valid`
Plan = tuple[torch.Tensor, torch.Tensor, list[slice]]


def combine(
    norms: torch.Tensor,
    hard: torch.Tensor,
    soft: torch.Tensor,
    kl: torch.Tensor,
    seq_ids: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: int,
    alpha: float,
    temperature: float,
    offset: float,
) -> Forward:
    """Compute the loss from the statistics of the t valid tokens.

    Args:
        norms (5, t), hard, soft, kl (t,): as `Engine.sweep` returns them.
        seq_ids: (t,).
        rows: indices of the valid tokens among `tokens`; None = all of them.
    Returns:
        loss (), norms (5, T) and coefficients (2, T) as `linear_nce_torch_fwd`, 0 for ignored tokens.
    """
    if kl.shape[0] == 0:
        return norms.new_zeros(()), norms.new_zeros((5, tokens)), norms.new_zeros((2, tokens))
    coefficients = loss_coefficients(kl, seq_ids, kl.shape[0], tokens, alpha, temperature, offset)
    loss = (coefficients * torch.stack((hard, soft))).sum()
    if rows is None:
        return loss, norms, coefficients
    norms, coefficients = (t.new_zeros((t.shape[0], tokens)).index_copy_(1, rows, t) for t in (norms, coefficients))
    return loss, norms, coefficients


def loss_coefficients(
    kl: torch.Tensor,
    seq_ids: torch.Tensor,
    count: int,
    tokens: int,
    alpha: float,
    temperature: float,
    offset: float,
) -> torch.Tensor:
    """Return the factors of the hard and the soft cross-entropy in the loss, (2, t), for tokens of whole sequences.

    Args:
        kl, seq_ids: (t,). count: number of tokens in the loss. tokens: T, above every id; another id gives NaN.
    """
    known = (seq_ids >= 0) & (seq_ids < tokens)
    # other ids, which reach this in a graph and on a GPU, share a place of their own
    place = torch.where(known, seq_ids, tokens)
    members = torch.bincount(place, minlength=tokens + 1)
    per_sequence = kl.new_zeros(tokens + 1).index_add_(0, place, kl) / members.clamp(min=1)
    calibration = (offset + torch.tanh(per_sequence[place])).masked_fill(~known, float("nan"))
    return torch.stack((torch.full_like(kl, (1 - alpha) / count), alpha * temperature**2 / count * calibration))


# ---- cuts -----------------------------------------------------------------------------------------------------------


def cut_sequences(sizes: Sequence[int], most: int) -> tuple[list[slice], list[slice]]:
    """Cut tokens that are sorted by sequence into chunks that end where sequences end.

    Args:
        sizes: tokens of each sequence. most: tokens of a chunk.
    Returns:
        chunks of whole sequences, and parts of the sequences that exceed `most`.
    """
    chunks: list[slice] = []
    parts: list[slice] = []
    begin, end = 0, 0
    for size in sizes:
        if end > begin and end + size - begin > most:
            chunks.append(slice(begin, end))
            begin = end
        end += size
        if size > most:
            parts.extend(slice(i, min(i + most, end)) for i in range(begin, end, most))
            begin = end
    if end > begin:
        chunks.append(slice(begin, end))
    return chunks, parts


def sort_and_cut(seq_ids: torch.Tensor, fit: int) -> tuple[torch.Tensor | None, list[slice], list[slice]]:
    """Sort tokens by sequence and cut them into chunks of at most `fit`, or a quarter of all if a sequence needs it.

    Args:
        seq_ids: (t,), t >= 1.
    Returns:
        the order of the tokens (None = as they are), the chunks, and the parts of sequences too long for a chunk.
    """
    ids, order = seq_ids.sort(stable=True)
    sizes = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    chunks, parts = cut_sequences(sizes, max(1, fit, min(max(sizes), len(ids) // 4)))
    return None if torch.equal(ids, seq_ids) else order, chunks, parts


def sort_and_cut_valid(
    targets: torch.Tensor, seq_ids: torch.Tensor, ignore_index: int, rows: int, most: int
) -> Plan | None:
    """Sort the valid tokens by sequence and cut them into chunks of whole sequences; waits for the device once.

    Args:
        targets, seq_ids: (T,), T >= 1.
        rows: tokens of a chunk, unless the longest sequence has more; most: their limit.
    Returns:
        order, ids (T,): the tokens sequence by sequence, ignored ones last, and their sequences; the chunks. None if a
        sequence exceeds `most`.
    """
    known = seq_ids.clamp(max=_NO_SEQUENCE - 1)
    ids, order = torch.sort(known.masked_fill(targets == ignore_index, _NO_SEQUENCE), stable=True)
    found, counts = torch.unique_consecutive(ids.cpu(), return_counts=True)
    sizes = counts[: found.numel() - int(found[-1] == _NO_SEQUENCE)].tolist()
    longest = max(sizes, default=0)
    if longest > most:
        return None
    return order, ids, cut_sequences(sizes, max(rows, longest))[0]


def triton_rows(weight: torch.Tensor) -> tuple[int, int]:
    """Return the tokens of a chunk of the Triton step, and the limit that a long sequence may extend them to."""
    most = max(1, _LOGIT_BYTES // (3 * (weight.shape[0] + _PADDING) * weight.element_size()))
    return min(_PRODUCT_ROWS, most // 128 * 128 or most), most


def chunk_tokens(tokens: int, weight: torch.Tensor, kept: torch.dtype) -> int:
    """Return the tokens of a chunk whose logits of two streams are kept in dtype `kept`; 0 if not one fits."""
    memory = _KEPT if weight.device.type == "cpu" else _KEPT_GPU
    return min(max(_TOKENS, tokens // 4), memory // (2 * weight.shape[0] * kept.itemsize))


# ---- the loop -------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """The work of a training step on a chunk of its tokens; `step` decides the chunks and their order."""

    def calibrate(self, rows: slice) -> torch.Tensor:
        """Return KL(p_neg || p_nat), (t,)."""

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        """Sweep the vocabulary and keep the logits that `gradient` needs.

        Returns:
            norms (5, t), as `linear_nce_torch_fwd`; the hard and the soft cross-entropy, each (t,);
            KL(p_neg || p_nat), (t,), unless `calibrated`.
        """

    def gradient(self, rows: slice, norms: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the hidden states of the tokens swept last, (t, d); coefficients (2, t)."""


def step(
    make_engine: Callable[..., Engine],
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    alpha: float,
    temperature: float,
    offset: float,
    ignore_index: int,
    kept: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss () and the student's gradient (T, d) at dloss = 1, both in the compute dtype.

    The gradient of a token needs the KL of its whole sequence. Sequences that fit into a chunk keep their logits until
    it is known. Longer ones are calibrated first, which takes one more product.

    Args:
        make_engine: called with student, nat, neg, targets and most=, the tokens of the largest chunk.
        kept: the dtype of a kept logit.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, neg, targets, seq_ids = take(rows, student, nat, neg, targets, seq_ids)
    compute = torch.promote_types(student.dtype, torch.float32)
    gradient = student.new_zeros((tokens, student.shape[1]), dtype=compute)
    count = targets.shape[0]
    if count == 0:
        return gradient.new_zeros(()), gradient
    order, chunks, parts = sort_and_cut(seq_ids, chunk_tokens(count, weight, kept))
    streams = take(order, student, nat, neg, targets)
    ids = seq_ids if order is None else seq_ids[order]
    place = rows if order is None else order if rows is None else rows[order]
    engine = make_engine(*streams, most=max(c.stop - c.start for c in chunks + parts))
    # hard and soft cross-entropy, KL
    statistics = gradient.new_zeros((3, count))

    def coefficients_of(chunk: torch.Tensor | slice) -> torch.Tensor:
        return loss_coefficients(statistics[2, chunk], ids[chunk], count, tokens, alpha, temperature, offset)

    def put_gradient(chunk: slice, norms: torch.Tensor, coefficients: torch.Tensor) -> None:
        part = engine.gradient(chunk, norms, coefficients)
        if place is None:
            gradient[chunk] = part
        else:
            gradient[place[chunk]] = part

    for chunk in chunks:
        norms, *found = engine.sweep(chunk)
        statistics[:, chunk] = torch.stack(found)
        put_gradient(chunk, norms, coefficients_of(chunk))
    for part in parts:
        statistics[2, part] = engine.calibrate(part)
    if parts:
        long = torch.cat([torch.arange(p.start, p.stop, device=ids.device) for p in parts])
        known = gradient.new_zeros((2, count)).index_copy_(1, long, coefficients_of(long))
        for part in parts:
            norms, *found = engine.sweep(part, calibrated=True)
            statistics[:2, part] = torch.stack(found)
            put_gradient(part, norms, known[:, part])
    if order is not None:
        # summed in the order of the tokens: the same bits as the loss without a gradient
        statistics = torch.empty_like(statistics).index_copy_(1, order, statistics)
    hard, soft, kl = statistics
    loss = combine(statistics, hard, soft, kl, seq_ids, None, tokens, alpha, temperature, offset)[0]
    return loss, gradient
