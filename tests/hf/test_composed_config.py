"""The config of a composition speaks for its anchor, as tools expect of a causal LM's config."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from families import FAMILIES, prompts
from saved import config_of, rebuilt
from transformers import AutoConfig, BartConfig, BartForCausalLM, WatermarkDetector, WatermarkingConfig

from calm_fast.hf import ComposedConfig, ComposedForCausalLM, compose

NAMES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings "
    "pad_token_id bos_token_id eos_token_id tie_word_embeddings intermediate_size rope_parameters"
).split()


@pytest.mark.seam(attach="tools that read `model.config` (`vocab_size`, `pad_token_id`, ...)", to="composition",
                  result="works", why="these fields are read from the anchor's config and set there")  # fmt: skip
def test_fields_of_a_language_model_are_the_anchors(folder: Path) -> None:
    model = rebuilt(folder)
    for config in (model.config, AutoConfig.from_pretrained(folder / "composed"), copy.deepcopy(model.config)):
        assert {name: getattr(config, name) for name in NAMES} == {
            name: getattr(model.anchor.config, name) for name in NAMES
        }
    WatermarkDetector(model_config=model.config, device="cpu", watermarking_config=WatermarkingConfig())


def test_names_are_those_of_every_family() -> None:
    model = compose(FAMILIES["gpt2"].model(0), FAMILIES["gpt2"].model(1), "uniform:1")
    assert model.config.n_embd == model.config.hidden_size == 32


def test_an_anchor_whose_config_declares_settings_of_generation_generates() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = BartConfig(
        **sizes, encoder_layers=2, max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False
    )
    anchor = BartForCausalLM(config).eval()
    anchor.generation_config.forced_eos_token_id = 7
    model = compose(anchor, FAMILIES["llama"].model(1), "uniform:2")
    assert anchor.config.forced_eos_token_id == 2 and not hasattr(model.config, "forced_eos_token_id")
    ids = model.generate(prompts(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(ids, anchor.generate(prompts(), max_new_tokens=4, min_new_tokens=4, do_sample=False))
    assert ids[:, -1].tolist() == [7, 7]  # of the anchor's generation_config


def test_unknown_and_private_names_stay_unknown(folder: Path) -> None:
    model = rebuilt(folder)
    model.anchor.config.quantization_config = {"quant_method": "fp8"}
    model.anchor.config._private = 1
    model.anchor.config.auto_map = {"AutoConfig": "other.Config"}
    assert model.config.auto_map == {} and "auto_map" not in model.config.to_dict()
    for name in ("no_such_field", "_private", "quantization_config", "text_config"):
        assert not hasattr(model.config, name)
        assert getattr(model.config, name, "default") == "default"
    assert "quantization_config" not in model.config.to_dict()
    with pytest.raises(AttributeError, match="'ComposedConfig' object has no attribute 'no_such_field'"):
        _ = model.config.no_such_field
    assert not hasattr(ComposedConfig(), "vocab_size")


def test_a_field_is_set_where_it_is_read(folder: Path) -> None:
    model = rebuilt(folder)
    model.config.pad_token_id = 5
    assert model.anchor.config.pad_token_id == model.config.pad_token_id == 5
    model.config.use_cache = False
    assert model.anchor.config.use_cache and model(prompts()).cache is None
    model.config.own_note = "kept"
    assert not hasattr(model.anchor.config, "own_note")
    model.config.output_hidden_states = True
    assert len(model(prompts()).hidden_states) == 4


def test_no_field_is_saved_twice(folder: Path) -> None:
    model = rebuilt(folder)
    model.config.pad_token_id = 5
    model.save_pretrained(folder / "composed")
    content = config_of(folder)
    assert not set(NAMES) & content.keys() and content["anchor_config"]["pad_token_id"] == 5
    loaded = AutoConfig.from_pretrained(folder / "composed")
    assert loaded.pad_token_id == 5 and loaded.to_dict() == ComposedConfig.from_dict(content).to_dict()
    assert pickle.loads(pickle.dumps(loaded)).to_dict() == loaded.to_dict()
    again = json.loads(loaded.to_json_string())
    assert {k: v for k, v in again.items() if k != "transformers_version"}.keys() <= content.keys() | {"dtype"}


def test_a_field_of_the_anchor_in_an_old_file_goes_to_the_anchor(folder: Path) -> None:
    content = config_of(folder) | {"pad_token_id": 7}
    config = ComposedConfig.from_dict(content)
    assert "pad_token_id" not in vars(config) and config.anchor_config.pad_token_id == 7


@torch.no_grad()
def test_generate_uses_the_pad_token_that_was_set(folder: Path) -> None:
    """Two rows, one of which ends early and is padded."""
    model = ComposedForCausalLM.from_pretrained(folder / "composed")
    ids = prompts()
    first = model.generate(ids, max_new_tokens=1, do_sample=False)[:, -1]
    assert first[0] != first[1]
    model.generation_config.pad_token_id = 5
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=int(first[0]))
    assert out[0, -1] == 5


def test_the_text_config_is_the_anchors(folder: Path) -> None:
    config = rebuilt(folder).config
    for arguments in ({}, {"decoder": True}, {"encoder": True}):
        assert config.get_text_config(**arguments) is config.anchor_config.get_text_config(decoder=True)
