"""What vLLM gets from a saved composition; none of it needs vLLM. tests/integration/test_vllm.py runs the model."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from calm_fast import ComposedConfig, ComposedForCausalLM, compose
from calm_fast.vllm import ARCHITECTURE, MODEL
from calm_fast.vllm.parts import check_composition, check_files, parts_of, wanted_weights

ROOT = Path(__file__).resolve().parents[2]
SIZES: dict[str, Any] = {
    "vocab_size": 32, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PAIRS = [(0, 1), (2, 0)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 2 layers, a Qwen 3 of 5 whose embedding is its head, and `AB`, composed of them."""
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, **SIZES)).save_pretrained(folder / "anchor")
    augmenter = Qwen3Config(hidden_size=12, num_hidden_layers=5, tie_word_embeddings=True, **SIZES)
    Qwen3ForCausalLM(augmenter).save_pretrained(folder / "augmenter")
    compose(str(folder / "anchor"), str(folder / "augmenter"), PAIRS, 2).save_pretrained(folder / "AB")
    return folder


def names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def parameters(config: Any) -> set[str]:
    """The names of a model's parameters, without those of a head that is its embedding."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name for name, _ in model.named_parameters()}


def test_every_weight_has_a_place_and_every_place_a_weight(saved: Path) -> None:
    config = ComposedConfig.from_pretrained(str(saved / "AB"))
    check_composition(config, 64)
    parts = parts_of(config, str(saved / "AB"))
    assert [(p.name, p.config.model_type, p.config.num_hidden_layers) for p in parts] == [
        ("anchor", "llama", 2),
        ("augmenters_0", "qwen3", 3),  # layers 0 to 2
    ]
    assert config.augmenter_configs[0].num_hidden_layers == 5  # a copy was truncated
    files = [("", saved / "AB")] + [(f"{p.name}.", Path(p.source)) for p in parts]
    stream = [(f"{prefix}{n}", torch.empty(0)) for prefix, path in files for n in names(path / "model.safetensors")]
    kept = {name for name, _ in wanted_weights(parts, stream)}
    expected = {f"{p.name}.{name}" for p in parts for name in parameters(p.config)}
    model = ComposedForCausalLM.from_pretrained(str(saved / "AB"))
    expected |= {f"connections.{name}" for name, _ in model.connections.named_parameters()}
    assert kept == expected


def test_an_untied_head_of_an_augmenter_is_left_out(saved: Path) -> None:
    config = ComposedConfig.from_pretrained(str(saved / "AB"))
    anchor, augmenter = parts_of(config, str(saved / "AB"))
    assert (anchor.wants("lm_head.weight"), augmenter.wants("lm_head.weight")) == (True, False)
    assert (augmenter.wants("model.norm.weight"), augmenter.wants("model.layers.10.mlp.up_proj.weight")) == (
        True,
        False,
    )


def test_parts_are_found_where_the_folder_was_moved(saved: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(saved, tmp_path / "moved"))
    config = ComposedConfig.from_pretrained(str(moved / "AB"))
    assert [Path(p.source) for p in parts_of(config, str(moved / "AB"))] == [moved / "anchor", moved / "augmenter"]


def test_other_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(saved, tmp_path / "moved"))
    parts = parts_of(ComposedConfig.from_pretrained(str(moved / "AB")), str(moved / "AB"))
    for part in parts:
        check_files(part)
    torch.manual_seed(1)
    for part in parts:
        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(part.source).config)
        model.save_pretrained(part.source)
        argument = "anchor" if part.name == "anchor" else "augmenters"
        with pytest.raises(ValueError, match=f"{argument}.*have other values"):
            check_files(part)


def changed(**fields: Any) -> Callable[[ComposedConfig], None]:
    def change(config: ComposedConfig) -> None:
        for name, value in fields.items():
            vars(config)[name] = value

    return change


def windows(config: ComposedConfig) -> None:
    own = MistralConfig(hidden_size=16, num_hidden_layers=2, sliding_window=8, **SIZES)
    vars(config)["anchor_config"] = own


def layer_windows(config: ComposedConfig) -> None:
    config.augmenter_configs[0].layer_types = ["full_attention"] * 4 + ["sliding_attention"]


def another_family(config: ComposedConfig) -> None:
    config.augmenter_configs[0] = GemmaConfig(hidden_size=12, num_hidden_layers=5, **SIZES)


def quantised(config: ComposedConfig) -> None:
    vars(config)["anchor_config"].quantization_config = {"quant_method": "int8"}


def few_tokens(config: ComposedConfig) -> None:
    config.augmenter_configs[0].vocab_size = 31


def few_positions(config: ComposedConfig) -> None:
    config.augmenter_configs[0].max_position_embeddings = 63


REFUSED: dict[str, tuple[Callable[[ComposedConfig], None], str]] = {
    "tokenizers": (changed(alignment=[{"memory": 4}]), "alignment"),
    "bidirectional": (changed(bidirectional=["prompt"]), "bidirectional"),
    "no anchor": (changed(anchor_config=None), "anchor_config"),
    "family": (another_family, "augmenters.*gemma"),
    "layers elsewhere": (changed(anchor_layers="model.decoder.layers"), "anchor.*model.decoder.layers"),
    "quantised": (quantised, "anchor.*quantization_config"),
    "window": (windows, "anchor.*sliding"),
    "window of a layer": (layer_windows, "augmenters.*sliding"),
    "vocabulary": (few_tokens, "augmenters.*31"),
    "positions": (few_positions, "augmenters.*max_model_len=63"),
    "embedding": (changed(connections=[[(-1, 0)]]), "connections"),
    "no path": (changed(augmenter_paths=[""]), "augmenter_paths"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_serve_is_refused(name: str, saved: Path) -> None:
    config = ComposedConfig.from_pretrained(str(saved / "AB"))
    change, message = REFUSED[name]
    check_composition(config, 64)
    change(config)
    with pytest.raises(ValueError, match=message):
        check_composition(config, 64)


def test_the_entry_point_leads_to_the_class(saved: Path) -> None:
    own = re.search(
        r'\[project.entry-points."vllm.general_plugins"\]\ncalm_fast = "(.*):(.*)"',
        (ROOT / "pyproject.toml").read_text(),
    )
    assert own is not None
    assert callable(getattr(importlib.import_module(own[1]), own[2]))
    assert ComposedConfig.from_pretrained(str(saved / "AB")).architectures == [ARCHITECTURE]
    module, _, name = MODEL.partition(":")
    spec = importlib.util.find_spec(module)  # found, not imported: it needs vLLM
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
