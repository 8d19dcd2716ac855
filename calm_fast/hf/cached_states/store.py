"""AugmenterStateCache: states of augmenters in memory-mapped safetensors files, found by the ids of their text.

A cache is a folder with

    key.json                     what decides the states, and how the data set is split
    states-00003.safetensors     shard 3: `shard_rows` rows of the data set

and a shard holds, per augmenter i,

    states.i   (tokens, layers, DA)   all its texts one after the other; connected layers in ascending order
    digests.i  (texts, 16) uint8      the texts' names
    lengths.i  (texts,) int64         their tokens
    sums.i     (texts,) int64         CRC-32 of each text's states, compared when they are first read
    order.i    (read,) int64          which text each row reads; equal rows share one
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from calm_fast.core.checks import bad_value
from calm_fast.core.files import is_partial, write_json
from calm_fast.hf.cached_states.key import composition_of, key_differences, state_key
from calm_fast.hf.cached_states.texts import digest, texts_of

KEY = "key.json"
WHERE = "AugmenterStateCache"
_DO = "Use that data and model, or cache the states into another folder"
_ROWS = "Rows of an evaluation need the collator without the cache, or a cache of both data sets (ConcatDataset)"


class Split(NamedTuple):
    """How a data set is split: rows in all, of a shard, and of a batch; and the dtype of the stored states."""

    rows: int
    shard_rows: int
    batch_size: int
    dtype: str

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.rows // self.shard_rows)


def shard_file(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"states-{shard:05d}.safetensors"


class Shard:
    """One memory-mapped file of states."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._file = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as problem:
            raise self.damaged(f"cannot be read: {problem}") from problem

    def tensor(self, name: str, augmenter: int) -> torch.Tensor:
        """Return a tensor of one augmenter, a view of the file."""
        try:
            return self._file.get_tensor(f"{name}.{augmenter}")
        except SafetensorError as problem:
            raise self.damaged(f"cannot be read: {problem}") from problem

    def damaged(self, what: str) -> ValueError:
        """Return the error for a file that is not as it was written."""
        got = f"{self.file}, which {what}. Delete the file and cache its states again"
        return bad_value(WHERE, "directory", "a folder of whole files", got)

    def digests(self, augmenter: int) -> list[bytes]:
        """Return the names of the texts."""
        return [row.tobytes() for row in self.tensor("digests", augmenter).numpy()]

    def read(self, augmenter: int) -> list[bytes]:
        """Return the name of what every row of the data set reads, in order."""
        names, order = self.digests(augmenter), self.tensor("order", augmenter).tolist()
        if not all(0 <= text < len(names) for text in order):
            raise self.damaged("is damaged: it names texts that it does not hold")
        return [names[text] for text in order]

    def tokens(self, augmenter: int) -> int:
        """Return the number of tokens whose states the file holds."""
        return int(self.tensor("states", augmenter).shape[0])

    def lengths(self, augmenter: int) -> np.ndarray:
        """Return the tokens of the texts, (texts,) int64. Raises ValueError if they are not those of the states."""
        lengths = self.tensor("lengths", augmenter).numpy()
        if (lengths < 0).any() or lengths.sum() != self.tokens(augmenter):
            raise self.damaged("is damaged: the lengths of its texts are not those of its states")
        return lengths


def checksum(states: torch.Tensor) -> int:
    """Return the CRC-32 of the bytes of a text's states (tokens, layers, DA), any dtype, on a CPU."""
    return zlib.crc32(states.contiguous().view(torch.uint8).numpy().data)


class Place(NamedTuple):
    """Where a text's states are, their checksum, and the text's row in its index."""

    shard: int
    begin: int
    length: int
    sum: int
    row: int


class _Index:
    """The place of every text of one augmenter, by name, and whether its checksum was compared."""

    def __init__(self, shards: Iterable[tuple[int, Shard]], augmenter: int) -> None:
        names, places = [np.empty((0, 2), np.uint64)], [np.empty((0, 4), np.int64)]
        for number, shard in shards:
            lengths = shard.lengths(augmenter)
            begin = lengths.cumsum() - lengths
            names.append(np.ascontiguousarray(shard.tensor("digests", augmenter).numpy()).view(np.uint64))
            sums = shard.tensor("sums", augmenter).numpy()
            places.append(np.stack([np.full_like(lengths, number), begin, lengths, sums], 1))
        both = np.concatenate(names)
        order = np.argsort(both[:, 0], kind="stable")
        self.names, self.places = both[order], np.concatenate(places)[order]
        self.compared = np.zeros(len(both), bool)

    def find(self, name: bytes) -> Place | None:
        first, second = np.frombuffer(name, np.uint64)
        row = int(np.searchsorted(self.names[:, 0], first))
        while row < len(self.names) and self.names[row, 0] == first:
            if self.names[row, 1] == second:
                shard, begin, length, own_sum = self.places[row].tolist()
                return Place(shard, begin, length, own_sum, row)
            row += 1
        return None


