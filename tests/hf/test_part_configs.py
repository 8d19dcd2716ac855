"""The same weights under another config are another model: a composition is not saved or loaded with such a part."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, randomize
from saved import PAIRS, SETTINGS, logits, rebuilt
from transformers import AutoModelForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig, Mamba2Config, Mamba2ForCausalLM

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.part_configs import configs_differ

LOAD = ComposedForCausalLM.from_pretrained
FOLDERS = {"anchor": "anchor", "augmenters": "augmenter"}
ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("anchor", {"rms_norm_eps": 0.3}),
    ("anchor", {"rope_parameters": ROPE}),
    ("anchor", {"hidden_act": "gelu"}),
    ("augmenters", {"layer_norm_epsilon": 0.3}),
    ("augmenters", {"scale_attn_weights": False}),
]


@pytest.mark.seam(
    attach="a part loaded with another config (rope scaling, an activation, an epsilon)",
    to="composition",
    result="refused",
    why="save the part itself first; or save with `check_parts=False` and pass this part when loading",
)
@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_a_part_with_another_config_than_its_files_is_refused(name: str, change: dict[str, Any], folder: Path) -> None:
    parts = {key: AutoModelForCausalLM.from_pretrained(folder / path) for key, path in FOLDERS.items()}
    parts[name] = AutoModelForCausalLM.from_pretrained(folder / FOLDERS[name], **change)
    model = randomize(compose(parts["anchor"], parts["augmenters"], PAIRS, **SETTINGS))
    field = next(iter(change))
    with pytest.raises(ValueError, match=f"save_pretrained: `{name}` must be as it can be loaded.*config with {field}"):
        model.save_pretrained(folder / "again")
    model.save_pretrained(folder / "again", check_parts=False)
    with pytest.raises(ValueError, match=f"from_pretrained: `{name}` must be the model with which .*with {field}"):
        LOAD(folder / "again")
    assert torch.equal(logits(LOAD(folder / "again", **parts)), logits(model))


def test_a_part_whose_config_has_an_infinity_is_saved_and_loaded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 4, "n_groups": 1, "num_hidden_layers": 2}
    torch.manual_seed(3)
    mamba = Mamba2ForCausalLM(Mamba2Config(vocab_size=VOCAB, **sizes)).eval()
    assert math.inf in mamba.config.time_step_limit
    mamba.save_pretrained(tmp_path / "mamba2")
    augmenter = AutoModelForCausalLM.from_pretrained(tmp_path / "mamba2")
    model = randomize(compose(FAMILIES["llama"].model(0), augmenter, "uniform:1"))
    model.save_pretrained(tmp_path / "composed")
    again = LOAD(tmp_path / "composed", anchor=model.anchor)
    assert torch.equal(logits(again), logits(model))
    assert configs_differ(again.augmenters[0].config, mamba.config) == ""


def test_an_anchor_whose_head_width_differs_by_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 2, "hidden_size_per_layer_input": 8}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma4TextConfig(vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, layer_types=kinds, **sizes)
    torch.manual_seed(3)
    anchor = Gemma4ForCausalLM(config).eval()
    model = randomize(compose(anchor, FAMILIES["llama"].model(1), "uniform:1"))
    assert not hasattr(model.config, "head_dim")
    with pytest.raises(AttributeError, match="'head_dim' is a per-layer attribute"):
        _ = model.config.head_dim
    model.save_pretrained(tmp_path)
    again = LOAD(tmp_path, anchor=anchor, augmenters=FAMILIES["llama"].model(1))
    assert torch.equal(logits(again), logits(model))


def test_a_config_that_changed_under_a_path_is_refused(folder: Path) -> None:
    file = folder / "anchor" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"rms_norm_eps": 0.3}))
    with pytest.raises(ValueError, match="`anchor` must be the model with which .*rms_norm_eps 0.3 instead of 1e-06"):
        LOAD(folder / "composed")
    with pytest.raises(ValueError, match="`anchor` must be the model with which .*rms_norm_eps 0.3 instead of 1e-06"):
        LOAD(folder / "composed", anchor=AutoModelForCausalLM.from_pretrained(folder / "anchor"))
    assert LOAD(folder / "composed", check_parts=False).anchor.config.rms_norm_eps == 0.3


def test_a_config_that_the_caller_asks_for_is_taken(folder: Path) -> None:
    anchor = AutoModelForCausalLM.from_pretrained(folder / "anchor")
    model = LOAD(folder / "composed", anchor=anchor, layer_norm_epsilon=0.3)
    assert model.augmenters[0].config.layer_norm_epsilon == 0.3
    assert not torch.equal(logits(model), logits(rebuilt(folder)))


def test_settings_without_effect_on_the_logits_may_differ(folder: Path) -> None:
    settings = {"attn_implementation": "eager", "use_cache": False, "pad_token_id": 3, "attention_dropout": 0.5}
    anchor = AutoModelForCausalLM.from_pretrained(folder / "anchor", dtype=torch.bfloat16, **settings)
    randomize(compose(anchor, folder / "augmenter", PAIRS, **SETTINGS)).save_pretrained(folder / "again")
    LOAD(folder / "again")
    LOAD(folder / "composed", anchor=anchor)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_the_same_after_saving(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].model(0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert configs_differ(again.config, model.config) == "" == configs_differ(model.config, again.config)
    again.config.vocab_size = 98
    assert "vocab_size 98 instead of 97" in configs_differ(again.config, model.config)
    assert configs_differ(again.config, model.config, given=["vocab_size"]) == ""


def test_a_composition_behind_a_link_finds_the_parts_beside_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    os.symlink(folder / "composed", tmp_path / "other" / "link")
    assert torch.equal(logits(LOAD(tmp_path / "other" / "link")), logits(rebuilt(folder)))


def test_token_ids_set_on_a_composition_come_back(folder: Path) -> None:
    model = rebuilt(folder)
    model.config.pad_token_id = 5
    model.save_pretrained(folder / "again")
    again = LOAD(folder / "again")
    assert again.config.pad_token_id == again.anchor.config.pad_token_id == 5
    assert LOAD(folder / "again", pad_token_id=7).config.pad_token_id == 7
