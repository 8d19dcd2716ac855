"""cache_augmenter_states(): run frozen augmenters once over a data set, and keep what the connections read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from calm_fast.core.checks import bad_type, bad_value, describe
from calm_fast.core.files import atomic_path, check_folder, is_partial, remove_leftovers
from calm_fast.core.progress import progress_bar
from calm_fast.hf.alignment.collator import AlignedCollator
from calm_fast.hf.cached_states.key import composition_of, state_key
from calm_fast.hf.cached_states.store import (
    KEY,
    AugmenterStateCache,
    Shard,
    Split,
    check_key,
    checksum,
    read_key,
    shard_file,
    write_key,
)
from calm_fast.hf.cached_states.texts import DIGEST, Texts, digest, texts_of
from calm_fast.hf.causality import check_parts
from calm_fast.hf.composed import ComposedForCausalLM
from calm_fast.hf.encoded_calls import Reading
from calm_fast.hf.given_states import connected_layers
from calm_fast.hf.hooks import Frame, switch
from calm_fast.hf.inputs import AugmenterCall, Tokens, check_vocabulary
from calm_fast.hf.masks import CAUSAL
from calm_fast.hf.recompute import begin_turn, end_turn
from calm_fast.hf.trials import try_encoders
from calm_fast.hf.vocabularies import loaded_tokenizer

WHERE = "cache_augmenter_states"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Collate = Callable[..., Mapping[str, Any]]  # of a list of rows


def cache_augmenter_states(
    model: nn.Module,
    dataset: Sequence[Any],
    directory: str | os.PathLike[str],
    collator: Collate | None = None,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    shard_rows: int = 64,
    part: tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> AugmenterStateCache:
    """Write the states that the connections of `model` read of every row of `dataset` into `directory`.

    The augmenters of a composition are frozen, so a row's states are the same in every epoch. A second call with the
    same arguments goes on where the first one was stopped; processes that share the folder write different shards. Rows
    whose ids are equal are kept once per shard. Takes ``layers * DA * bytes of dtype`` per token that an augmenter
    reads, and the memory of one shard.

    Batches are those of an unshuffled DataLoader: in training with the same batches float32 states are bit-equal to
    those of a run augmenter on the same machine. Other batches add the same terms in another order.

    Args:
        model: a ComposedForCausalLM, or a wrapper around it. The augmenters run where they are.
        dataset: has len() and indices; rows as `collator` takes them.
        directory: a new folder, or that of the same cache.
        collator: makes the batches of the training: padded on the right, or packed. Default, an AlignedCollator with
            the anchor's tokenizer, if the composition knows it.
        dtype: of the files; default, that of the augmenters' states. torch.bfloat16 halves float32 and rounds.
        batch_size: rows that the augmenters read at once. shard_rows: rows of a file; must be a multiple of batch_size.
        part: (i, n) writes every n-th shard from the i-th on. Default, (rank, world size) of torch.distributed where a
            process group is initialised, else all.
        settings: what else decides the ids of a row, such as {"max_length": 512} of an earlier tokenisation. Compared
            by name when the cache is used.
        progress: show a bar.
    Returns:
        the AugmenterStateCache, whose shards other processes may still be writing.
    Raises:
        TypeError, ValueError naming the argument: an augmenter that trains, has dropout switched on, adapters, shards
        or offloaded weights, or reads the text anew at every token; a folder of another model, tokenizer, data set or
        settings (the message says which); batches whose padding is not on the right.
    """
    folder = check_folder(WHERE, "directory", directory)
    composed = composition_of(model, WHERE)
    collate = _default_collator(composed) if collator is None else collator
    split = _split(composed, dataset, dtype, batch_size, shard_rows)
    first, step = _part(part)
    key = state_key(composed, collate, settings)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / KEY).is_file():
        kept, before = read_key(folder)
        check_key(folder, kept, key, composed, WHERE)
        if before != split:
            changed = [f"{n} {b}, not {a}" for n, a, b in zip(split._fields, before, split, strict=True) if a != b]
            got = f"{folder}, split with {', '.join(changed)}. Pass the same, or choose another folder"
            raise bad_value(WHERE, "directory", "a new folder or that of the same cache", got)
    elif not all(map(is_partial, folder.iterdir())) and not (folder / KEY).is_file():
        raise bad_value(WHERE, "directory", "a new folder or that of the same cache", f"{folder}, which holds files")
    else:
        write_key(folder, key, split)
    if composed.unproven:
        check_parts(composed, WHERE, defer=False)
    readings = [entry["reads"] for entry in key["augmenters"]]
    numbers = range(first, split.shards, step)
    with progress_bar(total=len(numbers), desc="augmenter states", unit="shard", shown=progress) as bar:
        for number in numbers:
            _one_shard(composed, dataset, collate, readings, folder, split, number)
            bar.update()
    return AugmenterStateCache(folder, composed, collator=collate, settings=settings)


def _default_collator(composed: ComposedForCausalLM) -> AlignedCollator:
    tokenizer = loaded_tokenizer(composed.tokenizers[0])
    if tokenizer is None:
        expected = "given, because the composition does not know the anchor's tokenizer"
        raise bad_value(WHERE, "collator", expected, "None. Pass AlignedCollator(model, tokenizer)")
    return AlignedCollator(composed, tokenizer, padding_side="right")


def _split(composed: ComposedForCausalLM, dataset: Any, dtype: Any, batch_size: Any, shard_rows: Any) -> Split:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise bad_type(WHERE, "dataset", "a dataset with len() and indices", dataset)
    if len(dataset) == 0:
        raise bad_value(WHERE, "dataset", "of at least one row", "none")
    for name, value in (("batch_size", batch_size), ("shard_rows", shard_rows)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise bad_value(WHERE, name, "a positive integer", describe(value))
    if shard_rows % batch_size:
        raise bad_value(WHERE, "shard_rows", f"a multiple of batch_size ({batch_size})", str(shard_rows))
    if dtype is None:
        found = {composed._augmenter(index).dtype for index in range(len(composed.augmenters))}
        dtype = max(found, key=lambda one: torch.finfo(one).bits) if len(found) == 1 else torch.float32
    if dtype not in _DTYPES:
        raise bad_value(WHERE, "dtype", f"one of {', '.join(map(str, _DTYPES))} or None", describe(dtype))
    return Split(len(dataset), int(shard_rows), int(batch_size), str(dtype).removeprefix("torch."))


def _part(part: Any) -> tuple[int, int]:
    if part is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    whole = isinstance(part, (tuple, list)) and len(part) == 2 and all(isinstance(n, int) for n in part)
    if not whole or not 0 <= part[0] < part[1]:
        raise bad_value(WHERE, "part", "(i, n) with 0 <= i < n, or None", describe(part))
    return part[0], part[1]


def _one_shard(
    composed: ComposedForCausalLM, dataset: Any, collate: Collate, readings: list[str], folder: Path, split: Split,
    number: int,
) -> None:  # fmt: skip
    """Write shard `number`, or check that it holds the rows of `dataset`."""
    file = shard_file(folder, number)
    begin = number * split.shard_rows
    end = min(split.rows, begin + split.shard_rows)
    batches = [range(k, min(end, k + split.batch_size)) for k in range(begin, end, split.batch_size)]
    read = [texts_of(collate([dataset[k] for k in batch]), readings, WHERE) for batch in batches]
    if file.is_file():
        shard = Shard(file)
        for index in range(len(readings)):
            if shard.read(index) != [digest(ids) for texts in read for ids in texts[index].ids]:
                got = (
                    f"{folder}, whose shard {number} holds other texts than rows {begin} to {end - 1}: the data, its "
                    "order, the max_length, the chat template or the tokenizer of the rows differ. Choose another "
                    "folder"
                )
                raise bad_value(WHERE, "directory", "a new folder or that of the same cache", got)
        return
    remove_leftovers(file)
    dtype = getattr(torch, split.dtype)
    tensors: dict[str, torch.Tensor] = {}
    kept: list[dict[bytes, torch.Tensor]] = [{} for _ in readings]
    for texts in read:
        for index, states in enumerate(_run(composed, texts)):
            for ids, state in zip(texts[index].ids, states, strict=True):
                kept[index].setdefault(digest(ids), state.to("cpu", dtype))
    for index, found in enumerate(kept):
        names = {name: place for place, name in enumerate(found)}
        order = [names[digest(ids)] for texts in read for ids in texts[index].ids]
        tensors[f"states.{index}"] = torch.cat([*found.values()])
        tensors[f"digests.{index}"] = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).view(-1, DIGEST)
        tensors[f"lengths.{index}"] = torch.tensor([len(state) for state in found.values()])
        tensors[f"sums.{index}"] = torch.tensor([checksum(state) for state in found.values()])
        tensors[f"order.{index}"] = torch.tensor(order)
    with atomic_path(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
        shutil.copymode(folder / KEY, partial)  # safetensors' own files are for this user alone


@torch.no_grad()
def _run(composed: ComposedForCausalLM, texts: list[Texts]) -> list[list[torch.Tensor]]:
    """Return per augmenter the states (tokens, layers, DA) of each of its texts."""
    calls = [_call(composed, index, own) for index, own in enumerate(texts)]
    try_encoders(composed, {index: call.reading for index, call in enumerate(calls) if call.reading is not None})
    frame = Frame(composed.hooks.owner, {})
    begin_turn(composed.stateful)
    before = switch(frame)
    try:
        composed._read_augmenters(frame, calls, None, 0, {})
        composed.hooks.check_read(frame, composed.pairs)
    finally:
        switch(before)
        end_turn(composed.stateful)
    found = []
    for index, (own, call) in enumerate(zip(texts, calls, strict=True)):
        layers = torch.stack([frame.states[index, a] for a in connected_layers(composed, index)], dim=2)
        lengths = map(len, own.ids if call.reading is None else call.reading.texts)
        found.append([layers[row, :length] for row, length in enumerate(lengths)])
    return found


def _call(composed: ComposedForCausalLM, index: int, texts: Texts) -> AugmenterCall:
    """Return what augmenter `index` reads: the texts as rows, with padding on the right."""
    encoder, rows = composed.encoders[index], texts.ids
    if encoder is not None:
        aligner: Any = composed.aligners[index]
        rows = [ids if aligner is None else aligner.whole(ids) for ids in rows]
    # as wide as the batch: padding can change how sums round
    longest = max(map(len, rows))
    width = texts.shape[1] if texts.shape[1] is not None and len(rows) == texts.shape[0] else longest
    ids = torch.tensor([[*row] + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), width)
    check_vocabulary("input_ids", ids, [composed._augmenter(index)])
    ragged = any(len(row) < width for row in rows)
    mask = None
    if texts.masked or ragged:
        mask = (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long()
    inputs = Tokens(input_ids=ids, attention_mask=mask, position_ids=None)
    if encoder is None:
        return AugmenterCall(inputs, CAUSAL)
    starts = [sum(map(len, rows[:r])) for r in range(len(rows))]
    places = torch.arange(longest) + torch.tensor(starts)[:, None]
    places = places.clamp(max=sum(map(len, rows)) - 1)
    tokens = torch.tensor([[token for row in rows for token in row]])
    seen = torch.zeros(len(rows), 1, dtype=torch.int32)
    return AugmenterCall(inputs, CAUSAL, None, Reading(rows, tokens, places, seen, seen, aligner is not None, True))
