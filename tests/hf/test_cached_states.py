"""States of frozen augmenters on disk: equal to running them, found by the ids of their text, resumed after a stop."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import with_encoder
from families import FAMILIES, composed_model, randomize
from ragged import ROUNDINGS
from texts import TEXTS, aligned_model, tokenizer

from calm_fast.hf import AlignedCollator, ComposedForCausalLM, cache_augmenter_states, compose
from calm_fast.hf.cached_states import AugmenterStateCache, store, writer

ROWS = [{"prompt": text[:9], "completion": text[9:]} for text in TEXTS] + [
    {"prompt": TEXTS[0][:9], "completion": TEXTS[0][9:]}
]
QUIET: dict[str, Any] = {"batch_size": 2, "shard_rows": 4, "progress": False}


def ids_collator(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pad rows of ids on the right, as a user's own collator may."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def two_augmenters() -> ComposedForCausalLM:
    anchor, *augmenters = (FAMILIES[name].model(seed) for seed, name in enumerate(("llama", "gpt2", "mistral")))
    return randomize(compose(anchor, augmenters, [[(-1, -1), (1, 2)], [(2, 0)]]))


def ids_rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 96, (n,), generator=generator).tolist() for n in (9, 5, 7, 7, 12, 3, 8)]


def of_ids(make: Callable[[], ComposedForCausalLM]) -> tuple[ComposedForCausalLM, Any, Any]:
    return make(), ids_rows(), ids_collator


def of_texts(make: Callable[[], ComposedForCausalLM], **settings: Any) -> tuple[ComposedForCausalLM, Any, Any]:
    model = make()
    return model, ROWS, AlignedCollator(model, tokenizer("bytes"), padding_side="right", **settings)


def encoder_model() -> ComposedForCausalLM:
    from texts import model_of

    model = with_encoder("bert")
    return randomize(
        compose(model_of("llama", "bytes", 0), _grown(model), [(-1, -1), (2, 2)], same_ids=True, bidirectional="prompt")
    )


def _grown(model: ComposedForCausalLM) -> Any:
    from encoders import encoder

    return encoder("bert", vocab=len(tokenizer("bytes")))


CASES: dict[str, Callable[[], tuple[ComposedForCausalLM, Any, Any]]] = {
    "same ids": lambda: of_ids(lambda: composed_model("llama")),
    "learned positions": lambda: of_ids(lambda: composed_model("gpt2")),
    "experts": lambda: of_ids(lambda: composed_model("mixtral")),
    "two augmenters": lambda: of_ids(two_augmenters),
    "another tokenizer": lambda: of_texts(aligned_model),
    "one of each": lambda: of_texts(
        lambda: aligned_model(("llama", "bytes"), ("gpt2", "metaspace"), ("llama", "bytes"))
    ),
    "encoder": lambda: of_texts(encoder_model),
}


def step(model: ComposedForCausalLM, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Return loss, logits and the gradients of a training step."""
    model.train().zero_grad()
    out = model(**batch)
    out.loss.backward()
    return [out.loss.detach(), out.logits.detach(), *(p.grad.clone() for p in model.connections.parameters())]


def refuse_runs(model: ComposedForCausalLM) -> None:
    """Make every augmenter fail if it runs."""
    for augmenter in model.augmenters:
        augmenter.forward = None
        for module in augmenter.modules():
            module.forward = None


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_cached_states_is_the_step_that_runs_the_augmenters(case: str, tmp_path: Path) -> None:
    model, rows, collate = CASES[case]()
    cache = cache_augmenter_states(model, rows, tmp_path / "states", collate, **QUIET)
    batches = [rows[k : k + 2] for k in range(0, len(rows), 2)]  # those of the cache: equal bits
    others = [[rows[4]], [rows[1], rows[5], rows[0]]]
    wanted = [step(model, collate(batch)) for batch in batches + others]
    collate = cache.collator(collate)
    refuse_runs(model)
    for place, (batch, want) in enumerate(zip(batches + others, wanted, strict=True)):
        got = step(model, collate(batch))
        if place < len(batches):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            continue
        real = collate(batch)["attention_mask"].bool()
        rounding = ROUNDINGS * torch.finfo(torch.float32).eps / 2 * float(want[1][real].abs().max())
        torch.testing.assert_close(got[1][real], want[1][real], rtol=0, atol=rounding)


