"""A saved composition carries its tokenizers: the anchor's for everybody, the augmenters' for their aligners."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, randomize
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.tokenizer_files import fingerprint

WORDS = ["<unk>", "<pad>", *(f"w{i}" for i in range(2, VOCAB))]
REVERSED = WORDS[:2] + WORDS[:1:-1]
IDS = [5, 9, 30, 2]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def tokenizer(words: list[str] = WORDS, cls: Any = PreTrainedTokenizerFast) -> Any:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return cls(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """Folders of an anchor and an augmenter, each with its own tokenizer."""
    for name, seed, words in (("anchor", 0, WORDS), ("augmenter", 1, REVERSED)):
        FAMILIES["llama"].model(seed).save_pretrained(tmp_path / name)
        own = tokenizer(words)
        own.chat_template = {"default": TEMPLATE, "tools": TEMPLATE}
        own.save_pretrained(tmp_path / name)
    return tmp_path / "anchor", tmp_path / "augmenter"


def composed(parts: tuple[Path, Path], **kwargs: Any) -> ComposedForCausalLM:
    return randomize(compose(*parts, [(0, 1)], **kwargs))


@pytest.fixture
def saved(parts: tuple[Path, Path]) -> Path:
    folder = parts[0].parent / "composed"
    composed(parts, alignment={"max_lag": 7}).save_pretrained(folder)
    return folder


def names(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def check_restored(model: ComposedForCausalLM) -> None:
    (aligner,) = model.aligners
    assert aligner is not None and aligner.settings()["max_lag"] == 7
    assert aligner.align(IDS, len(IDS))[0] == [REVERSED.index(WORDS[i]) for i in IDS]


def test_tokenizers_and_settings_are_restored_also_from_a_moved_folder(saved: Path) -> None:
    model = ComposedForCausalLM.from_pretrained(saved)
    check_restored(model)
    model.save_pretrained(saved.parent / "again")
    assert names(saved.parent / "again") == names(saved)
    for name in names(saved) - {"model.safetensors"}:  # its metadata come in any order
        assert (saved.parent / "again" / name).read_bytes() == (saved / name).read_bytes(), name
    for name in ("anchor", "augmenter", "composed"):
        (saved.parent / "moved").mkdir(exist_ok=True)
        shutil.move(saved.parent / name, saved.parent / "moved" / name)
    shutil.rmtree(saved.parent / "again")
    check_restored(ComposedForCausalLM.from_pretrained(saved.parent / "moved" / "composed"))


def test_the_folder_has_the_anchor_s_tokenizer_and_flat_folders_of_the_others(saved: Path) -> None:
    own = AutoTokenizer.from_pretrained(saved)
    assert own("w5 w9").input_ids == [5, 9] and own.chat_template["default"] == TEMPLATE
    # transformers uploads the files of a folder, not those of a folder inside it
    assert {path.name for path in (saved / "augmenter_0_tokenizer").iterdir() if path.is_dir()} == set()
    theirs = AutoTokenizer.from_pretrained(saved / "augmenter_0_tokenizer")
    assert theirs("w5 w9").input_ids == [REVERSED.index("w5"), REVERSED.index("w9")]


def test_releases_that_know_no_aligner_refuse_the_files(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    with safe_open(saved / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert config["format_version"] == 2 and metadata["calm_fast_format"] == "2"  # they read format 1
    assert config["alignment"][0]["max_lag"] == 7 and len(config["tokenizer_fingerprints"]) == 2


def test_one_tokenizer_for_both_parts_is_saved_once_in_the_earlier_format(parts: tuple[Path, Path]) -> None:
    folder = parts[0].parent / "composed"
    composed((parts[0], parts[0])).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1 and not {"alignment", "tokenizer_fingerprints"} & config.keys()
    assert {"tokenizer.json", "chat_template.jinja"} < names(folder)
    assert not any(name.startswith("augmenter_") for name in names(folder))
    model = ComposedForCausalLM.from_pretrained(folder)
    assert model.aligners == [None]
    model.save_pretrained(folder)  # onto itself
    model.save_pretrained(folder.parent / "again")
    assert names(folder.parent / "again") == names(folder)
    text = pipeline("text-generation", model=str(folder))("w5 w9", max_new_tokens=2, do_sample=False)
    assert text[0]["generated_text"].startswith("w5 w9")


def test_only_aligned_augmenters_have_a_folder(parts: tuple[Path, Path], tmp_path: Path) -> None:
    model = randomize(compose(parts[0], [*parts, parts[1]], [(0, 1)]))
    model.save_pretrained(tmp_path / "composed")
    assert {name.split("/")[0] for name in names(tmp_path / "composed") if "/" in name} == {
        "additional_chat_templates", "augmenter_1_tokenizer", "augmenter_2_tokenizer",
    }  # fmt: skip
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    assert [aligner is not None for aligner in loaded.aligners] == [False, True, True]


@pytest.mark.parametrize("inside", ["tokenizer.json", "augmenter_0_tokenizer/tokenizer.json"])
def test_missing_tokenizers_are_named_and_can_be_passed(saved: Path, parts: tuple[Path, Path], inside: str) -> None:
    (saved / inside).unlink()
    owner = "augmenter 0" if "/" in inside else "the anchor"
    message = rf"from_pretrained: `tokenizers` must be a tokenizer that loads, for {owner}, .*Pass tokenizers=\["
    with pytest.raises(ValueError, match=message):
        ComposedForCausalLM.from_pretrained(saved)
    check_restored(ComposedForCausalLM.from_pretrained(saved, tokenizers=list(parts)))
    objects = [tokenizer(), tokenizer(REVERSED)]
    model = ComposedForCausalLM.from_pretrained(saved, tokenizers=objects)
    check_restored(model)
    assert model.tokenizers == objects
    with pytest.raises(ValueError, match=r"from_pretrained: `tokenizers` must be a list of 1 \+ 1 tokenizers"):
        ComposedForCausalLM.from_pretrained(saved, tokenizers=objects[:1])


@pytest.mark.parametrize("inside", [".", "augmenter_0_tokenizer"])
def test_other_tokenizers_than_the_saved_ones_are_refused(saved: Path, inside: str) -> None:
    tokenizer([*WORDS[:2], *WORDS[3:], WORDS[2]]).save_pretrained(saved / inside)
    owner = "the anchor" if inside == "." else "augmenter 0"
    with pytest.raises(ValueError, match=f"`tokenizers` must be the tokenizer with which .* saved, for {owner}, got"):
        ComposedForCausalLM.from_pretrained(saved)
    assert ComposedForCausalLM.from_pretrained(saved, check_parts=False).aligners != [None]


def test_the_fingerprint_sees_how_text_is_split() -> None:
    other = tokenizer()
    assert fingerprint(other) == fingerprint(tokenizer())
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("\n")
    assert fingerprint(other) != fingerprint(tokenizer())


def test_trainer_saves_its_own_tokenizer_with_a_token_more(saved: Path) -> None:
    own = AutoTokenizer.from_pretrained(saved)
    own.add_special_tokens({"eos_token": "<end>"})
    where = saved.parent / "trained"
    arguments = TrainingArguments(where, report_to=[], use_cpu=True)
    Trainer(ComposedForCausalLM.from_pretrained(saved), arguments, processing_class=own).save_model()
    assert AutoTokenizer.from_pretrained(where).eos_token == "<end>"
    check_restored(ComposedForCausalLM.from_pretrained(where))


@pytest.mark.parametrize("how", [copy.deepcopy, "torch.save"])
def test_copies_keep_their_aligners(saved: Path, how: Any) -> None:
    model = ComposedForCausalLM.from_pretrained(saved)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = how(model)
    check_restored(twin)
    assert twin.aligners[0].anchor_tokenizer is twin.tokenizers[0]


def test_tokenizers_of_other_kinds_are_saved(parts: tuple[Path, Path], tmp_path: Path) -> None:
    slow = ByT5Tokenizer()
    big = FAMILIES["llama"].model(0, vocab=400), FAMILIES["llama"].model(1, vocab=400)
    randomize(compose(*big, [(0, 1)], tokenizers=[slow, ByT5Tokenizer()])).save_pretrained(
        tmp_path / "slow", check_parts=False
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "slow")("é").input_ids == slow("é").input_ids
    bare = [tokenizer().backend_tokenizer, tokenizer(REVERSED).backend_tokenizer]  # of the tokenizers library
    composed(parts, tokenizers=bare, alignment={"max_lag": 7}).save_pretrained(tmp_path / "bare")
    check_restored(ComposedForCausalLM.from_pretrained(tmp_path / "bare"))


def test_a_tokenizer_with_code_of_its_own_needs_to_be_trusted(parts: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(parts[0] / name, tmp_path / name)
    file = tmp_path / "tokenizer_config.json"
    own = json.loads(file.read_text())
    auto = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    file.write_text(json.dumps(own | {"auto_map": auto, "tokenizer_class": "OwnTokenizer"}))
    for name in ("tokenizer_config.json", "tokenization_own.py"):
        shutil.copy(tmp_path / name, parts[0] / name)

    model = composed(parts, alignment={"max_lag": 7}, model_kwargs={"trust_remote_code": True})
    assert type(model.tokenizers[0]).__name__ == "OwnTokenizer"
    model.save_pretrained(tmp_path / "composed")
    assert (tmp_path / "composed" / "tokenization_own.py").is_file()
    check_restored(ComposedForCausalLM.from_pretrained(tmp_path / "composed", trust_remote_code=True))
    with pytest.raises(ValueError, match="`tokenizers` must be a tokenizer that loads, for the anchor.*trust_remote"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")


def test_a_tokenizer_that_cannot_be_loaded_any_more_is_left_out_with_a_warning(parts: tuple[Path, Path]) -> None:
    model = composed((parts[0], parts[0]))
    (parts[0] / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="save_pretrained: the anchor's tokenizer in .* cannot be loaded"):
        model.save_pretrained(parts[0].parent / "composed")
    assert "tokenizer.json" not in names(parts[0].parent / "composed")
