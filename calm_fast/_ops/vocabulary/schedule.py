"""Chunk schedule of the backward pass over a vocabulary, shared by torch, Triton and the compiled library.

An engine fills a chunk of logit gradients; torch's matrix products consume it. The schedule cuts rows or columns into
chunks, owns the buffer, and takes the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from calm_fast._ops.vocabulary.products import multiply_into, wide_product

# Elements of a chunk of logit gradients: 16 MiB in bfloat16 on a CPU, 128 MiB on a GPU, whose products need more rows
# to amortise reading the weight.
_CHUNK = 1 << 23
_CHUNK_GPU = 1 << 26
# Bytes of a chunk that the compiled library fills. It packs a weight row once for all tokens of the chunk; with 256
# tokens instead of 128 a training step took 5 % less time (512 tokens, d 576, V 49152, bfloat16).
_CHUNK_PACKED = 1 << 25

# writes the logit gradients of (rows, columns) into the buffer (rows, columns)
Fill = Callable[[slice, slice, torch.Tensor], None]
HeadGradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def valid_rows(targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Return the indices of the tokens that are not ignored; None = all of them."""
    valid = targets != ignore_index
    return None if bool(valid.all()) else valid.nonzero().squeeze(1)


def known_targets(targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return where 0 <= target < V: only there may an engine read the weight."""
    return (targets >= 0) & (targets < vocabulary)


def nan_where_unknown(values: torch.Tensor, targets: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return `values` (t,) with NaN where the target is not in the vocabulary: it has no logit."""
    return values.masked_fill(~known_targets(targets, vocabulary), float("nan"))


def take(rows: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Select `rows` (None = all) of each tensor."""
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def put(rows: torch.Tensor | None, values: torch.Tensor, tokens: int) -> torch.Tensor:
    """Undo `take`: place `values` at `rows` among `tokens` tokens, 0 elsewhere."""
    return values if rows is None else values.new_zeros((tokens, *values.shape[1:])).index_copy_(0, rows, values)


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Cut start .. stop into slices of at most `size`."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def within(block: slice, chunk: slice) -> slice:
    """Return where a block of tokens or columns lies relative to the start of its chunk."""
    return slice(block.start - chunk.start, block.stop - chunk.start)


def head_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool], fill: Fill, by_token: bool = True
) -> HeadGradients:
    """Return the gradients of the hidden states, weight and bias, computed from logit gradients chunk by chunk.

    Without a weight gradient a chunk is some rows and all columns: each row of dhidden is one whole product, rounded
    once. With one, a chunk is all rows and some columns: each row of dweight is one whole product, and dhidden sums
    the chunks' products in the compute dtype. Neither case needs a (V, d) accumulator.

    Args:
        hidden: (T, d). weight: (V, d).
        needs: which of the gradients of hidden, weight and bias are wanted.
        fill: called as fill(rows, columns, chunk) for each chunk, a buffer (rows, columns) in the inputs' dtype.
        by_token: the memory layout of a chunk: a token's gradients are contiguous, else a column's.
    Returns:
        dhidden (T, d), dweight (V, d) and dbias (V,) in the inputs' dtype; empty where not wanted.
    """
    gradients = _Accumulators(hidden, weight, needs)
    for rows, columns, chunk in _chunks(hidden, weight, needs[1], by_token):
        fill(rows, columns, chunk)
        gradients.add(rows, columns, chunk)
    return gradients.results()


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, by_columns: bool, by_token: bool
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield rows, columns and the buffer of each chunk; by_columns: all rows and some columns, else the reverse."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    if tokens == 0:
        return
    size = _CHUNK if weight.device.type == "cpu" else _CHUNK_GPU
    if not by_token:
        size = _CHUNK_PACKED // weight.element_size()
    if by_columns:
        rows, columns = tokens, _aligned(size // tokens, vocabulary)
    else:
        rows, columns = _aligned(size // vocabulary, tokens), vocabulary
    buffer = weight.new_empty(rows * columns)
    for r in blocks(0, tokens, rows):
        for c in blocks(0, vocabulary, columns):
            height, width = r.stop - r.start, c.stop - c.start
            part = buffer[: height * width]
            yield r, c, part.view(height, width) if by_token else part.view(width, height).T


def _aligned(size: int, most: int) -> int:
    """Return `size` clamped to 1 .. most, in whole tiles of 128 from 128 on."""
    return max(1, min(most, size // 128 * 128 if size >= 128 else size))


class _Accumulators:
    """The three gradients, each None where it is not wanted."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needs: Sequence[bool]) -> None:
        self.hidden, self.weight = hidden, weight
        need_hidden, self.by_columns, need_bias = needs
        self.compute = torch.promote_types(weight.dtype, torch.float32)
        accumulate = self.compute if self.by_columns else hidden.dtype
        self.dhidden = hidden.new_zeros(hidden.shape, dtype=accumulate) if need_hidden else None
        self.dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if self.by_columns else None
        self.dbias = weight.new_zeros(weight.shape[0], dtype=self.compute) if need_bias else None

    def add(self, rows: slice, columns: slice, dlogits: torch.Tensor) -> None:
        """Add the products of one chunk (rows, columns), in the inputs' dtype."""
        if self.dhidden is not None:
            if self.by_columns:
                self.dhidden[rows] += wide_product(dlogits, self.weight[columns])
            else:
                multiply_into(self.dhidden[rows], dlogits, self.weight[columns])
        if self.dweight is not None:
            multiply_into(self.dweight[columns], dlogits.T, self.hidden[rows])
        if self.dbias is not None:
            self.dbias[columns] += dlogits.sum(dim=0, dtype=self.compute)

    def results(self) -> HeadGradients:
        """Return the gradients in the inputs' dtype, empty where not wanted."""
        found = (self.dhidden, self.dweight, self.dbias)
        dhidden, dweight, dbias = (self.weight.new_empty(0) if g is None else g.to(self.weight.dtype) for g in found)
        return dhidden, dweight, dbias
