"""compose() compares what token ids mean for the anchor and for each augmenter wherever it can see the tokenizers."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.alignment import StreamAligner
from calm_fast.hf.vocabularies import find_differences, known_tokenizers

WORDS = [f"w{i}" for i in range(VOCAB)]
SWAPPED = [*WORDS[:90], *reversed(WORDS[90:])]  # 6 of 97 ids differ: 93 is in the middle


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=words[0])


def folder(path: Path, seed: int, words: list[str] | None) -> Path:
    """Save a model, and a tokenizer beside it."""
    FAMILIES["llama"].model(seed).save_pretrained(path)
    if words is not None:
        tokenizer(words).save_pretrained(path)
    return path


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    return folder(tmp_path / "anchor", 0, WORDS)


@pytest.mark.seam(
    attach="an augmenter whose tokenizer differs from the anchor's",
    to="composition",
    result="works",
    why="the augmenter reads the same text in its own tokens, through a `StreamAligner`",
)
@pytest.mark.parametrize("loaded", [False, True])
def test_an_augmenter_for_which_the_ids_are_other_tokens_gets_an_aligner(anchor: Path, loaded: bool) -> None:
    other = folder(anchor.parent / "augmenter", 1, SWAPPED)
    load = type(FAMILIES["llama"].model()).from_pretrained if loaded else str
    parts = load(anchor), [load(anchor), load(other)]
    message = (
        r"compose: the tokenizer of augmenter 1 \(LlamaForCausalLM\) differs in 6 of 97 ids \(id 90 is 'w90' for the "
        r"anchor and 'w96' for the augmenter\), so it reads .*vocab_size=90.*same_ids=True"
    )
    with pytest.warns(UserWarning, match=message) as seen:
        model = compose(*parts, "uniform:2")
    assert [Path(one.filename).name for one in seen] == [Path(__file__).name]  # the caller's line
    assert model.aligners[0] is None
    aligner = model.aligners[1]
    assert isinstance(aligner, StreamAligner)
    assert aligner.align([3, 96, 90, 5], 4)[0] == [3, 90, 96, 5]  # the same words under the augmenter's ids
    for accepted in ({"vocab_size": 90}, {"same_ids": True}, {"tokenizers": [anchor, None, anchor]}):
        assert compose(*parts, "uniform:2", **accepted).aligners == [None, None]


def test_tokenizers_that_have_little_in_common_are_aligned_without_a_warning(anchor: Path) -> None:
    other = folder(anchor.parent / "augmenter", 1, WORDS[::-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = compose(anchor, other, "uniform:2", alignment={"max_lag": 4})
    (aligner,) = model.aligners
    assert aligner is not None and aligner.settings()["max_lag"] == 4
    assert aligner.align([1, 2, 3], 3)[0] == [95, 94, 93]


def test_a_token_that_only_the_anchor_has_makes_a_difference(anchor: Path) -> None:
    fewer = folder(anchor.parent / "augmenter", 1, WORDS[:-1])
    with pytest.warns(UserWarning, match=r"differs in 1 of 97 ids \(id 96 is 'w96' for the anchor and no token for"):
        assert compose(anchor, fewer, "uniform:2").aligners != [None]
    assert compose(fewer, anchor, "uniform:2").aligners == [None]  # every id of the anchor's is the same


def test_an_augmenter_with_its_own_tokenizer_may_embed_fewer_ids_than_the_anchor(anchor: Path) -> None:
    short, parts = WORDS[:40][::-1], (FAMILIES["llama"].model(0), FAMILIES["llama"].model(1, vocab=40))
    with pytest.raises(ValueError, match=r"embeds 40 token ids.*differs.*tokenizers=\[anchor's, augmenter's, ...\]"):
        compose(*parts, "uniform:2")
    assert compose(*parts, "uniform:2", tokenizers=[tokenizer(WORDS), tokenizer(short)]).aligners != [None]
    with pytest.raises(
        ValueError,
        match="`augmenters` must be a model that embeds the ids of its own tokenizer, 0 to 96, got augmenter 0 .* 40 ",
    ):
        compose(*parts, "uniform:2", tokenizers=[tokenizer(WORDS), tokenizer(WORDS[::-1])])
    swapped = [tokenizer(short), tokenizer(WORDS)]
    with pytest.raises(ValueError, match="`anchor` must be a model that embeds .* 0 to 96, .* in the models' order"):
        compose(*parts[::-1], "uniform:2", tokenizers=swapped[::-1])
    with pytest.raises(ValueError, match="The tokenizers are the same: give the number of ids in use as `vocab_size`"):
        compose(*parts, "uniform:2", tokenizers=[tokenizer(short), tokenizer(short)])


def test_tokens_added_to_the_augmenter_s_vocabulary_need_no_embedding() -> None:
    parts = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    other = tokenizer(WORDS[::-1])
    other.add_tokens(["<image>"])
    assert compose(*parts, "uniform:2", tokenizers=[tokenizer(WORDS), other]).aligners != [None]


def test_a_tokenizer_that_cannot_be_aligned_is_refused_with_the_reason() -> None:
    parts = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1, vocab=400)
    with pytest.raises(ValueError, match="compose: `tokenizers` must be the same .* fast tokenizer .*same_ids=True"):
        compose(*parts, "uniform:2", tokenizers=[tokenizer(WORDS), ByT5Tokenizer()])


@pytest.mark.parametrize("words", [None, WORDS, SWAPPED])
def test_what_cannot_be_compared_or_agrees_is_composed_without_a_warning(anchor: Path, words: Any) -> None:
    other: Any = folder(anchor.parent / "augmenter", 1, words)
    if words is SWAPPED:
        other = FAMILIES["llama"].model(1)  # made in memory: nothing is known about its tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(compose(anchor, other, "uniform:2"), ComposedForCausalLM)


def test_equal_files_are_not_loaded(anchor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = anchor.parent / "copy"
    shutil.copytree(anchor, copy)
    model = FAMILIES["llama"].model()

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("calm_fast.hf.vocabularies.AutoTokenizer.from_pretrained", load)
    known = known_tokenizers(model, [model, model], [anchor, copy, anchor], {})
    assert find_differences(model, [model, model], known, None, explicit=True) == [None, None]


def test_a_tokenizer_that_does_not_load_warns_beside_a_model_and_is_an_error_as_an_argument(anchor: Path) -> None:
    broken = folder(anchor.parent / "augmenter", 1, WORDS)
    (broken / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="compose: the tokenizer of augmenter 0 in .* cannot be loaded .*not compared"):
        compose(anchor, broken, "uniform:2")
    with pytest.raises(ValueError, match="`tokenizers` must be a tokenizer that loads, for augmenter 0, got '.*augm"):
        compose(anchor, broken, "uniform:2", tokenizers=[anchor, broken])


def test_tokenizers_of_names_on_the_hub_come_from_its_local_cache(anchor: Path) -> None:
    loaded, other = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    for name, words in (("one", WORDS), ("two", SWAPPED)):
        commit = anchor.parent / "cache" / f"models--owner--{name}" / "snapshots" / ("c" * 40)
        tokenizer(words).save_pretrained(commit)
        refs = commit.parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text("c" * 40)
    loaded.name_or_path, other.name_or_path = "owner/one", "owner/two"
    kwargs = {"model_kwargs": {"cache_dir": str(anchor.parent / "cache")}}
    with pytest.warns(UserWarning, match="differs in 6 of 97 ids"):
        assert compose(loaded, other, "uniform:2", **kwargs).aligners != [None]
    other.name_or_path = "owner/three"
    assert isinstance(compose(loaded, other, "uniform:2", **kwargs), ComposedForCausalLM)


def test_tokenizers_are_those_of_the_revision_that_was_loaded(anchor: Path) -> None:
    loaded, other = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    for name, words in (("one", WORDS), ("two", SWAPPED)):
        repository = anchor.parent / "cache" / f"models--owner--{name}"
        (repository / "refs").mkdir(parents=True)
        for ref, commit, own in (("main", "c" * 40, WORDS), ("v2", "d" * 40, words)):
            tokenizer(own).save_pretrained(repository / "snapshots" / commit)
            loaded.config.save_pretrained(repository / "snapshots" / commit)
            (repository / "refs" / ref).write_text(commit)
    loaded.name_or_path, other.name_or_path = "owner/one", "owner/two"
    where = {"cache_dir": str(anchor.parent / "cache")}
    assert isinstance(compose(loaded, other, "uniform:2", model_kwargs=where), ComposedForCausalLM)
    with pytest.warns(UserWarning, match="differs in 6 of 97 ids"):
        compose(loaded, other, "uniform:2", model_kwargs=where | {"revision": "v2"})


def test_tokenizers_are_given_as_objects_for_models_without_a_folder() -> None:
    parts = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    same, other = tokenizer(WORDS), tokenizer(SWAPPED)
    assert isinstance(compose(*parts, "uniform:2", tokenizers=[same, tokenizer(WORDS)]), ComposedForCausalLM)
    assert isinstance(compose(*parts, "uniform:2", tokenizers=[same, None]), ComposedForCausalLM)
    with pytest.warns(UserWarning, match="differs in 6 of 97 ids"):
        compose(*parts, "uniform:2", tokenizers=(same, other))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tokenizers": [None]}, r"`tokenizers` must be a list of 1 \+ 1 tokenizers or folders .*, got 1 entries"),
        ({"tokenizers": "folder"}, "`tokenizers` must be a list .*, got str 'folder'"),
        ({"tokenizers": [None, 3]}, "`tokenizers` must be a list .*, got int 3"),
        ({"alignment": "probe"}, r"`alignment` must be None, a dict .* per augmenter \(1\), got str 'probe'"),
        ({"alignment": [{}, {}]}, r"`alignment` must be None, a dict .* per augmenter \(1\), got list"),
        ({"alignment": {}, "same_ids": True}, "`alignment` must be None with same_ids=True"),
        ({"alignment": {}}, r"`tokenizers` must be given for the anchor and augmenter 0 .*, got none that is known"),
        (
            {"alignment": {"max_lag": 0}, "tokenizers": [tokenizer(WORDS), tokenizer(WORDS[::-1])]},
            "`alignment` must be settings of an aligner, got for augmenter 0 .*: StreamAligner: `max_lag` must be",
        ),
        ({"same_ids": 1}, "`same_ids` must be True or False, got int 1"),
        ({"probe": "no"}, "`probe` must be True or False, got str 'no'"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"compose: {message}"):
        compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), "uniform:2", **kwargs)
