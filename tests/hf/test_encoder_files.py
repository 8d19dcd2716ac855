"""Saved compositions with bidirectional augmenters: found again by path, in whatever model the encoder lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import KINDS, encoder, with_encoder
from families import FAMILIES, prompts, randomize
from transformers import AutoModelForCausalLM, BertForMaskedLM, BertForSequenceClassification

from calm_fast.hf import ComposedConfig, ComposedForCausalLM, compose
from calm_fast.hf.config import FORMAT_VERSION


def generated(model: Any) -> torch.Tensor:
    return model.generate(prompts(), max_new_tokens=5, do_sample=False, eos_token_id=None)


def saved(tmp_path: Path, model: Any, mode: str = "prompt") -> tuple[ComposedForCausalLM, Path]:
    """Save an anchor, `model` and their composition; return it and its folder."""
    FAMILIES["llama"].model(0).save_pretrained(tmp_path / "anchor")
    model.save_pretrained(tmp_path / "encoder")
    composed = randomize(compose(tmp_path / "anchor", tmp_path / "encoder", "uniform:3", bidirectional=mode))
    composed.save_pretrained(tmp_path / "composed")
    return composed, tmp_path / "composed"


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_is_loaded_again_from_the_model_it_lies_in(tmp_path: Path, kind: str) -> None:
    composed, folder = saved(tmp_path, encoder(kind), "reencode")
    config = json.loads((folder / "config.json").read_text())
    assert config["bidirectional"] == ["reencode"] and config["format_version"] == FORMAT_VERSION
    assert config["augmenter_paths"] == ["../encoder"]
    loaded = ComposedForCausalLM.from_pretrained(folder)
    assert type(loaded.augmenters[0]) is type(composed.augmenters[0])
    assert torch.equal(generated(loaded), generated(composed))
    assert torch.equal(generated(AutoModelForCausalLM.from_pretrained(folder)), generated(composed))
    given = ComposedForCausalLM.from_pretrained(folder, augmenters=encoder(kind))
    assert torch.equal(generated(given), generated(composed))


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
def test_a_model_with_a_head_is_loaded_without_it(tmp_path: Path, kind: Any) -> None:
    composed, folder = saved(tmp_path, kind(encoder("bert").config))
    assert torch.equal(generated(ComposedForCausalLM.from_pretrained(folder)), generated(composed))
    whole = kind.from_pretrained(tmp_path / "encoder")
    again = randomize(compose(tmp_path / "anchor", whole, "uniform:3", bidirectional="prompt"))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(generated(ComposedForCausalLM.from_pretrained(tmp_path / "again")), generated(composed))


@pytest.mark.parametrize("kind", ["bert", "whole t5", "bart"])
def test_changed_weights_are_seen_when_saving_and_when_loading(tmp_path: Path, kind: str) -> None:
    composed, folder = saved(tmp_path, encoder(kind))
    other = encoder(kind, seed=5)
    other.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="`augmenters` must be as it can be loaded from .* has other values than in"):
        composed.save_pretrained(folder)
    with pytest.raises(ValueError, match="`augmenters` must be the model with which the composition was saved"):
        ComposedForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="`augmenters` must be the model with which the composition was saved"):
        ComposedForCausalLM.from_pretrained(folder, augmenters=other)


def test_an_encoder_with_a_changed_config_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, encoder("bert"))
    config = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act 'relu' instead of 'gelu'"):
        ComposedForCausalLM.from_pretrained(folder)


def test_a_composition_without_encoders_keeps_its_format(tmp_path: Path) -> None:
    for name, seed in (("anchor", 0), ("augmenter", 1)):
        FAMILIES["llama"].model(seed).save_pretrained(tmp_path / name)
    compose(tmp_path / "anchor", tmp_path / "augmenter", "uniform:2").save_pretrained(tmp_path / "composed")
    config = json.loads((tmp_path / "composed" / "config.json").read_text())
    assert config["format_version"] == 1 and "bidirectional" not in config


def test_another_mode_of_reading_is_refused_for_saved_tensors(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, encoder("bert"))
    config = json.loads((folder / "config.json").read_text())
    changed = ComposedConfig.from_dict(config | {"bidirectional": ["reencode"]})
    with pytest.raises(ValueError, match="`config` must be .* other bidirectional"):
        ComposedForCausalLM.from_pretrained(folder, config=changed)


def test_a_config_alone_builds_the_parts() -> None:
    for kind in ("bert", "t5", "bart"):
        config = ComposedConfig.from_dict(with_encoder(kind).config.to_dict())
        built = ComposedForCausalLM(config).eval()
        assert built(prompts()).logits.shape == (2, 9, 97)


def test_loading_a_path_without_an_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compose: `augmenters` must be a loaded model, its folder or its hub name"):
        compose(FAMILIES["llama"].model(0), tmp_path / "none", "uniform:2", bidirectional="prompt")