@pytest.mark.parametrize("case", ["same ids", "another tokenizer"])
def test_packed_rows_read_the_states_of_their_documents(case: str, tmp_path: Path) -> None:
    make = (
        aligned_model if case == "another tokenizer" else lambda: aligned_model(("llama", "bytes"), ("llama", "bytes"))
    )
    model, rows, collate = of_texts(make)
    cache = cache_augmenter_states(model, rows, tmp_path, collate, **QUIET)
    _, _, packing = of_texts(lambda: model, packed=True)
    want = step(model, packing(rows[:3]))
    got = step(model, cache.collator(packing)(rows[:3]))
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps / 2 * float(want[1].abs().max())
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=rounding)


def test_bfloat16_files_hold_the_rounded_states(tmp_path: Path) -> None:
    model, rows, collate = CASES["two augmenters"]()
    full = cache_augmenter_states(model, rows, tmp_path / "full", collate, **QUIET)
    half = cache_augmenter_states(model, rows, tmp_path / "half", collate, dtype=torch.bfloat16, **QUIET)
    assert (full.bytes_per_token, half.bytes_per_token) == (4 * 3 * 32, 2 * 3 * 32)
    for one, other in zip(full.states(collate(rows[:3])), half.states(collate(rows[:3])), strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.equal(one.to(torch.bfloat16), other)
    model.train()
    assert model(**half.collator(collate)(rows[:2])).loss.isfinite()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_stopped_run_goes_on_and_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, collate = CASES["another tokenizer"]()
    cache_augmenter_states(model, rows, tmp_path / "whole", collate, **QUIET)
    want = files(tmp_path / "whole")
    assert set(want) == {"key.json", "states-00000.safetensors", "states-00001.safetensors"}

    class Stopped(Exception):
        pass

    save, calls = writer.save_file, []

    def stopping(tensors: Any, file: Path, **kwargs: Any) -> None:
        save(tensors, file, **kwargs)
        calls.append(file)
        if len(calls) == 2:
            raise Stopped  # the file is written and has not got its name

    monkeypatch.setattr(writer, "save_file", stopping)
    with pytest.raises(Stopped):
        cache_augmenter_states(model, rows, tmp_path / "stopped", collate, **QUIET)
    assert set(files(tmp_path / "stopped")) == {"key.json", "states-00000.safetensors"}
    with pytest.raises(ValueError, match=r"`directory` must be a folder with all its shards, got 1 of 2 missing"):
        AugmenterStateCache(tmp_path / "stopped", model).collator(collate)
    cache_augmenter_states(model, rows, tmp_path / "stopped", collate, **QUIET)
    assert len(calls) == 3  # the first shard is kept
    assert files(tmp_path / "stopped") == want

    for n in (1, 0):
        cache = cache_augmenter_states(model, rows, tmp_path / "shared", collate, part=(n, 2), **QUIET)
        assert cache.missing() == ([0] if n else [])
    assert files(tmp_path / "shared") == want


def test_equal_rows_are_kept_once_and_a_copy_reads_the_same(tmp_path: Path) -> None:
    model, rows, collate = CASES["same ids"]()
    cache = cache_augmenter_states(model, [rows[0]] * 4, tmp_path, collate, **QUIET)
    assert store.Shard(tmp_path / "states-00000.safetensors").tensor("lengths", 0).tolist() == [len(rows[0])]
    made = cache.collator(collate)
    one, other = made([rows[0]] * 2), pickle.loads(pickle.dumps(made))([rows[0]] * 2)
    assert torch.equal(one["augmenter_hidden_states"][0], other["augmenter_hidden_states"][0])
    assert one["augmenter_hidden_states"][0].abs().max() > 0
