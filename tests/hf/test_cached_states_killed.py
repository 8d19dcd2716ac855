"""Caches of states whose processes are killed, or begin at the same time in one new folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import composed_model

from calm_fast.core import files
from calm_fast.hf import cache_augmenter_states
from calm_fast.hf.cached_states import AugmenterStateCache, store, writer

QUIET: dict[str, Any] = {"batch_size": 2, "shard_rows": 2, "progress": False}
ROWS = [[5, 7, 9], [8, 6, 4, 2], [3, 3], [9, 8, 7, 6, 5], [4, 9], [2, 5, 8]]


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def process(run: Callable[[], Any]) -> Any:
    """Return a process, not started, that runs `run` in a copy of this one."""

    def alone() -> None:
        # a copy has none of its parent's threads; products round otherwise than with more, so every run is in one
        torch.set_num_threads(1)
        run()

    return multiprocessing.get_context("fork").Process(target=alone)


def ended(run: Callable[[], Any]) -> int:
    """Run `run` in a process of its own and return its exit code."""
    child = process(run)
    child.start()
    child.join(120)
    return int(child.exitcode)


@pytest.fixture(scope="module")
def model() -> Any:
    return composed_model("llama").eval()


@pytest.fixture(scope="module")
def whole(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert ended(lambda: cache_augmenter_states(model, ROWS, folder, collate, **QUIET)) == 0
    return content(folder)


def test_a_process_killed_while_it_writes_leaves_whole_files(
    model: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = writer.save_file

    def kill_at_the_second(tensors: Any, file: Path, **how: Any) -> None:
        save(tensors, file, **how)
        if "00001" in file.name:
            os.truncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", kill_at_the_second)
        assert ended(lambda: cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)) == -signal.SIGKILL
    left = [name for name in content(tmp_path) if name.endswith(".partial")]
    assert len(left) == 1 and "states-00001.safetensors" in left[0]
    cache = AugmenterStateCache(tmp_path, model, collator=collate)
    assert cache.missing() == [1, 2]
    assert cache.nbytes() == sum(len(whole[name]) for name in ("key.json", "states-00000.safetensors"))
    # a file that a running process writes stays
    running = tmp_path / f".states-00002.safetensors.{os.getpid()}-0.partial"
    running.write_bytes(b"")
    assert ended(lambda: cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)) == 0
    assert running.exists()
    running.unlink()
    assert content(tmp_path) == whole


def test_a_process_killed_before_its_first_file_leaves_a_folder_that_is_still_new(
    model: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        assert ended(lambda: cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)) == -signal.SIGKILL
    assert [name for name in content(tmp_path) if not name.endswith(".partial")] == []
    assert ended(lambda: cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)) == 0
    kept = {name: data for name, data in content(tmp_path).items() if not name.endswith(".partial")}
    assert kept == whole


def test_processes_may_begin_at_the_same_time(
    model: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier, write = multiprocessing.get_context("fork").Barrier(2), writer.write_key

    def together(folder: Path, key: Any, split: store.Split) -> None:
        barrier.wait(60)  # both saw a folder without a key
        write(folder, key, split)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_key", together)
        both = [
            process(lambda i=i: cache_augmenter_states(model, ROWS, tmp_path, collate, part=(i, 2), **QUIET))
            for i in range(2)
        ]
        for child in both:
            child.start()
        for child in both:
            child.join(120)
    assert [child.exitcode for child in both] == [0, 0]
    assert content(tmp_path) == whole


def _flip(file: Path, name: str, where: float) -> None:
    """Turn round the lowest bit of one byte of a tensor in a safetensors file."""
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    data[8 + header + begin + int(where * (end - begin - 1))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["states.0", "digests.0", "lengths.0", "sums.0", "order.0"])
def test_a_flipped_bit_in_a_file_is_named(model: Any, tmp_path: Path, name: str, where: float) -> None:
    cache = cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)
    want = AugmenterStateCache(tmp_path, model).collator(collate)(ROWS[2:4])["augmenter_hidden_states"][0]
    file = store.shard_file(tmp_path, 1)
    _flip(file, name, where)
    whole = {"digests.0": "must be of texts whose states are in", "order.0": "must be a new folder or that of the same"}
    words = whole.get(name, f"{file.name}, which is damaged: .*. Delete the file and cache its states again")
    with pytest.raises(ValueError, match=words if name != "order.0" else rf"{words}|{file.name}, which is damaged"):
        for begin in range(0, len(ROWS), 2):
            cache.collator(collate)(ROWS[begin : begin + 2])
        cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)  # the order is read when it goes on
    file.unlink()
    again = cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET).collator(collate)
    assert torch.equal(again(ROWS[2:4])["augmenter_hidden_states"][0], want)


def test_a_row_of_an_evaluation_is_refused_with_what_to_do(model: Any, tmp_path: Path) -> None:
    cache = cache_augmenter_states(model, ROWS, tmp_path, collate, **QUIET)
    with pytest.raises(ValueError, match="Rows of an evaluation need the collator without the cache, or a cache of bo"):
        cache.collator(collate)([[5, 5, 5]])
