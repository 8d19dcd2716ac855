"""The texts that each augmenter reads in a batch: the ids by which its states are found on disk."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from calm_fast.core.checks import bad_value, describe

ANCHOR, OWN, PROMPT = "the anchor's ids", "ids of its own", "the prompt"  # what an augmenter reads
DIGEST = 16  # bytes that name a text


class Texts(NamedTuple):
    """What one augmenter reads in a batch.

    ids: of every text. places: (row, first slot) of every text. shape: (B, N) of the slots; N is None where the longest
    text decides. masked: True if the batch has a mask for them.
    """

    ids: list[list[int]]
    places: list[tuple[int, int]]
    shape: tuple[int, int | None]
    masked: bool


def digest(ids: Sequence[int]) -> bytes:
    """Return the name of a text, DIGEST bytes of a SHA-256 of its ids."""
    return hashlib.sha256(array("q", ids).tobytes()).digest()[:DIGEST]


def texts_of(batch: Mapping[str, Any], readings: Sequence[str], where: str) -> list[Texts]:
    """Return what each augmenter reads in `batch`, the arguments of `ComposedForCausalLM.forward`.

    readings: per augmenter ANCHOR, OWN (`augmenter_input_ids`) or PROMPT (up to `prompt_length`). Rows may have padding
    on the right, or hold several documents whose positions restart at 0.

    Raises ValueError, about `where`, for other batches: in those an augmenter would not read the texts as they are.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.device.type != "cpu":
        raise bad_value(where, "input_ids", "a CPU tensor (batch, tokens) of the collator's batch", describe(ids))
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    found = []
    for index, reading in enumerate(readings):
        if reading == OWN:
            names = ("augmenter_input_ids", "augmenter_attention_mask", "augmenter_position_ids")
            own, own_mask, own_positions = (_entry(batch, name, index, len(readings), where) for name in names)
            if own is None:
                got = f"none for augmenter {index}, which has another tokenizer. Use calm_fast.hf.AlignedCollator"
                raise bad_value(where, "augmenter_input_ids", "in the collator's batch", got)
            found.append(_documents(names, own, own_mask, own_positions, where))
            continue
        if _entry(batch, "augmenter_input_ids", index, len(readings), where) is not None:
            got = "ids of its own. Compose it with the tokenizers, so that it has an aligner"
            raise bad_value(where, "augmenter_input_ids", f"None for augmenter {index}, which has no aligner", got)
        if reading == PROMPT:
            found.append(_prompts(ids, mask, batch.get("prompt_length"), where))
        else:
            found.append(_documents(("input_ids", "attention_mask", "position_ids"), ids, mask, positions, where))
    return found


def _entry(batch: Mapping[str, Any], name: str, index: int, count: int, where: str) -> torch.Tensor | None:
    value = batch.get(name)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise bad_value(where, name, f"a list with an entry for each of {count} augmenters", f"{len(values)} entries")
    return values[index]


def _documents(
    names: Sequence[str], ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, where: str
) -> Texts:
    """Return the documents of rows `ids` (B, N). names: of the three arguments, for errors."""
    batch, width = ids.shape
    lengths = [width] * batch
    if mask is not None:
        lengths = mask.bool().sum(1).tolist()
        if not bool((mask.bool() == (torch.arange(width) < torch.tensor(lengths)[:, None])).all()):
            got = "other zeros. Make the collator pad on the right (padding_side='right')"
            raise bad_value(where, names[1], "zeros only behind the text of a row", got)
    rows = ids.tolist()
    texts: list[list[int]] = []
    places = []
    for r, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for start, end in _spans(names[2], positions, r, length, mask is None, where):
            texts.append(row[start:end])
            places.append((r, start))
    return Texts(texts, places, (batch, width), mask is not None)


def _spans(
    name: str, positions: torch.Tensor | None, row: int, length: int, restarts: bool, where: str
) -> list[tuple[int, int]]:
    """Return (start, end) of the documents in a row. restarts: positions may restart, and then a document begins."""
    if positions is None or length == 0:
        return [(0, length)]
    if positions.ndim != 2:
        raise bad_value(where, name, "2-dimensional (batch, tokens)", f"shape {tuple(positions.shape)}")
    own = positions[row if len(positions) > 1 else 0, :length]
    starts = [0, *(int(i) + 1 for i in (own[1:] - own[:-1] != 1).nonzero()[:, 0])]
    if bool((own[starts] != 0).any()) or (len(starts) > 1 and not restarts):
        got = "others. States are those of texts that begin at position 0"
        raise bad_value(where, name, "positions that count every text from 0, without a mask if they restart", got)
    return list(zip(starts, [*starts[1:], length], strict=True))


def _prompts(ids: torch.Tensor, mask: torch.Tensor | None, prompt_length: Any, where: str) -> Texts:
    """Return the anchor's ids of every row's prompt, as `encode_call` gives them to a bidirectional augmenter."""
    batch = len(ids)
    ends = torch.as_tensor(-1 if prompt_length is None else prompt_length)
    if ends.ndim > 1 or ends.is_floating_point() or bool((ends <= 0).any()) or ends.numel() not in (1, batch):
        expected = f"one positive number for each of {batch} rows, because an augmenter is bidirectional"
        raise bad_value(where, "prompt_length", expected, describe(prompt_length))
    columns = ends.reshape(-1).expand(batch).tolist()
    real = torch.ones_like(ids) if mask is None else mask
    texts = [
        [token for token, keep in zip(row[:end], kept[:end], strict=True) if keep]
        for row, kept, end in zip(ids.tolist(), real.tolist(), columns, strict=True)
    ]
    return Texts(texts, [(r, 0) for r in range(batch)], (batch, None), False)
