"""A cache of augmenter states is refused where it is not that of the model, the tokenizer and the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import with_encoder
from families import FAMILIES, composed_model, prompts
from test_cached_states import QUIET, ROWS, ids_collator, ids_rows
from texts import aligned_model, tokenizer

from calm_fast.hf import AlignedCollator, ComposedForCausalLM, cache_augmenter_states, compose
from calm_fast.hf.cached_states import AugmenterStateCache


def collator(model: ComposedForCausalLM, **settings: Any) -> AlignedCollator:
    return AlignedCollator(model, tokenizer("bytes"), padding_side="right", **settings)


def _weights(model: ComposedForCausalLM) -> None:
    with torch.no_grad():
        next(model.augmenters[0].parameters())[-1, -1] += 1e-3


def _config(model: ComposedForCausalLM) -> None:
    model.augmenters[0].config.rms_norm_eps *= 2


def _aligner(model: ComposedForCausalLM) -> None:
    from calm_fast.hf.alignment import StreamAligner

    model.aligners = [StreamAligner(tokenizer("bytes"), tokenizer("metaspace"), special={"<s>": "begin"})]


MODELS: dict[str, tuple[Callable[[ComposedForCausalLM], Any], str]] = {
    "one weight": (_weights, r"weights of augmenter 0 "),
    "config": (_config, r"augmenter 0 with a config with rms_norm_eps 2e-06 instead of 1e-06"),
    "dtype": (lambda model: model.augmenters[0].bfloat16(), r'dtype of augmenter 0 "bfloat16", not "float32"'),
    "alignment": (_aligner, r"alignment of augmenter 0 .*begin.*, not "),
}


@pytest.mark.parametrize("case", MODELS)
def test_another_model_is_refused_by_what_differs(case: str, tmp_path: Path) -> None:
    model = aligned_model()
    cache_augmenter_states(model, ROWS, tmp_path, collator(model), **QUIET)
    change, words = MODELS[case]
    change(model)
    for again in (
        lambda: AugmenterStateCache(tmp_path, model),
        lambda: cache_augmenter_states(model, ROWS, tmp_path, collator(model), **QUIET),
    ):
        with pytest.raises(ValueError, match=rf"`directory` must be a cache of this model.*{words}"):
            again()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: aligned_model(connections=((-1, -1), (1, 2))), r"layers of augmenter 0 \[-1, 1\], not \[-1, 0, 2\]"),
        (lambda: aligned_model(("llama", "bytes"), ("gpt2", "metaspace")), r'class .* "GPT2LMHeadModel", not "Llama'),
        (lambda: aligned_model(("llama", "bytes"), ("llama", "bytes")), r'reads of augmenter 0 "the anchor'),
        (
            lambda: aligned_model(("llama", "bytes"), ("llama", "metaspace"), ("llama", "bytes")),
            r"augmenters 2, not 1",
        ),
    ],
)
def test_another_composition_is_refused_by_what_differs(make: Any, words: str, tmp_path: Path) -> None:
    model = aligned_model()
    cache_augmenter_states(model, ROWS, tmp_path, collator(model), **QUIET)
    with pytest.raises(ValueError, match=words):
        AugmenterStateCache(tmp_path, make())


def _with_template(model: ComposedForCausalLM) -> AlignedCollator:
    import copy

    found = collator(model)
    found.tokenizer = copy.copy(found.tokenizer)
    found.tokenizer.chat_template = "{{ messages }}"
    return found


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: collator(model, max_length=5), "max_length of the rows 5, not null"),
        (lambda model: collator(model, add_eos=False), "add_eos of the rows false, not true"),
        (_with_template, "chat_template of the rows .*messages.*, not null"),
    ],
)
def test_a_collator_that_makes_other_rows_is_refused(make: Any, words: str, tmp_path: Path) -> None:
    model = aligned_model()
    cache = cache_augmenter_states(model, ROWS, tmp_path, collator(model), **QUIET)
    with pytest.raises(ValueError, match=f"CachedStatesCollator: `collator`.*{words}"):
        cache.collator(make(model))
    with pytest.raises(ValueError, match=f"`directory` must be a cache.*{words}"):
        cache_augmenter_states(model, ROWS, tmp_path, make(model), **QUIET)
    with pytest.raises(ValueError, match="max_length of the rows 512, not null"):
        AugmenterStateCache(tmp_path, model, collator=collator(model), settings={"max_length": 512})


def test_other_data_is_refused_where_it_is_written_and_where_it_is_read(tmp_path: Path) -> None:
    model, rows = composed_model("llama"), ids_rows()
    cache = cache_augmenter_states(model, rows, tmp_path, ids_collator, **QUIET)
    changed = [*rows[:4], [*rows[4][:-1], 1], *rows[5:]]
    with pytest.raises(ValueError, match=r"whose shard 1 holds other texts than rows 4 to 6"):
        cache_augmenter_states(model, changed, tmp_path, ids_collator, **QUIET)
    with pytest.raises(ValueError, match=r"`batch` must be of texts whose states are in .*one of 12 tokens"):
        cache.collator(ids_collator)(changed[3:5])
    with pytest.raises(ValueError, match=r"split with rows 6, not 7"):
        cache_augmenter_states(model, rows[:6], tmp_path, ids_collator, **QUIET)
    (tmp_path / "states-00001.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"states-00001.safetensors, which cannot be read.*Delete the file"):
        cache.open()


def _train(model: ComposedForCausalLM) -> None:
    next(model.augmenters[0].parameters()).requires_grad_(True)


def _drop(model: ComposedForCausalLM) -> None:
    model.augmenters[0].train()


def _adapt(model: ComposedForCausalLM) -> None:
    import calm_fast

    calm_fast.add_dual_lora(model.augmenters[0], ("q_proj",))
    model.augmenters[0].requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("change", "words"),
    [(_train, "requires a gradient"), (_drop, "training mode"), (_adapt, "has an adapter"),
     (lambda model: model.augmenters[0].to("meta"), "not loaded")],
)  # fmt: skip
def test_an_augmenter_that_is_not_frozen_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    model = composed_model("llama")
    change(model)
    with pytest.raises(ValueError, match=f"`model` must be one whose augmenter 0 is frozen.*{words}"):
        cache_augmenter_states(model, ids_rows(), tmp_path, ids_collator, **QUIET)
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_reads_every_token_anew_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads the text anew at every token"):
        cache_augmenter_states(with_encoder(mode="reencode"), ids_rows(), tmp_path, ids_collator, **QUIET)


def _left(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {name: value.flip(1) for name, value in ids_collator(rows).items()}


def _shifted(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    batch = ids_collator(rows)
    return batch | {"position_ids": torch.arange(1, batch["input_ids"].shape[1] + 1)[None]}


@pytest.mark.parametrize(
    ("collate", "words"), [(_left, "`attention_mask`.*pad on the right"), (_shifted, "`position_ids`.*from 0")]
)
def test_batches_in_which_rows_are_not_read_as_they_are_are_refused(collate: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        cache_augmenter_states(composed_model("llama"), ids_rows(), tmp_path, collate, **QUIET)


def test_arguments_are_checked(tmp_path: Path) -> None:
    model, rows = composed_model("llama"), ids_rows()
    for given, words in (
        ({"part": (2, 2)}, "`part`"),
        ({"shard_rows": 5, "batch_size": 2}, "`shard_rows` must be a multiple"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"dtype": torch.int8}, "`dtype`"),
    ):
        with pytest.raises(ValueError, match=words):
            cache_augmenter_states(model, rows, tmp_path / "new", ids_collator, **given)
    with pytest.raises(TypeError, match="`dataset`"):
        cache_augmenter_states(model, iter(rows), tmp_path / "new", ids_collator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`collator` must be given"):
        cache_augmenter_states(model, rows, tmp_path / "new")
    with pytest.raises(TypeError, match="`model`"):
        cache_augmenter_states(FAMILIES["llama"].model(), rows, tmp_path / "new", ids_collator)
    with pytest.raises(ValueError, match="a folder that cache_augmenter_states wrote"):
        AugmenterStateCache(tmp_path, model)
    assert not (tmp_path / "new").exists()


def test_forward_takes_states_of_the_right_shape_only() -> None:
    model, ids = composed_model("llama"), prompts()
    states = torch.zeros(2, 3, 9, 32)
    assert model(ids, augmenter_hidden_states=states).logits.isfinite().all()
    for value, words in ((states[:, :2], r"of shape \(2, 3, 9, 32\)"), (states.long(), "floating-point"), ([], "list")):
        with pytest.raises(ValueError, match=rf"`augmenter_hidden_states` must be .*{words}"):
            model(ids, augmenter_hidden_states=value)
    with pytest.raises(ValueError, match="None where a cache is kept"):
        model(ids, augmenter_hidden_states=states, use_cache=True)
    with pytest.raises(ValueError, match="generate: `augmenter_hidden_states`"):
        model.generate(ids, augmenter_hidden_states=states, max_new_tokens=2)
    next(model.augmenters[0].parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="None for augmenter 0, which trains"):
        model(ids, augmenter_hidden_states=states)


def test_several_augmenters_take_a_list_with_none_for_one_that_runs() -> None:
    parts = [FAMILIES["llama"].model(seed) for seed in range(3)]
    model, ids = compose(parts[0], parts[1:], [(1, 1)]), prompts()
    states = parts[1](ids, output_hidden_states=True, use_cache=False).hidden_states[2][:, None].detach()
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        assert torch.equal(model(ids, augmenter_hidden_states=[states, None], use_cache=False).logits, want)
    with pytest.raises(ValueError, match="a list with a tensor or None for each of 2"):
        model(ids, augmenter_hidden_states=states)


def test_a_composition_of_folders_with_one_tokenizer_is_cached(tmp_path: Path) -> None:
    for seed, name in enumerate(("anchor", "augmenter")):
        FAMILIES["llama"].model(seed, vocab=len(tokenizer("bytes"))).save_pretrained(tmp_path / name)
        tokenizer("bytes").save_pretrained(tmp_path / name)
    model = compose(str(tmp_path / "anchor"), str(tmp_path / "augmenter"), "uniform:2")
    cache = cache_augmenter_states(model, ROWS, tmp_path / "states", **QUIET)
    batch = cache.collator(collator(model))(ROWS[:2])
    with torch.no_grad():
        found, plain = model(**batch).logits, model(**collator(model)(ROWS[:2])).logits
    torch.testing.assert_close(found, plain)
    (tmp_path / "anchor" / "tokenizer.json").write_text("{")  # one that does not load is one that is not known
    with pytest.raises(ValueError, match="`collator` must be given, because the composition does not know"):
        cache_augmenter_states(model, ROWS, tmp_path / "again", **QUIET)
