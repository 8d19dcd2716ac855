"""One tile of logits at a time: what the blocked linear_nce and linear_logprob share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# elements of a tile: its float32 copy of 2 MiB stays in a core's caches from the product to the last sum; with half of
# it the product was 4 % slower, with twice as much nothing was faster (512 tokens, d 576, V 49152, bfloat16)
_TILE = 1 << 19
_COLUMNS = 1024
# elements of a chunk of logit gradients between the tiles and the products that consume it: 16 MiB in bfloat16 on a
# CPU, 128 MiB on a GPU, whose products need more rows to pay for reading the weight
_CHUNK = 1 << 23
_CHUNK_GPU = 1 << 26
# bytes of a chunk that the compiled library fills: it packs a weight row once for all tokens of the chunk, and with 256
# instead of 128 of them a training step took 5 % less (512 tokens, d 576, V 49152, bfloat16)
_CHUNK_PACKED = 1 << 25


class LogitTiles:
    """Tiles of z = softcap(rows weight^T + bias), recomputed whenever they are asked for; no (T, V) tensor anywhere.

    A tile is one product in the inputs' dtype (float32 accumulation inside), handed out in the compute dtype, float32
    (float64 for float64 inputs), in a buffer that the next tile of the same stream overwrites.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, tokens: int, streams: int = 1
    ) -> None:
        """weight: (V, d). bias: (V,) or None. tokens: T. streams: how many hidden states meet the same columns.

        `like`, an empty tensor, gives the device and the compute dtype.
        """
        self.weight, self.softcap = weight, softcap
        compute = torch.promote_types(weight.dtype, torch.float32)
        self.bias = None if bias is None else bias.to(compute)
        self.columns = max(1, min(_COLUMNS, weight.shape[0]))
        self.rows = max(1, min(tokens, _TILE // self.columns))
        size = self.rows * self.columns
        self._tiles = [weight.new_empty(size, dtype=compute) for _ in range(streams)]
        self._spare: dict[int, torch.Tensor] = {}
        self.like = weight.new_empty(0, dtype=compute)
        self._product = None if weight.dtype == compute else weight.new_empty(size)

    def row_blocks(self, rows: slice) -> Iterator[slice]:
        return blocks(rows.start, rows.stop, self.rows)

    def column_blocks(self, columns: slice | None = None) -> Iterator[slice]:
        """Blocks of `columns`; None = the whole vocabulary."""
        columns = slice(0, self.weight.shape[0]) if columns is None else columns
        return blocks(columns.start, columns.stop, self.columns)

    def spare(self, like: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Scratch of the tile's shape, in the compute dtype; index 0 or 1."""
        if index not in self._spare:
            self._spare[index] = torch.empty_like(self._tiles[0])
        return self._spare[index][: like.numel()].view(like.shape)

    def logits(
        self, rows: torch.Tensor, columns: slice, stream: int = 0, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The tile of `rows` (t, d) and `columns`, with bias and softcap: (t, columns) in the compute dtype.

        keep: (t, columns) in the inputs' dtype, gets the bare product, for `finish`.
        """
        weight = self.weight[columns]
        if keep is None:
            buffer = self._tiles[stream] if self._product is None else self._product
            keep = buffer[: rows.shape[0] * weight.shape[0]].view(rows.shape[0], weight.shape[0])
        return self.finish(torch.mm(rows, weight.T, out=keep), columns, stream)

    def finish(self, product: torch.Tensor, columns: slice, stream: int = 0) -> torch.Tensor:
        """The tile of a bare product: `logits` again without multiplying."""
        tile = self._tiles[stream][: product.numel()].view(product.shape)
        if product.data_ptr() != tile.data_ptr():
            tile.copy_(product)
        if self.bias is not None:
            tile += self.bias[columns]
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile

    def without_banned(self, logits: torch.Tensor) -> torch.Tensor:
        """The tile with 0 for -inf, in place: a bias of -inf rules a token out, and p = 0 times -inf would be NaN."""
        if self.bias is not None and self.softcap is None:
            logits.masked_fill_(logits == float("-inf"), 0.0)
        return logits

    def through_softcap(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the capped logits turned, in place, into that of the logits before the cap."""
        if self.softcap is not None:
            slope = torch.mul(logits, logits, out=self.spare(logits, 1))
            gradient.addcmul_(gradient, slope, value=-1.0 / self.softcap**2)
        return gradient


class RunningSum:
    """Per row, sum exp(scale * logits) over the tiles seen so far, and one sum weighted by the same exponentials.

    Kept in base 2, relative to a running maximum (torch.exp2 is three times as fast as torch.exp on a CPU).
    """

    def __init__(self, rows: int, like: torch.Tensor, scale: float = 1.0) -> None:
        """rows: t. like: gives device and dtype (the compute dtype)."""
        self.scale = scale * LOG2_E
        self.max = like.new_full((rows, 1), float("-inf"))
        self.total = like.new_zeros(rows)
        self.weighted = like.new_zeros(rows)

    def add(self, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Account for a tile; returns exp2(scale * logits - max) in `out`, for `weigh`."""
        top = torch.maximum(self.max, logits.amax(dim=1, keepdim=True) * self.scale)
        # a row of nothing but -inf keeps a finite reference, so that no inf - inf comes up
        reference = top.masked_fill(top == float("-inf"), 0.0)
        shrink = torch.exp2(self.max - reference).squeeze(1)
        torch.add(-reference, logits, alpha=self.scale, out=out).exp2_()
        self.max = top
        self.total.mul_(shrink).add_(out.sum(dim=1))
        self.weighted.mul_(shrink)
        return out

    def weigh(self, weights: torch.Tensor, values: torch.Tensor) -> None:
        """Add sum_j weights_j values_j, `weights` being what `add` returned for this tile; overwrites `weights`."""
        self.weighted += weights.mul_(values).sum(dim=1)

    def log_sum(self) -> torch.Tensor:
        """(t,) log sum exp(scale * logits), a natural logarithm."""
        return (self.max.squeeze(1) + self.total.log2()) * LN_2

    def log_share(self, logits: torch.Tensor) -> torch.Tensor:
        """log(exp(scale * logits) / sum) of one logit a row (t,); never above 0."""
        # by the same operation as in `add`, so that the rounding of the maximum cancels
        share = torch.add(-self.max.squeeze(1), logits, alpha=self.scale)
        return ((share - self.total.log2()) * LN_2).clamp_(max=0.0)

    def entropy(self) -> torch.Tensor:
        """(t,) the entropy of the softmax, the logits themselves having been weighed; never below 0."""
        spread = self.max.squeeze(1) - self.mean() * self.scale
        return ((self.total.log2() + spread) * LN_2).clamp_(min=0.0)

    def mean(self) -> torch.Tensor:
        """(t,) the weighted sum over the sum of the weights."""
        return self.weighted / self.total


class TargetLogits:
    """Picks z[t, targets_t] out of the tiles as they go by."""

    def __init__(self, targets: torch.Tensor, columns: int, like: torch.Tensor) -> None:
        """targets: (t,). columns: of a tile. like: gives device and dtype (the compute dtype)."""
        self.block, self.offset = targets // columns, (targets % columns).unsqueeze(1)
        self.columns = columns
        self.values = like.new_zeros(targets.shape[0])

    def add(self, logits: torch.Tensor, columns: slice) -> torch.Tensor:
        """Account for a tile; returns which of its rows have their target in it, (t,) bool."""
        here = self.block == columns.start // self.columns
        # the last tile may be narrower than an offset of some other block
        offset = self.offset if logits.shape[1] == self.columns else self.offset.clamp(max=logits.shape[1] - 1)
        self.values = torch.where(here, logits.gather(1, offset).squeeze(1), self.values)
        return here


def valid_rows(targets: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Indices of the tokens that count; None = all of them."""
    valid = targets != ignore_index
    return None if bool(valid.all()) else valid.nonzero().squeeze(1)


def take(rows: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensors if rows is None else tuple(t[rows] for t in tensors)


def put(rows: torch.Tensor | None, values: torch.Tensor, tokens: int) -> torch.Tensor:
    """The inverse of `take`: values of the tokens that count at their places among all, 0 elsewhere."""
    return values if rows is None else values.new_zeros((tokens, *values.shape[1:])).index_copy_(0, rows, values)


def within(block: slice, chunk: slice) -> slice:
    """Where a block of tokens or columns lies in a chunk."""
    return slice(block.start - chunk.start, block.stop - chunk.start)


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """start .. stop in slices of at most `size`."""
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))


def probabilities(logits: torch.Tensor, log_sum: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """exp(scale * logits - log_sum) in `out`; log_sum (t,)."""
    return torch.add(log_sum.unsqueeze(1) * -LOG2_E, logits, alpha=scale * LOG2_E, out=out).exp2_()


def subtract_at(gradient: torch.Tensor, targets: torch.Tensor, amount: torch.Tensor, columns: slice) -> None:
    """gradient[i, targets_i - columns.start] -= amount_i for the targets inside `columns`; targets, amount (t,)."""
    local = targets - columns.start
    inside = (local >= 0) & (local < gradient.shape[1])
    index = local.clamp(0, gradient.shape[1] - 1).unsqueeze(1)
    gradient.scatter_add_(1, index, torch.where(inside, -amount, 0.0).unsqueeze(1))


def _aligned(size: int, most: int) -> int:
    """At most `most` rows or columns; whole tiles of 128 where there are that many."""
    return max(1, min(most, size // 128 * 128 if size >= 128 else size))


def _wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, not rounded to the inputs' dtype where torch offers that (16-bit inputs on a GPU)."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def exact_product(dlogits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """dlogits (t, V) @ weight (V, d) in the compute dtype, rounded to 16 bits at most once."""
    if weight.device.type != "cpu" or weight.dtype != torch.float16:
        return _wide_product(dlogits, weight).to(torch.promote_types(weight.dtype, torch.float32))
    # no room for a sum beyond 65504, and CPUs multiply float16 slower than its float32 copy
    out = dlogits.new_zeros((dlogits.shape[0], weight.shape[1]), dtype=torch.float32)
    for c in blocks(0, weight.shape[0], _COLUMNS):
        out.addmm_(dlogits[:, c].float(), weight[c].float())
    return out


class Gradients:
    """Turns logit gradients, a chunk at a time, into those of hidden states, weight and bias.

    Without a weight gradient a chunk is some rows and all columns: each row of dhidden is one whole product, rounded
    once. With one, a chunk is all rows and some columns: each row of dweight is one whole product, and dhidden sums
    the chunks' products in the compute dtype. Either way no (V, d) accumulator is needed.
    """

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, needs: tuple[bool, bool, bool]) -> None:
        """hidden: (T, d). weight: (V, d). needs: whether the gradients of hidden, weight and bias are wanted."""
        self.hidden, self.weight = hidden, weight
        need_hidden, need_weight, need_bias = needs
        self.compute = torch.promote_types(weight.dtype, torch.float32)
        self.by_columns = need_weight
        accumulate = self.compute if need_weight else hidden.dtype
        self.dhidden = hidden.new_zeros(hidden.shape, dtype=accumulate) if need_hidden else None
        self.dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        self.dbias = weight.new_zeros(weight.shape[0], dtype=self.compute) if need_bias else None

    def chunks(self, by_token: bool = True) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """(rows, columns, buffer): fill the buffer (rows, columns) with logit gradients, then call `add`.

        by_token: a token's gradients lie side by side; else a column's do, as the compiled library writes them.
        """
        tokens, vocabulary = self.hidden.shape[0], self.weight.shape[0]
        if tokens == 0:
            return
        size = _CHUNK if self.weight.device.type == "cpu" else _CHUNK_GPU
        if not by_token:
            size = _CHUNK_PACKED // self.weight.element_size()
        if self.by_columns:
            rows, columns = tokens, _aligned(size // tokens, vocabulary)
        else:
            rows, columns = _aligned(size // vocabulary, tokens), vocabulary
        buffer = self.weight.new_empty(rows * columns)
        for r in blocks(0, tokens, rows):
            for c in blocks(0, vocabulary, columns):
                shape = (r.stop - r.start, c.stop - c.start)
                part = buffer[: shape[0] * shape[1]]
                yield r, c, part.view(shape) if by_token else part.view(shape[::-1]).T

    def add(self, rows: slice, columns: slice, dlogits: torch.Tensor) -> None:
        """Account for a chunk (rows, columns) in the inputs' dtype."""
        if self.dhidden is not None:
            if self.by_columns:
                self.dhidden[rows] += _wide_product(dlogits, self.weight[columns])
            else:
                torch.mm(dlogits, self.weight[columns], out=self.dhidden[rows])
        if self.dweight is not None:
            torch.mm(dlogits.T, self.hidden[rows], out=self.dweight[columns])
        if self.dbias is not None:
            self.dbias[columns] += dlogits.sum(dim=0, dtype=self.compute)

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dhidden, dweight, dbias) in the inputs' dtype; an empty tensor for what was not wanted."""
        found = (self.dhidden, self.dweight, self.dbias)
        dhidden, dweight, dbias = (self.weight.new_empty(0) if g is None else g.to(self.weight.dtype) for g in found)
        return dhidden, dweight, dbias
