"""The example with two real models runs end to end on two tiny ones, with different tokenizers made on the spot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from families import FAMILIES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm_fast.hf import ComposedForCausalLM

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "real_models"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return examples/real_models/run.py, imported as a script imports its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("run", "report", "facts", "convert"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    return run


def byte_level(texts: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return inner


def metaspace(texts: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"]))
    return inner


def test_the_example_runs_on_tiny_models(example: ModuleType, tmp_path: Path) -> None:
    world = example.make_world(0, 20, 6)
    texts = [row["prompt"] + row["completion"] for row in world.statements() + world.questions(world.training)]
    for seed, (name, inner) in enumerate((("anchor", byte_level(texts)), ("augmenter", metaspace(texts)))):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")
        FAMILIES["llama"].model(seed, vocab=310).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    recipe = example.Recipe(
        training_names=20, held_out_names=6, batch=5, teaching_steps=2, steps=3, connections="uniform:2", threads=1
    )
    anchors = {"other": tmp_path / "anchor", "same": tmp_path / "augmenter"}
    results = example.run(anchors, tmp_path / "augmenter", tmp_path / "out", recipe, [0])
    assert [run["name"] for run in results["runs"]] == ["other", "same"]
    for run in results["runs"]:
        assert len(run["composing"]["losses"]) == len(run["adapting"]["losses"]) == 3
        assert all(run[key]["bits_per_byte"] > 0 for key in ("anchor", "augmenter", "composition", "lora"))
        sizes = run["parameters"]
        assert abs(sizes["lora"] / sizes["composition"] - 1) < 0.1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["seed"] == 0
    assert "| other | 0 | composition |" in (tmp_path / "out" / "report.md").read_text()
    assert ComposedForCausalLM.from_pretrained(tmp_path / "out" / "composed_same_0").aligners == [None]
    saved = tmp_path / "out" / "composed_other_0"
    assert ComposedForCausalLM.from_pretrained(saved).aligners != [None]
    assert AutoTokenizer.from_pretrained(saved).decode(AutoTokenizer.from_pretrained(saved)("a b").input_ids) == "a b"


def test_teaching_stops_once_the_statements_are_known(example: ModuleType, tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "completion": " c"}] * 6
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["a b c"]), eos_token="<end>", pad_token="<pad>")
    FAMILIES["llama"].model(0, vocab=310).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = example.load(tmp_path, "float32")
    model.model.layers[0].mlp.requires_grad_(True)
    collate = example.AlignedCollator([None], tokenizer, add_eos=False)
    recipe = example.Recipe(teaching_batch=2, dtype="float32", threads=1)
    record = example.train(model, collate, rows, recipe, 200, 1e-2, 0, "teaching")
    assert 3 <= record["steps"] < 200
    assert example.judge(model, collate, rows, recipe)["right"] == 6


def test_the_interval_of_a_share_is_wilsons(example: ModuleType) -> None:
    """The score test accepts exactly the shares of the interval."""
    from report import interval

    for right, rows in ((0, 120), (7, 120), (120, 120)):
        for end in interval(right, rows):
            assert abs(right / rows - end) == pytest.approx(1.96 * (end * (1 - end) / rows) ** 0.5, abs=1e-9)


def test_held_out_names_are_not_trained_on(example: ModuleType) -> None:
    world = example.make_world(3)
    assert len(world.training) == 400 and len(world.held_out) == 120
    assert not set(world.training) & set(world.held_out)
    told = {row["prompt"] for row in world.statements()}
    assert not any(row["prompt"] in told for row in world.questions(world.held_out))


def test_a_model_that_is_converted_already_is_not_converted_again(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "gemma3").mkdir()
    (tmp_path / "gemma3" / "config.json").write_text("{}")
    assert example.convert("gemma3", tmp_path) == tmp_path / "gemma3"
