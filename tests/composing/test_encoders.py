"""Compositions with an encoder, and variables of the chat template, from training to evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SENTENCES, byte_level, completions, write_rows
from transformers import AutoTokenizer, BertConfig, BertModel
from typer.testing import CliRunner

from calm_fast.cli import app
from calm_fast.composing import Settings, evaluate_folder, generate_text, run
from calm_fast.composing.data import encode, read_texts
from calm_fast.hf import ComposedForCausalLM

SETTINGS = Settings(
    connections="uniform:2", steps=4, batch_size=3, warmup=1, max_length=48, holdout=0.2, device="cpu", progress=False
)


def quiet(line: str) -> None:
    pass


def losses(results: dict[str, Any]) -> dict[str, Any]:
    return {name: row and row["loss_per_token"] for name, row in results["held_out"]["models"].items()}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with the anchor's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("bert"), byte_level(chat=True)
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["prompt", "reencode"])
def test_an_encoder_is_trained_beside_an_anchor_and_scored(mode: str, anchor, bert, tmp_path) -> None:
    rows, lines = write_rows(tmp_path / "rows.jsonl", completions(SENTENCES[:20])), list[str]()
    out = tmp_path / "out"
    settings = replace(SETTINGS, bidirectional=mode)
    results = run(rows, anchor, [bert], out, settings, say=lines.append)
    assert losses(results)["A"] is None and losses(results)["B"] > 0 and losses(results)["A+B"] > 0
    assert list(results["held_out"]["differences"]) == ["A+B - B"]
    assert any(line.startswith("A ") and "an encoder, which has no loss of its own" in line for line in lines)
    assert "BertModel" in "\n".join(lines) and "an encoder, which has no loss" in (out / "report.html").read_text()
    assert ComposedForCausalLM.from_pretrained(out).config.bidirectional == [mode]
    assert isinstance(generate_text(out, "key 1 2", max_new_tokens=3, say=quiet), str)
    held = write_rows(tmp_path / "held.jsonl", completions(SENTENCES[20:28]))
    result = CliRunner().invoke(app, ["eval", str(out), str(held), "--out", str(tmp_path / "eval"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "an encoder, which has no loss of its own" in result.output
    found = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert losses(found)["A"] is None and losses(found)["A+B"] > 0


def test_an_encoder_stands_beside_a_language_model(anchor, sibling, bert, tmp_path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", completions(SENTENCES[:12])), tmp_path / "out"
    arguments = ["compose", rows, "--anchor", anchor, "--augmenter", sibling, "--augmenter", bert, "--out", out]
    options = ["--bidirectional", "none", "--bidirectional", "prompt", "--steps", 2, "--warmup", 0, "--device", "cpu"]
    options += ["--connections", "uniform:2"]
    result = CliRunner().invoke(app, [str(word) for word in (*arguments, *options)])
    assert result.exit_code == 0, result.output
    found = losses(json.loads((out / "results.json").read_text()))
    assert found["A2"] is None and all(found[name] > 0 for name in ("A1", "B", "A+B"))


def test_texts_without_a_prompt_are_refused_before_anything_is_loaded(anchor, bert, tmp_path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*completions(SENTENCES[:3]), {"text": "a text"}])
    settings = replace(SETTINGS, bidirectional="prompt", holdout=0)
    message = "compose: `train` must be rows with `prompt` and .* got a text without a prompt in rows.jsonl, line 4"
    with pytest.raises(ValueError, match=message):
        run(rows, anchor, [bert], tmp_path / "out", settings, say=quiet)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match='compose: `bidirectional` must be None, "prompt" or "reencode"'):
        run(rows, anchor, [bert], tmp_path / "out", replace(settings, bidirectional="both"), say=quiet)


def test_variables_of_the_chat_template_count_in_training_and_evaluation(anchor, sibling, tmp_path) -> None:
    folder = tmp_path / "anchor"
    folder.mkdir()
    for file in anchor.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% if mood %}{{ mood }} {% endif %}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in completions(SENTENCES[:12])
    ]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    mood = {"mood": "door"}
    plain, moody = (encode(read_texts(rows)[0], tokenizer, template=given)[0] for given in (None, mood))
    assert tokenizer.decode(moody.input_ids) == "door " + tokenizer.decode(plain.input_ids)
    settings = replace(SETTINGS, chat_template_kwargs=mood, max_length=64)
    results = run(rows, folder, [sibling], tmp_path / "out", settings, held_out=rows, say=quiet)
    assert results["identity"]["settings"]["chat_template_kwargs"] == mood
    again, other = (
        evaluate_folder(tmp_path / "out", rows, chat_template_kwargs=given, device="cpu", progress=False, say=quiet)
        for given in (None, {})
    )
    assert losses(again) == losses(results) and losses(other)["B"] != losses(results)["B"]
    with pytest.raises(ValueError, match="compose: `chat_template_kwargs` must be None for rows without `messages`"):
        texts = write_rows(tmp_path / "texts.jsonl", completions(SENTENCES[:4]))
        run(texts, folder, [sibling], tmp_path / "other", settings, say=quiet)
