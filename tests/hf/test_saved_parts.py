"""References of a saved composition: a part that is not what its reference leads to is refused, by name."""

from __future__ import annotations

import os
import shutil
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, randomize
from saved import PAIRS, SETTINGS, config_of, edit_config, logits, rebuilt
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM

from calm_fast import add_dual_lora
from calm_fast.hf import ComposedForCausalLM, compose

LOAD = ComposedForCausalLM.from_pretrained


def lora(part: Any) -> None:
    target = r".*\.(q_proj|c_attn)"
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=target, init_lora_weights=False), part)


def dual_lora(part: Any) -> None:
    add_dual_lora(part, ["q_proj"] if part.config.model_type == "llama" else ["c_attn"])


def weight_norm(part: Any) -> None:
    parametrizations.weight_norm(part.get_input_embeddings())


def resized(part: Any) -> None:
    part.resize_token_embeddings(128, mean_resizing=False)


def trained(part: Any) -> None:
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1.02)


CHANGES = [lora, dual_lora, weight_norm, resized, trained]


@pytest.mark.seam(
    attach="an adapter, parametrization, resized embedding or trained weight in a part, then `save_pretrained`",
    to="composition",
    result="refused",
    why="save the part itself first; or save with `check_parts=False` and pass this part when loading",
)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["anchor", "augmenters"])
def test_a_part_changed_before_composing_is_refused(name: str, change: Any, folder: Path) -> None:
    parts = [AutoModelForCausalLM.from_pretrained(folder / f) for f in ("anchor", "augmenter")]
    change(parts[name == "augmenters"])
    model = randomize(compose(parts[0], parts[1], PAIRS, vocab_size=97, **SETTINGS))
    with pytest.raises(ValueError, match=f"save_pretrained: `{name}` must be as it can be loaded from .*check_parts"):
        model.save_pretrained(folder / "again")
    model.save_pretrained(folder / "again", check_parts=False)
    again = LOAD(folder / "again", anchor=parts[0], augmenters=parts[1])
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=f"from_pretrained: `{name}` must be the model with which .* saved"):
        LOAD(folder / "again")


@pytest.mark.parametrize("change", [lora, dual_lora, trained])
@pytest.mark.parametrize("name", ["anchor", "augmenters"])
def test_a_part_changed_after_composing_is_refused(name: str, change: Any, folder: Path) -> None:
    model = rebuilt(folder)
    change(model.anchor if name == "anchor" else model.augmenters[0])
    with pytest.raises(ValueError, match=f"save_pretrained: `{name}` must be as it can be loaded from"):
        model.save_pretrained(folder / "again")


def test_a_part_quantised_while_loading_is_refused(folder: Path) -> None:
    """A stand-in for transformers' quantisers, none of which runs on a CPU without a package of its own."""
    model = rebuilt(folder)
    model.anchor.hf_quantizer = types.SimpleNamespace(pre_quantized=False)
    with pytest.raises(ValueError, match="`anchor` must be as it can be loaded from .* was quantised while"):
        model.save_pretrained(folder / "again")


def test_a_part_without_a_path_is_saved_as_it_was_composed(tmp_path: Path) -> None:
    anchor, augmenter = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    lora(anchor)
    model = randomize(compose(anchor, augmenter, "uniform:2"))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LOAD(tmp_path, anchor=anchor, augmenters=augmenter)), logits(model))
    with pytest.raises(ValueError, match="`anchor` must be the model with which .*8 of 41 parameters|are missing"):
        LOAD(tmp_path, anchor=FAMILIES["llama"].model(0), augmenters=augmenter)
    trained(anchor)
    with pytest.raises(ValueError, match="`anchor` must be as it was when it was composed"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["anchor", "augmenter"])
