"""Tiles of logits, running sums and tile gradients in torch, shared by linear_nce and linear_logprob."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from calm_fast._ops.vocabulary.products import multiply_into
from calm_fast._ops.vocabulary.schedule import blocks, nan_where_unknown

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

# Elements of a tile. Its float32 copy of 2 MiB stays in a core's caches from the product to the last sum. With half as
# many the product was 4 % slower, with twice as many nothing was faster (512 tokens, d 576, V 49152, bfloat16).
_TILE = 1 << 19
# Columns of a tile at least. Few tokens get more, up to half a tile of elements: each tile costs about 15 calls of
# torch's ops beside its arithmetic, three times the work of one token and 1024 columns.
_COLUMNS = 1024
# stands for the difference to a logit of -inf where a product with 0 must be 0
_NO_LOGIT = -1.0e30


def softcap_(z: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Replace z by softcap * tanh(z / softcap), in place; None leaves it as it is."""
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


class LogitTiles:
    """Tiles of z = softcap(rows weight^T + bias), recomputed on each call; no (T, V) tensor is ever stored.

    A tile is one product in the inputs' dtype, accumulated in float32. It is returned in the compute dtype, float32
    (float64 for float64 inputs), in a buffer that the next tile of the same stream overwrites.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, tokens: int, streams: int = 1
    ) -> None:
        """Allocate the buffers.

        Args:
            weight: (V, d). bias: (V,) or None.
            tokens: T, the most rows that will be asked for.
            streams: number of hidden-state tensors whose tiles are in use at the same time.
        """
        self.weight, self.softcap = weight, softcap
        compute = torch.promote_types(weight.dtype, torch.float32)
        self.bias = None if bias is None else bias.to(compute)
        self.columns = max(1, min(max(_COLUMNS, _TILE // (2 * max(1, tokens))), weight.shape[0]))
        self.rows = max(1, min(tokens, _TILE // self.columns))
        size = self.rows * self.columns
        self._tiles = [weight.new_empty(size, dtype=compute) for _ in range(streams)]
        self._spare: dict[int, torch.Tensor] = {}
        # empty; carries the device and the compute dtype
        self.like = weight.new_empty(0, dtype=compute)
        self._product = None if weight.dtype == compute else weight.new_empty(size)

    def row_blocks(self, rows: slice) -> Iterator[slice]:
        """Cut `rows` into blocks of a tile's height."""
        return blocks(rows.start, rows.stop, self.rows)

    def column_blocks(self, columns: slice | None = None) -> Iterator[slice]:
        """Cut `columns` (None = the whole vocabulary) into blocks of a tile's width."""
        columns = slice(0, self.weight.shape[0]) if columns is None else columns
        return blocks(columns.start, columns.stop, self.columns)

    def spare(self, like: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Return scratch memory of the shape of `like` in the compute dtype; index 0 or 1 selects the buffer."""
        if index not in self._spare:
            self._spare[index] = torch.empty_like(self._tiles[0])
        return self._spare[index][: like.numel()].view(like.shape)

    def logits(
        self, rows: torch.Tensor, columns: slice, stream: int = 0, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the tile of `rows` (t, d) and `columns`, with bias and softcap: (t, columns) in the compute dtype.

        Args:
            stream: which tile buffer to use.
            keep: (t, columns) in the inputs' dtype; receives the bare product, which `finish` takes later.
        """
        weight = self.weight[columns]
        size = rows.shape[0] * weight.shape[0]
        tile = self._tiles[stream][:size].view(rows.shape[0], weight.shape[0])
        if keep is None:
            keep = tile if self._product is None else self._product[:size].view(tile.shape)
        return self.finish(multiply_into(keep, rows, weight.T, scratch=tile), columns, stream)

    def finish(self, product: torch.Tensor, columns: slice, stream: int = 0) -> torch.Tensor:
        """Return the tile of a product kept by `logits`, without multiplying again."""
        tile = self._tiles[stream][: product.numel()].view(product.shape)
        if product.data_ptr() != tile.data_ptr():
            tile.copy_(product)
        if self.bias is not None:
            tile += self.bias[columns]
        return softcap_(tile, self.softcap)

    def zero_banned_(self, logits: torch.Tensor) -> torch.Tensor:
        """Replace -inf by 0, in place: a bias of -inf rules a token out, and p = 0 times -inf would be NaN."""
        if self.bias is not None and self.softcap is None:
            logits.masked_fill_(logits == float("-inf"), 0.0)
        return logits

    def softcap_backward_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Turn the gradient of the capped logits into that of the logits before the cap, in place."""
        if self.softcap is not None:
            slope = torch.mul(logits, logits, out=self.spare(logits, 1))
            gradient.addcmul_(gradient, slope, value=-1.0 / self.softcap**2)
        return gradient


class RunningSum:
    """Per row, sum exp(scale * (z - top)) over the logits z seen so far, and one sum weighted by the same powers.

    `top` is the running maximum of the logits themselves, so the differences are exact where they matter. A probability
    computed from `top` and the sum loses nothing to the size of the logits. From one rounded log-sum-exp it would.
    Powers are in base 2 (torch.exp2 is three times as fast as torch.exp on a CPU).
    """

    def __init__(self, rows: int, like: torch.Tensor, *scales: float) -> None:
        """Start with empty sums, one for each scale, for `rows` rows, with the device and dtype of `like`."""
        self.scales = [scale * LOG2_E for scale in scales]
        self.top = like.new_full((rows,), float("-inf"))
        self.totals = [like.new_zeros(rows) for _ in scales]
        # weighted by the powers of the last scale
        self.weighted = like.new_zeros(rows)

    def raise_(self, logits: torch.Tensor) -> torch.Tensor:
        """Raise `top` to the maximum of a tile (t, columns), which becomes logits - top; return old - new top, (t,)."""
        top = torch.maximum(self.top, logits.amax(dim=1))
        # a row that holds only -inf needs a finite reference: inf - inf would be NaN
        reference = top.masked_fill(top == float("-inf"), 0.0)
        moved = (self.top - reference).clamp_(min=_NO_LOGIT)
        for scale, total in zip(self.scales, self.totals, strict=True):
            shrink = (moved * scale).exp2_()
            total.mul_(shrink)
        self.weighted.mul_(shrink)
        self.top = top
        logits.sub_(reference.unsqueeze(1))
        return moved

    def follow(self, moved: torch.Tensor) -> None:
        """Keep the weighted sum right where the values of earlier tiles change by `moved` (t,)."""
        self.weighted.addcmul_(self.totals[-1], moved)

    def add(self, differences: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add a tile that `raise_` has taken; return the powers of the last scale in `out`."""
        for scale, total in zip(self.scales, self.totals, strict=True):
            torch.mul(differences, scale, out=out).exp2_()
            total += out.sum(dim=1)
        return out

    def add_weighted(self, weights: torch.Tensor, values: torch.Tensor) -> None:
        """Add sum_j weights_j values_j. `weights` is what `add` returned for this tile; it is overwritten."""
        self.weighted += weights.mul_(values).sum(dim=1)

    def log_total(self, index: int = 0) -> torch.Tensor:
        """Return log sum exp(scale * (z - top)) for the scale of this index, (t,)."""
        return self.totals[index].log2() * LN_2

    def log_share(self, logits: torch.Tensor) -> torch.Tensor:
        """Return log(exp(scale * z) / sum) of one logit per row (t,), for the first scale; never above 0."""
        return (((logits - self.top) * self.scales[0] - self.totals[0].log2()) * LN_2).clamp_(max=0.0)

    def mean(self) -> torch.Tensor:
        """Return the weighted sum divided by the sum of the weights, (t,)."""
        return self.weighted / self.totals[-1]


class TargetLogits:
    """z[t, targets_t], collected from the tiles in which the targets lie; NaN if a target is not in the vocabulary."""

    def __init__(self, targets: torch.Tensor, columns: int, vocabulary: int, like: torch.Tensor) -> None:
        """Take targets (t,) and the width of a tile; `like` carries the device and the compute dtype."""
        self.block, self.offset = targets // columns, (targets % columns).unsqueeze(1)
        self.columns = columns
        self.values = nan_where_unknown(like.new_zeros(targets.shape[0]), targets, vocabulary)

    def add(self, logits: torch.Tensor, columns: slice) -> torch.Tensor:
        """Read a tile; return a mask (t,) of the rows whose target lies in it."""
        here = (self.block == columns.start // self.columns) & ~self.values.isnan()
        # the last tile may be narrower than an offset of some other block
        offset = self.offset if logits.shape[1] == self.columns else self.offset.clamp(max=logits.shape[1] - 1)
        self.values = torch.where(here, logits.gather(1, offset).squeeze(1), self.values)
        return here


def powers(logits: torch.Tensor, top: torch.Tensor, scale: float, out: torch.Tensor) -> torch.Tensor:
    """Compute exp(scale * (logits - top)) into `out`; top (t,)."""
    return torch.sub(logits, top.unsqueeze(1), out=out).mul_(scale * LOG2_E).exp2_()


def subtract_at_targets_(gradient: torch.Tensor, targets: torch.Tensor, amount: torch.Tensor, columns: slice) -> None:
    """Subtract amount_i from gradient[i, targets_i - columns.start] where the target lies in `columns`, in place.

    targets, amount: (t,).
    """
    local = targets - columns.start
    inside = (local >= 0) & (local < gradient.shape[1])
    index = local.clamp(0, gradient.shape[1] - 1).unsqueeze(1)
    gradient.scatter_add_(1, index, torch.where(inside, -amount, 0.0).unsqueeze(1))
