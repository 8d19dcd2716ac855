"""transformers' Auto classes know a composition once calm_fast is imported, and say what is missing before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from transformers import AutoConfig

from calm_fast.core.registration import register_model_types
from calm_fast.hf import ComposedConfig, compose

LAZY = """
import sys
import calm_fast
assert not {"torch", "transformers", "calm_fast.hf"} & set(sys.modules), "import calm_fast is no longer light"
import transformers.models.auto.configuration_auto as table
from transformers import AutoConfig, AutoModelForCausalLM
assert table.__spec__.loader.__class__.__name__ == "SourceFileLoader", table.__spec__.loader
assert "calm_fast.hf" not in sys.modules, "the models are imported before one is asked for"
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(AutoConfig.from_pretrained(sys.argv[1])).__name__ == "ComposedConfig"
from transformers import TextGenerationPipeline
TextGenerationPipeline(model=model, tokenizer=None)
print(type(model).__module__, type(model).__name__)
"""
LATER = """
import sys
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError as problem:
    assert "model type `calm_fast_composed`" in str(problem), problem
else:
    raise SystemExit("transformers knows compositions itself")
import calm_fast
assert "calm_fast.hf" not in sys.modules
config = AutoConfig.from_pretrained(sys.argv[1])
print(type(config).__module__, type(config).__name__)
"""


def run(source: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source, str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_import_calm_fast_is_enough_and_light(folder: Path) -> None:
    assert run(LAZY, folder / "composed") == "calm_fast.hf.composed ComposedForCausalLM"


def test_transformers_names_the_model_type_without_it_and_knows_it_after(folder: Path, forked) -> None:
    done = forked.run("-c", LATER, folder / "composed", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "calm_fast.hf.config ComposedConfig"


def test_another_package_s_type_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from transformers import LlamaConfig\n__all__ = ['OwnConfig']\nclass OwnConfig(LlamaConfig):\n    "
    (tmp_path / "own_models.py").write_text(source + "model_type = 'own_type'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    table = sys.modules["transformers.models.auto.configuration_auto"].CONFIG_MAPPING_NAMES
    register_model_types("own_models", {"own_type": "OwnConfig"})
    try:
        assert "own_models" not in sys.modules
        assert type(AutoConfig.for_model("own_type")).__module__ == "own_models"
    finally:
        del table["own_type"]
        for name in ("own_models", "transformers.models.own_type"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tool_reads_the_anchor_s_length_off_the_config(family: str, tmp_path: Path) -> None:
    """lm-evaluation-harness takes the first of these names that a config has, and 2,048 tokens if it has none."""
    anchor = FAMILIES[family].model(0)
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    length = next(getattr(anchor.config, name) for name in names if hasattr(anchor.config, name))
    assert length not in (None, 2048)
    anchor.save_pretrained(tmp_path / "anchor")
    FAMILIES["llama"].model(1).save_pretrained(tmp_path / "augmenter")
    compose(str(tmp_path / "anchor"), str(tmp_path / "augmenter"), connections=[(0, 0)]).save_pretrained(
        tmp_path / "composed"
    )
    config = AutoConfig.from_pretrained(tmp_path / "composed")
    assert isinstance(config, ComposedConfig)
    assert [hasattr(config, name) for name in names] == [hasattr(anchor.config, name) for name in names]
    assert next(getattr(config, name) for name in names if hasattr(config, name)) == length
    assert "auto_map" not in config.to_dict()
