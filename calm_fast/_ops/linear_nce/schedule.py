"""The training step of linear_nce for a head that is not trained: which tokens when, and what they weigh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from calm_fast._ops.vocabulary.torch_impl import take, valid_rows

Stats = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# bytes of the logits of two streams that a step keeps until the KL of their sequences is known: 128 tokens of 49152
# columns in 16 bits on a CPU
_KEPT = 24 << 20
_KEPT_GPU = 256 << 20
# tokens of a chunk at least, where memory allows them: below, reading the weight takes a growing share of the time
_TOKENS = 128


def combine(
    lse: torch.Tensor,
    hard: torch.Tensor,
    soft: torch.Tensor,
    kl: torch.Tensor,
    seq_ids: torch.Tensor,
    rows: torch.Tensor | None,
    tokens: int,
    alpha: float,
    temperature: float,
    offset: float,
) -> Stats:
    """The loss from the numbers of the tokens that count.

    Args:
        lse (3, t), hard, soft, kl (t,): what `Engine.sweep` returns. seq_ids: (t,). rows: which of the `tokens` they
            are, None = all.
    Returns:
        what `linear_nce_torch_fwd` does, (3, T) and (2, T) with zeros for the other tokens.
    """
    if kl.shape[0] == 0:
        return lse.new_zeros(()), lse.new_zeros((3, tokens)), lse.new_zeros((2, tokens))
    some = coefficients_of(kl, seq_ids, kl.shape[0], tokens, alpha, temperature, offset)
    loss = (some * torch.stack((hard, soft))).sum()
    if rows is None:
        return loss, lse, some
    return loss, *(t.new_zeros((t.shape[0], tokens)).index_copy_(1, rows, t) for t in (lse, some))


def coefficients_of(
    kl: torch.Tensor,
    seq_ids: torch.Tensor,
    count: int,
    tokens: int,
    alpha: float,
    temperature: float,
    offset: float,
) -> torch.Tensor:
    """(2, t) what the hard and the soft cross-entropy of tokens of whole sequences weigh in the loss.

    Args:
        kl, seq_ids: (t,). count: of tokens in the loss. tokens: T, above every id.
    """
    members = torch.bincount(seq_ids, minlength=tokens)
    per_sequence = kl.new_zeros(tokens).index_add_(0, seq_ids, kl) / members.clamp(min=1)
    calibration = offset + torch.tanh(per_sequence[seq_ids])
    return torch.stack((torch.full_like(kl, (1 - alpha) / count), alpha * temperature**2 / count * calibration))


class Engine(Protocol):
    """What a training step does with some of its tokens; `step` says which and when."""

    def calibrate(self, rows: slice) -> torch.Tensor:
        """KL(p_neg || p_nat), (t,)."""

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        """lse (3, t) of student, student over tau, nat over tau; hard and soft cross-entropy, and kl unless
        `calibrated`, each (t,). Keeps what `gradient` needs."""

    def gradient(self, rows: slice, lse: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """(t, d) the gradient of the hidden states of the tokens swept last; coefficients (2, t)."""


def whole_sequences(seq_ids: torch.Tensor, fit: int) -> tuple[torch.Tensor | None, list[slice], list[slice]]:
    """Tokens sorted by sequence and cut into chunks that end where sequences end.

    A chunk has at most `fit` tokens, or up to a quarter of all where a sequence needs it.

    Args:
        seq_ids: (t,), t >= 1.
    Returns:
        the order of the tokens, None = as they are; the chunks; the parts of sequences that are too long for one.
    """
    ids, order = seq_ids.sort(stable=True)
    sizes = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    most = max(1, fit, min(max(sizes), len(ids) // 4))
    chunks, parts, begin, end = [], [], 0, 0
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
    return None if torch.equal(ids, seq_ids) else order, chunks, parts


def _tokens_of_a_chunk(tokens: int, weight: torch.Tensor, kept: torch.dtype) -> int:
    memory = _KEPT if weight.device.type == "cpu" else _KEPT_GPU
    return min(max(_TOKENS, tokens // 4), memory // (2 * weight.shape[0] * kept.itemsize))


def step(
    engine_of: Callable[..., Engine],
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
    """The loss () and the student's gradient (T, d) at dloss = 1, both in the compute dtype.

    The gradient of a token needs the KL of its whole sequence: sequences that fit into a chunk keep their logits until
    it is known, longer ones are calibrated first, which takes one product more.

    Args:
        engine_of: makes the engine from student, nat, neg, targets and most=, the tokens of the largest chunk.
        kept: the dtype of a kept logit.
    """
    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, neg, targets, seq_ids = take(rows, student, nat, neg, targets, seq_ids)
    compute = torch.promote_types(student.dtype, torch.float32)
    gradient = student.new_zeros((tokens, student.shape[1]), dtype=compute)
    count = targets.shape[0]
    if count == 0:
        return gradient.new_zeros(()), gradient
    order, chunks, parts = whole_sequences(seq_ids, _tokens_of_a_chunk(count, weight, kept))
    streams = take(order, student, nat, neg, targets)
    ids = seq_ids if order is None else seq_ids[order]
    place = rows if order is None else order if rows is None else rows[order]
    engine = engine_of(*streams, most=max(c.stop - c.start for c in chunks + parts))
    numbers = gradient.new_zeros((3, count))  # hard, soft, kl

    def weigh(tokens_of: torch.Tensor | slice) -> torch.Tensor:
        kl, own = numbers[2, tokens_of], ids[tokens_of]
        return coefficients_of(kl, own, count, tokens, alpha, temperature, offset)

    def put_gradient(chunk: slice, lse: torch.Tensor, coefficients: torch.Tensor) -> None:
        part = engine.gradient(chunk, lse, coefficients)
        if place is None:
            gradient[chunk] = part
        else:
            gradient[place[chunk]] = part

    for chunk in chunks:
        lse, *found = engine.sweep(chunk)
        numbers[:, chunk] = torch.stack(found)
        put_gradient(chunk, lse, weigh(chunk))
    for part in parts:
        numbers[2, part] = engine.calibrate(part)
    if parts:
        long = torch.cat([torch.arange(p.start, p.stop, device=ids.device) for p in parts])
        known = gradient.new_zeros((2, count)).index_copy_(1, long, weigh(long))
        for part in parts:
            lse, *found = engine.sweep(part, calibrated=True)
            numbers[:2, part] = torch.stack(found)
            put_gradient(part, lse, known[:, part])
    if order is not None:  # summed in the order of the tokens: the bits of the loss without a gradient
        numbers = torch.empty_like(numbers).index_copy_(1, order, numbers)
    loss = combine(numbers, *numbers, seq_ids, None, tokens, alpha, temperature, offset)[0]
    return loss, gradient