class AugmenterStateCache:
    """States of frozen augmenters for the rows of a data set, as `cache_augmenter_states` wrote them.

    `collator(base)` gives a collator whose batches hold them, for Trainer and ``model(**batch)``. Files are mapped, not
    read: a batch reads the tokens of its rows. May be pickled and used by the workers of a DataLoader.

    Args:
        directory: the folder.
        model: the composition that will read the states (or a wrapper around it). Nothing of it is kept.
        collator: the collator of the training, whose settings are compared.
        settings: as `cache_augmenter_states` got them; None does not compare them.
    Raises:
        ValueError: the folder is no cache, the model cannot read cached states, or the key differs: the message says in
            what (model, layers, weights, dtype, config, tokenizer, settings of the rows).
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module,
        *,
        collator: Any = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        composed = composition_of(model, WHERE)
        key, self.split = read_key(self.directory)
        own = state_key(composed, collator, settings)
        if collator is None:
            own["collator"] = key["collator"]  # `CachedStatesCollator` compares them
        if settings is None:
            own["settings"] = key["settings"]
        check_key(self.directory, key, own, composed, WHERE)
        self.readings = [part["reads"] for part in own["augmenters"]]
        self.layers = [part["layers"] for part in own["augmenters"]]
        self._widths = [part["width"] for part in own["augmenters"]]
        self.collator_key = key["collator"]
        self._shards: dict[int, Shard] = {}
        self._indices: list[_Index] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored states."""
        return getattr(torch, self.split.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's states on disk, of all augmenters together."""
        size = torch.empty((), dtype=self.dtype).element_size()
        return size * sum(len(layers) * width for layers, width in zip(self.layers, self._widths, strict=True))

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not there yet."""
        return [n for n in range(self.split.shards) if not shard_file(self.directory, n).is_file()]

    def nbytes(self) -> int:
        """Return the size of all files in bytes, without those that killed processes left unfinished."""
        files = (file for file in self.directory.iterdir() if file.is_file() and not is_partial(file))
        return sum(file.stat().st_size for file in files)

    def collator(self, base: Any) -> Any:
        """Return a `CachedStatesCollator` of batches that `base` makes. Raises ValueError if shards are missing."""
        from calm_fast.hf.cached_states.collator import CachedStatesCollator

        return CachedStatesCollator(self, base)

    def states(self, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return `augmenter_hidden_states` for a batch: per augmenter (B, layers, N, DA), zero where no text is.

        Raises ValueError for a text that is not in the cache or whose states are not as they were written, and as
        `texts_of` does.
        """
        found = []
        for index, texts in enumerate(texts_of(batch, self.readings, WHERE)):
            places = [self._place(index, ids) for ids in texts.ids]
            rows, width = texts.shape
            width = max((place.length for place in places), default=0) if width is None else width
            out = torch.zeros(rows, len(self.layers[index]), width, self._widths[index], dtype=self.dtype)
            for (row, slot), place in zip(texts.places, places, strict=True):
                out[row, :, slot : slot + place.length] = self._kept(index, place).transpose(0, 1)
            found.append(out)
        return found

    def _kept(self, index: int, place: Place) -> torch.Tensor:
        """Return the states (tokens, layers, DA) of the text at `place`, a view of the file."""
        shard = self._shard(place.shard)
        kept = shard.tensor("states", index)[place.begin : place.begin + place.length]
        if place.length:
            assert self._indices is not None  # it has found the place
            compared = self._indices[index].compared
            if not compared[place.row] and checksum(kept) != place.sum:
                raise shard.damaged("is damaged: the checksum of a text's states differs")
            compared[place.row] = True
        return kept

    def _place(self, index: int, ids: Sequence[int]) -> Place:
        if not ids:
            return Place(0, 0, 0, 0, 0)
        if self._indices is None:
            self.open()
        assert self._indices is not None
        place = self._indices[index].find(digest(ids))
        if place is None:
            got = (
                f"one of {len(ids)} tokens that is not among them, {list(ids[:6])}...: the data set, the max_length, "
                f"the chat template or the tokenizer of the rows is another one. {_DO}. {_ROWS}"
            )
            raise bad_value(WHERE, "batch", f"of texts whose states are in {self.directory}", got)
        return place

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = Shard(shard_file(self.directory, number))
        return self._shards[number]

    def open(self) -> None:
        """Read where every text is. Raises ValueError if shards are missing."""
        if missing := self.missing():
            got = f"{len(missing)} of {self.split.shards} missing (shard {missing[0]} first). Run "
            got += "cache_augmenter_states again: it goes on, in as many processes as `part` says"
            raise bad_value(WHERE, "directory", "a folder with all its shards", got)
        shards = [(number, Shard(shard_file(self.directory, number))) for number in range(self.split.shards)]
        self._indices = [_Index(shards, index) for index in range(len(self.readings))]


def read_key(folder: Path) -> tuple[dict[str, Any], Split]:
    """Return the key and the split of the cache in `folder`. Raises ValueError if there is none."""
    file = folder / KEY
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return content["key"], Split(**content["split"])
    except (OSError, ValueError, KeyError, TypeError) as problem:
        got = f"{folder}, whose {KEY} cannot be read: {problem!r}"
        raise bad_value(WHERE, "directory", "a folder that cache_augmenter_states wrote", got) from problem


def write_key(folder: Path, key: Mapping[str, Any], split: Split) -> None:
    """Write the key and the split, atomically."""
    write_json(folder / KEY, {"key": key, "split": split._asdict()})


def check_key(folder: Path, kept: Mapping[str, Any], own: Mapping[str, Any], composed: Any, where: str) -> None:
    """Raise ValueError, naming what differs, unless the states of a cache are those that `composed` would read."""
    if differ := key_differences(kept, own, composed):
        got = f"{folder}, made with other ones: {'; '.join(differ)}. {_DO}"
        raise bad_value(where, "directory", "a cache of this model, tokenizer and data", got)
