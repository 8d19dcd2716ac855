"""Arguments of from_pretrained and save_pretrained: each one takes effect or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from saved import logits, rebuilt
from transformers import AutoModelForCausalLM, GenerationConfig

from calm_fast.hf import ComposedConfig, ComposedForCausalLM

LOADERS = (ComposedForCausalLM, AutoModelForCausalLM)


@pytest.mark.parametrize("kind", [str, Path])
def test_parts_may_be_given_as_paths(kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(rebuilt(folder))
    for name in ("anchor", "augmenter"):
        (folder / name).rename(folder / f"moved_{name}")
    monkeypatch.chdir(folder)
    model = ComposedForCausalLM.from_pretrained(
        "composed", anchor=kind("moved_anchor"), augmenters=kind("moved_augmenter")
    )
    assert torch.equal(logits(model), expected) and model.config.anchor_path == str(folder / "moved_anchor")
    model = ComposedForCausalLM.from_pretrained(
        "composed", anchor_path=str(folder / "moved_anchor"), augmenter_paths=["../moved_augmenter"]
    )
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("loader", LOADERS)
def test_settings_of_the_config_go_to_the_composition(loader: Any, folder: Path) -> None:
    model = loader.from_pretrained(folder / "composed", use_cache=False)
    assert isinstance(model, ComposedForCausalLM) and not model.config.use_cache and model.anchor.config.use_cache
    assert loader.from_pretrained(folder / "composed").config.use_cache


@pytest.mark.parametrize("loader", LOADERS)
def test_other_arguments_go_to_the_parts(loader: Any, folder: Path) -> None:
    model = loader.from_pretrained(
        folder / "composed",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        device_map="cpu",
        trust_remote_code=False,
        output_hidden_states=True,
    )
    for part in (model.anchor, model.augmenters[0]):
        assert part.dtype == torch.bfloat16 and part.config._attn_implementation == "eager"
    assert {p.dtype for p in model.connections.parameters()} == {torch.float32}
    assert len(model(torch.tensor([[3, 4]])).hidden_states) == 4


@pytest.mark.parametrize("loader", LOADERS)
def test_a_field_of_the_saved_tensors_cannot_be_overridden(loader: Any, folder: Path) -> None:
    for name, value in (("connections", [[(0, 0)]]), ("cross_attention", {}), ("composition_dtype", "bfloat16")):
        with pytest.raises(ValueError, match=f"from_pretrained: `{name}` must be as it was saved"):
            loader.from_pretrained(folder / "composed", **{name: value})


@pytest.mark.parametrize("loader", LOADERS)
def test_an_unknown_argument_raises(loader: Any, folder: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="anhcor"):
        loader.from_pretrained(folder / "composed", anhcor="x")


def test_an_argument_for_parts_that_are_loaded_already_raises(folder: Path) -> None:
    source = rebuilt(folder)
    parts = {"anchor": source.anchor, "augmenters": AutoModelForCausalLM.from_pretrained(folder / "augmenter")}
    for name, value in (("dtype", torch.bfloat16), ("device_map", "cpu"), ("anhcor", "x")):
        with pytest.raises(ValueError, match=f"`{name}` must be left out, .* all parts are loaded models"):
            ComposedForCausalLM.from_pretrained(folder / "composed", **parts, **{name: value})
    settings = {"local_files_only": True, "trust_remote_code": True, "use_cache": False}
    assert not ComposedForCausalLM.from_pretrained(folder / "composed", **parts, **settings).config.use_cache


@pytest.mark.parametrize("loader", LOADERS)
def test_loading_info_has_transformers_form(loader: Any, folder: Path) -> None:
    model, info = loader.from_pretrained(folder / "composed", output_loading_info=True)
    _, plain = AutoModelForCausalLM.from_pretrained(folder / "anchor", output_loading_info=True)
    assert torch.equal(logits(model), logits(rebuilt(folder)))
    assert info == plain == {k: type(v)() for k, v in plain.items()}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_state_dict_replaces_the_file(loader: Any, folder: Path) -> None:
    other = rebuilt(folder)
    with torch.no_grad():
        for parameter in other.connections.parameters():
            parameter.mul_(2)
    for state in (
        other.state_dict(),
        {f"module.connections.{n}": t for n, t in other.connections.state_dict().items()},
    ):
        model = loader.from_pretrained(folder / "composed", state_dict=state)
        assert torch.equal(logits(model), logits(other))


def test_a_config_may_be_given(folder: Path) -> None:
    config = ComposedConfig.from_pretrained(folder / "composed")
    for given in (config, folder / "composed", str(folder / "composed")):
        model = ComposedForCausalLM.from_pretrained(folder / "composed", config=given, use_cache=False)
        assert torch.equal(logits(model), logits(rebuilt(folder))) and not model.config.use_cache
    assert config.use_cache and config.anchor_path == "../anchor", "the given config stays as it is"
    generation = GenerationConfig(max_new_tokens=2)
    model = ComposedForCausalLM.from_pretrained(folder / "composed", generation_config=generation)
    assert model.generation_config.max_new_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"safe_serialization": False}, "`safe_serialization` must be True, got False. A composition is one file"),
        ({"max_shard_size": "1KB"}, "`max_shard_size` must be at least the size of the composition tensors, [0-9]+"),
        ({"variant": "fp16"}, "`variant` must be None, got 'fp16'"),
        ({"distributed_checkpoint": True}, "`distributed_checkpoint` must be False, got True"),
        ({"push_to_hub": True}, "`push_to_hub` must be False, got True. Save, then call push_to_hub"),
    ],
)
def test_what_saving_cannot_honour_is_refused(arguments: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rebuilt(folder).save_pretrained(folder / "again", **arguments)
    assert not (folder / "again").exists()


def test_unknown_arguments_of_saving_raise(folder: Path) -> None:
    model = rebuilt(folder)
    with pytest.raises(TypeError, match="unexpected argument `max_shard_sise`"):
        model.save_pretrained(folder / "again", max_shard_sise="1GB")
    with pytest.raises(TypeError, match="`max_shard_size` must be a number of bytes, or a text like '5GB'"):
        model.save_pretrained(folder / "again", max_shard_size="big")
    model.save_pretrained(
        folder / "again", max_shard_size="5GB", safe_serialization=True, save_peft_format=False, token="t", variant=None
    )
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "again")), logits(model))


def test_push_to_hub_asks_for_parts_on_the_hub(folder: Path) -> None:
    with pytest.raises(ValueError, match="push_to_hub: `anchor` must be a model on the hub, .* Upload that model"):
        rebuilt(folder).push_to_hub("owner/composition")
    model = rebuilt(folder)
    model.config.anchor_path = "owner/anchor"
    with pytest.raises(ValueError, match=r"`augmenters\[0\]` must be a model on the hub"):
        model.push_to_hub("owner/composition")


def test_a_part_of_another_family_is_named_before_it_is_composed(folder: Path) -> None:
    FAMILIES["mistral"].model(0).save_pretrained(folder / "other")
    with pytest.raises(ValueError, match=r"`anchor` must be a model with \(family, layers, width\) \('llama', 3, 32\)"):
        ComposedForCausalLM.from_pretrained(folder / "composed", anchor=folder / "other")