def test_weights_exchanged_under_a_path_are_refused(name: str, folder: Path) -> None:
    family, sizes = (FAMILIES["llama"], {}) if name == "anchor" else (FAMILIES["gpt2"], {"width": 24, "depth": 4})
    other = family.model(5, **sizes)
    other.save_pretrained(folder / name)
    argument = name.replace("augmenter", "augmenters")
    with pytest.raises(
        ValueError, match=f"`{argument}` must be the model with which .* other values.*check_parts=False"
    ):
        LOAD(folder / "composed")
    with pytest.raises(ValueError, match=f"`{argument}` must be the model with which"):
        LOAD(folder / "composed", **{argument: other})
    accepted = LOAD(folder / "composed", check_parts=False)
    part = accepted.anchor if name == "anchor" else accepted.augmenters[0]
    assert torch.equal(part.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_part_in_another_dtype_is_the_same_model(dtype: torch.dtype, folder: Path) -> None:
    assert LOAD(folder / "composed", dtype=dtype).anchor.dtype == dtype
    rebuilt(folder, model_kwargs={"dtype": dtype}).save_pretrained(folder / "again")
    for back in (torch.float32, torch.bfloat16, torch.float16):
        assert LOAD(folder / "again", dtype=back).augmenters[0].dtype == back


def test_an_offloaded_part_is_taken_as_far_as_it_can_be_read(folder: Path) -> None:
    layers = {f"model.layers.{i}": "disk" if i == 2 else "cpu" for i in range(3)}
    where = layers | {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    settings = {"device_map": where, "offload_folder": str(folder / "offloaded")}
    anchor = AutoModelForCausalLM.from_pretrained(folder / "anchor", **settings)
    assert torch.equal(logits(LOAD(folder / "composed", anchor=anchor)), logits(rebuilt(folder)))
    FAMILIES["llama"].model(5).save_pretrained(folder / "other")
    other = AutoModelForCausalLM.from_pretrained(folder / "other", **settings)
    with pytest.raises(ValueError, match="`anchor` must be the model with which"):
        LOAD(folder / "composed", anchor=other)


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_a_tree_that_is_moved_as_a_whole_still_loads(place: str, folder: Path, tmp_path_factory: Any) -> None:
    expected = logits(rebuilt(folder))
    if place == "inside":
        for name in ("anchor", "augmenter"):
            shutil.move(folder / name, folder / "composed" / name)
        composed = folder / "composed"
        parts = {"anchor": composed / "anchor", "augmenters": composed / "augmenter"}
        LOAD(composed, **parts).save_pretrained(composed)
        assert config_of(folder)["anchor_path"] == "./anchor"
    moved = tmp_path_factory.mktemp("elsewhere") / "tree"
    shutil.move(folder, moved)
    model = LOAD(moved / "composed")
    assert torch.equal(logits(model), expected)
    assert model.config.anchor_path.startswith(str(moved))


def test_a_part_elsewhere_is_referred_to_by_its_real_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "deep").mkdir(parents=True)
    shutil.move(folder / "anchor", tmp_path / "models" / "deep" / "anchor")
    os.symlink(tmp_path / "models" / "deep", tmp_path / "link")
    monkeypatch.chdir(tmp_path / "models")
    for path in ("deep/../deep/anchor", "../link/anchor", "../link/../deep/anchor"):
        composed = randomize(compose(path, folder / "augmenter", PAIRS, **SETTINGS))
        composed.save_pretrained(folder / "composed")
        assert config_of(folder)["anchor_path"] == str(tmp_path / "models" / "deep" / "anchor")
    monkeypatch.chdir("/")
    assert torch.equal(logits(LOAD(folder / "composed")), logits(composed))


def test_a_moved_part_is_named(folder: Path) -> None:
    (folder / "anchor").rename(folder / "moved")
    with pytest.raises(ValueError, match="`anchor` must be .*pass the loaded.*anchor', a folder that does not exist"):
        LOAD(folder / "composed")
    model = LOAD(folder / "composed", anchor=folder / "moved")
    model.save_pretrained(folder / "composed")
    assert config_of(folder)["anchor_path"] == "../moved"


def test_a_part_is_never_overwritten(folder: Path) -> None:
    model = rebuilt(folder)
    for name in ("anchor", "augmenter"):
        with pytest.raises(ValueError, match=f"`save_directory` must be a folder of the composition's own.*{name}"):
            model.save_pretrained(folder / name)


def on_hub(folder: Path, cache: Path, name: str, revision: str) -> None:
    kept = cache / f"models--owner--{name}"
    shutil.copytree(folder, kept / "snapshots" / revision)
    (kept / "refs").mkdir(exist_ok=True)
    (kept / "refs" / "main").write_text(revision)


def test_each_part_is_referred_to_by_its_own_commit(folder: Path, tmp_path: Path) -> None:
    """The branch moves on after saving, and the composition keeps its models."""
    cache, first, second, third = tmp_path / "cache", "1" * 40, "2" * 40, "3" * 40
    on_hub(folder / "anchor", cache, "anchor", first)
    on_hub(folder / "augmenter", cache, "augmenter", second)
    kwargs = {"cache_dir": str(cache)}
    model = randomize(compose("owner/anchor", "owner/augmenter", PAIRS, model_kwargs=kwargs, **SETTINGS))
    assert (model.config.anchor_revision, model.config.augmenter_revisions) == (first, [second])
    model.save_pretrained(tmp_path / "hub")
    FAMILIES["llama"].model(5).save_pretrained(tmp_path / "new")
    on_hub(tmp_path / "new", cache, "anchor", third)
    again = LOAD(tmp_path / "hub", **kwargs)
    assert torch.equal(logits(again), logits(model)) and again.config.anchor_revision == first
    mixed = compose("owner/anchor", again.anchor, "uniform:1", model_kwargs=kwargs | {"revision": first})
    assert mixed.config.anchor_revision == first


def test_a_broken_fingerprint_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="must be a fingerprint, got 'full:broken'"):
        LOAD(edit_config(folder, anchor_fingerprint="full:broken"))
    assert torch.equal(logits(LOAD(edit_config(folder, anchor_fingerprint=""))), logits(rebuilt(folder)))
