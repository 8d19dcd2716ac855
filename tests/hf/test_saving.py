"""Saving a composition: its own tensors and references; loading it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved import edit_config, logits, rebuilt
from transformers import AutoConfig, AutoModelForCausalLM

from calm_fast import add_dual_lora, save_dual_lora, save_lora_adapter
from calm_fast.hf import ComposedConfig, ComposedForCausalLM, cache_augmenter_states, compose
from calm_fast.hf.config import FORMAT_VERSION


def test_only_composition_tensors_are_saved(folder: Path) -> None:
    files = {f.name for f in (folder / "composed").iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    tensors = load_file(folder / "composed" / "model.safetensors")
    assert set(tensors) == {f"connections.{n}" for n in rebuilt(folder).connections.state_dict()}
    with safe_open(folder / "composed" / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["calm_fast_format"]) == ("pt", "1")
    assert metadata["config"] == (folder / "composed" / "config.json").read_text()


def test_loading_from_references_gives_the_same_model(folder: Path) -> None:
    expected = logits(rebuilt(folder))
    for loader in (ComposedForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(folder / "composed")
        assert isinstance(model, ComposedForCausalLM) and not model.training
        assert torch.equal(logits(model), expected)
        model.connections[0].o_proj.weight.requires_grad_(True)
        assert [n for n, p in model.named_parameters() if p.requires_grad][0].startswith("connections.")


def test_loading_onto_given_models_shares_them(folder: Path) -> None:
    source = rebuilt(folder)
    anchor, augmenter = source.anchor, AutoModelForCausalLM.from_pretrained(folder / "augmenter")
    shutil.rmtree(folder / "anchor")
    model = ComposedForCausalLM.from_pretrained(folder / "composed", anchor=anchor, augmenters=augmenter)
    assert model.anchor is anchor and torch.equal(logits(model), logits(source))


def test_a_folder_moved_with_its_models_still_loads(folder: Path) -> None:
    expected = logits(rebuilt(folder))
    config = json.loads((folder / "composed" / "config.json").read_text())
    for name in ("anchor", "augmenter"):
        shutil.move(folder / name, folder / "composed" / name)
    config |= {"anchor_path": "anchor", "augmenter_paths": ["augmenter"]}
    (folder / "composed" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "composed")), expected)


def test_saving_again_saves_the_same(folder: Path) -> None:
    ComposedForCausalLM.from_pretrained(folder / "composed").save_pretrained(folder / "again")
    first, again = folder / "composed", folder / "again"
    assert (again / "config.json").read_text() == (first / "config.json").read_text()
    expected = load_file(first / "model.safetensors")
    got = load_file(again / "model.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def test_config_survives_and_speaks_for_the_anchor(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "composed")
    assert isinstance(config, ComposedConfig) and config.format_version == 1
    assert config.connections == [[(-1, -1), (2, 1)]] and config.cross_attention["head_dim"] == 12
    assert config.get_text_config(decoder=True) is config.anchor_config
    assert config.anchor_config.model_type == "llama" and config.augmenter_configs[0].n_embd == 24
    assert config.anchor_path == "../anchor" and config.augmenter_paths == ["../augmenter"]
    model = ComposedForCausalLM.from_pretrained(folder / "composed")
    assert (model.config.anchor_path, model.config.augmenter_paths) == (
        str(folder / "anchor"),
        [str(folder / "augmenter")],
    )


def test_dtype_goes_to_the_parts_and_composition_keeps_its_own(folder: Path) -> None:
    model = ComposedForCausalLM.from_pretrained(folder / "composed", dtype=torch.bfloat16)
    assert model.anchor.dtype == model.augmenters[0].dtype == torch.bfloat16
    assert {p.dtype for p in model.connections.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, "1.5"])
def test_unknown_config_format_is_refused(folder: Path, version: Any) -> None:
    with pytest.raises(ValueError, match=f"`format_version` must be .*{version}"):
        ComposedForCausalLM.from_pretrained(edit_config(folder, format_version=version))


@pytest.mark.parametrize("metadata", [{"calm_fast_format": str(FORMAT_VERSION + 1)}, None])
def test_unknown_tensor_format_is_refused(folder: Path, metadata: dict[str, str] | None) -> None:
    file = folder / "composed" / "model.safetensors"
    save_file(load_file(file), file, metadata=metadata)
    with pytest.raises(ValueError, match="tensors of format 1 to"):
        ComposedForCausalLM.from_pretrained(folder / "composed")


def test_missing_tensors_are_refused(folder: Path) -> None:
    file = folder / "composed" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("connections.1.q_proj.weight")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match="missing connections.1.q_proj.weight"):
        ComposedForCausalLM.from_pretrained(folder / "composed")


def test_wrong_or_missing_parts_are_refused(folder: Path) -> None:
    where, load = folder / "composed", ComposedForCausalLM.from_pretrained
    llama, gpt2 = FAMILIES["llama"].model(0), FAMILIES["gpt2"].model(1, width=24, depth=4)
    with pytest.raises(
        ValueError, match=r"`anchor` must be a model with \(family, layers, width\) \('llama', 3, 32\) as saved"
    ):
        load(where, anchor=FAMILIES["llama"].model(0, width=48))
    with pytest.raises(ValueError, match="`augmenters` must be .*'gpt2', 4, 24.*got.*'llama'"):
        load(where, augmenters=llama)
    with pytest.raises(ValueError, match="`augmenters` must be 1 models, got 2"):
        load(where, augmenters=[gpt2, gpt2])
    with pytest.raises(ValueError, match="`anchor` must be the model that .*'llama', a folder that does not"):
        load(where, anchor="llama")
    with pytest.raises(ValueError, match="`anchor` must be a loaded transformers model or its path, got Linear"):
        load(where, anchor=torch.nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["models/composed", "composed", "./composed", "a/b/c"])
def test_a_composition_that_is_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"`pretrained_model_name_or_path` must be .*'{name}', a folder that does not exist"
    ):
        ComposedForCausalLM.from_pretrained(name)
    Path(name).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"`pretrained_model_name_or_path` must be .*'{name}', a folder without config.json"
    ):
        ComposedForCausalLM.from_pretrained(name)


def test_files_and_parts_that_are_not_there_are_named(folder: Path) -> None:
    (folder / "augmenter").rename(folder / "moved")
    with pytest.raises(
        ValueError, match="`augmenters` must be .*pass the loaded.*augmenter', a folder that does not exist"
    ):
        ComposedForCausalLM.from_pretrained(folder / "composed")
    (folder / "composed" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` must be .* model.safetensors"):
        ComposedForCausalLM.from_pretrained(folder / "composed")


def test_a_name_of_the_hub_is_still_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OWNER/NAME, which is not a folder here, is read from the cache of the hub."""
    revision = "0" * 40
    kept = tmp_path / "cache" / "models--owner--anchor"
    shutil.copytree(folder / "anchor", kept / "snapshots" / revision)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(revision)
    monkeypatch.chdir(tmp_path)
    composed = compose(
        "owner/anchor", folder / "augmenter", "uniform:1", model_kwargs={"cache_dir": str(tmp_path / "cache")}
    )
    assert composed.config.anchor_path == "owner/anchor"


