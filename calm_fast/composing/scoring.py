"""Losses of held-out rows, and what is said about them: per token, per byte, with intervals over rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calm_fast.composing.data import Example
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.progress import progress_bar
from calm_fast.core.token_ids import check_token_ids

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
RESAMPLES = 1000
_LOGIT_BYTES = 1 << 28  # of the logits of one batch


@dataclass(frozen=True)
class RowLosses:
    """Summed losses of each row in nats, float64 (n,), with the number of scored tokens and bytes (n,)."""

    loss: torch.Tensor
    tokens: torch.Tensor
    bytes: torch.Tensor

    def total(self, unit: str) -> float:
        """Return the loss in nats per token, or with unit "bytes" in bits per byte."""
        return float(_ratio(self.loss.sum(), self._size(unit).sum(), unit))

    def resampled(self, unit: str, chosen: torch.Tensor) -> torch.Tensor:
        """Return `total` of resampled rows. chosen: (resamples, n) int64 indices of rows."""
        return _ratio(self.loss[chosen].sum(1), self._size(unit)[chosen].sum(1), unit)

    def _size(self, unit: str) -> torch.Tensor:
        return self.bytes if unit == "bytes" else self.tokens


def _ratio(loss: torch.Tensor, size: torch.Tensor, unit: str) -> torch.Tensor:
    return loss / size.double().clamp(min=1) / (math.log(2) if unit == "bytes" else 1.0)


def row_losses(
    model: Any, examples: Sequence[Example], collate: Collate, device: torch.device, *, title: str | None = None
) -> RowLosses:
    """Score the examples with `model`, in eval mode and without gradients.

    collate: as of a Trainer. Batches hold rows in their order, as many as keep the logits small. title: shows a bar.
    """
    check_token_ids("held-out rows", "tokenizer", [i for example in examples for i in example.input_ids], model)
    sizes = [len(example.input_ids) for example in examples]
    width = max(1, int(getattr(model.config.get_text_config(), "vocab_size", 1)))
    starts = _batches(sizes, max(1, _LOGIT_BYTES // (12 * width)))
    losses: list[torch.Tensor] = []
    bar = progress_bar(total=len(examples), desc=title or "", unit="row", shown=title is not None)
    with eval_mode(model), bar:
        for start, stop in zip(starts, [*starts[1:], len(examples)], strict=True):
            batch = collate([example.item() for example in examples[start:stop]])
            losses.append(_batch_losses(model, {k: to_device(v, device) for k, v in batch.items()}))
            bar.update(stop - start)
    counts = torch.tensor([example.scored for example in examples])
    return RowLosses(torch.cat(losses), counts, torch.tensor([example.scored_bytes for example in examples]))


def to_device(value: Any, device: torch.device) -> Any:
    """Move a value of a batch: a tensor, or a list with a tensor or None for each augmenter."""
    if isinstance(value, (list, tuple)):
        return [to_device(part, device) for part in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _batches(sizes: Sequence[int], budget: int) -> list[int]:
    """Return where batches begin, so that rows x longest row stays within `budget`, or one row exceeds it alone."""
    starts, longest = [0], 0
    for place, size in enumerate(sizes):
        longest = max(longest, size)
        if place > starts[-1] and (place - starts[-1] + 1) * longest > budget:
            starts.append(place)
            longest = size
    return starts


def _batch_losses(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    targets = batch.pop("labels")[:, 1:]
    scored = targets != -100
    logits = model(**batch, use_cache=False).logits[:, :-1]
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[scored]
    losses = torch.nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
    found = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    return found.index_add(0, rows, losses.double()).cpu()


def describe(losses: RowLosses) -> dict[str, Any]:
    """Return the loss per token and per byte of a model, with 95 % bootstrap intervals over rows."""
    loss, bits = losses.total("tokens"), losses.total("bytes")
    chosen = _resamples(len(losses.loss))
    return {
        "loss_per_token": _number(loss),
        "loss_per_token_interval": _interval(losses.resampled("tokens", chosen)),
        "perplexity": _number(math.exp(loss)) if loss < 700 else None,
        "bits_per_byte": _number(bits),
        "bits_per_byte_interval": _interval(losses.resampled("bytes", chosen)),
        "tokens": int(losses.tokens.sum()),
        "bytes": int(losses.bytes.sum()),
        "rows": len(losses.loss),
    }


def compare(first: RowLosses, second: RowLosses, unit: str) -> dict[str, Any]:
    """Return the loss of `first` minus that of `second`, with its 95 % interval over resampled pairs of rows."""
    chosen = _resamples(len(first.loss))
    difference = first.resampled(unit, chosen) - second.resampled(unit, chosen)
    return {
        "unit": "bits per byte" if unit == "bytes" else "nats per token",
        "difference": _number(first.total(unit) - second.total(unit)),
        "interval": _interval(difference),
    }


def _resamples(rows: int) -> torch.Tensor:
    """Return (RESAMPLES, rows) indices, the same in every call, so that models are compared on the same rows."""
    return torch.randint(rows, (RESAMPLES, rows), generator=torch.Generator().manual_seed(0))


def _interval(values: torch.Tensor) -> list[float] | None:
    """Return the middle 95 % of resampled values; None for values that are not finite or do not differ."""
    if not bool(values.isfinite().all()) or bool((values == values[0]).all()):
        return None
    quantiles = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype))
    return [round(value, 6) for value in quantiles.tolist()]


def _number(value: float) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity."""
    return round(value, 6) if math.isfinite(value) else None