def test_models_without_a_path_must_be_passed(tmp_path: Path) -> None:
    anchor, augmenter = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    composed = randomize(compose(anchor, augmenter, "uniform:2"))
    composed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`anchor` must be passed as a loaded model, .* without a path, got None"):
        ComposedForCausalLM.from_pretrained(tmp_path, augmenters=augmenter)
    loaded = ComposedForCausalLM.from_pretrained(tmp_path, anchor=anchor, augmenters=[augmenter])
    assert torch.equal(logits(loaded), logits(composed))
    with pytest.raises(ValueError, match="push_to_hub"):
        composed.save_pretrained(tmp_path, push_to_hub=True)


def test_from_config_builds_random_parts(folder: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "composed"))
    assert isinstance(model, ComposedForCausalLM) and logits(model).shape == (2, 9, 97)


def test_a_file_in_the_place_of_the_folder_is_named(folder: Path) -> None:
    model = rebuilt(folder)
    (folder / "file").write_text("x")
    base = add_dual_lora(AutoModelForCausalLM.from_pretrained(folder / "anchor"))
    savers = {
        "save_directory": model.save_pretrained,
        "directory": lambda place: cache_augmenter_states(model, [{"input_ids": [3, 4]}], place),
        "folder": lambda place: save_dual_lora(base, place),
        "folder'": lambda place: save_lora_adapter(base, place, "pos"),
    }
    for name, save in savers.items():
        argument = name.rstrip("'")
        for place in (folder / "file", folder / "file" / "under"):
            with pytest.raises(ValueError, match=f"`{argument}` must be a folder, got .*file is a file"):
                save(place)
        with pytest.raises(TypeError, match=f"`{argument}` must be the path of a folder, got"):
            save(None)
    assert (folder / "file").read_text() == "x"
