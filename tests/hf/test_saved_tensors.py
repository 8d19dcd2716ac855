"""The tensors' file of a composition: from any wrapper, exactly its own tensors, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from saved import config_of, logits, rebuilt
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM

from calm_fast.hf import ComposedForCausalLM

WRAPPERS = {
    "DDP": "module.{}",
    "torch.compile": "_orig_mod.{}",
    "both": "_orig_mod.module.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
    "PEFT": "base_model.model.{}",
    "PEFT in DDP": "module.base_model.model.{}",
}


def inside(name: str) -> str:
    """Return the name of a connection's tensor when the connection itself is compiled."""
    head, index, rest = name.split(".", 2)
    return f"{head}.{index}._orig_mod.{rest}"


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_lose_their_wrappers(wrapper: str, folder: Path) -> None:
    model = rebuilt(folder)
    state = {WRAPPERS[wrapper].format(name): t for name, t in model.state_dict().items()}
    model.save_pretrained(folder / "again", state_dict=state)
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "again")), logits(model))


def test_names_lose_wrappers_inside_too(folder: Path) -> None:
    model = rebuilt(folder)
    state = {inside(name): t for name, t in model.state_dict().items() if name.startswith("connections.")}
    model.save_pretrained(folder / "again", state_dict=state)
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "again")), logits(model))


def whole(model: Any) -> Any:
    return torch.compile(model)


def in_place(model: Any) -> Any:
    model.compile()
    return model


def connection(model: Any) -> Any:
    model.connections[0] = torch.compile(model.connections[0])
    return model


@pytest.mark.seam(
    attach="`torch.compile` of the whole model or a connection, then `save_pretrained`",
    to="composition",
    result="works",
    why="saving and loading drop the wrappers from the names",
)
@pytest.mark.parametrize("compiled", [whole, in_place, connection])
def test_a_compiled_composition_is_saved(compiled: Any, folder: Path) -> None:
    model = rebuilt(folder)
    expected = logits(model)
    compiled(model).save_pretrained(folder / "again")
    assert set(load_file(folder / "again" / "model.safetensors")) == set(
        load_file(folder / "composed" / "model.safetensors")
    )
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "again")), expected)
    for parameter in model.connections.parameters():
        parameter.data.zero_()
    model.load_composition(str(folder / "again" / "model.safetensors"))
    saved = load_file(folder / "again" / "model.safetensors")["connections.0.q_proj.weight"]
    assert torch.equal(next(p for n, p in model.connections[0].named_parameters() if "q_proj.weight" in n), saved)


def without_one(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if name != "connections.1.o_proj.weight"}


def with_another(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"value_head.weight": torch.zeros(2)}


def with_another_shape(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"connections.1.o_proj.weight": torch.zeros(2, 2)}


def under_another_name(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"policy.{name}": t for name, t in state.items()}


def on_meta(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.to("meta") for name, t in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "missing connections.0"),
        (without_one, "missing connections.1.o_proj.weight"),
        (with_another, "unknown value_head.weight"),
        (with_another_shape, r"connections.1.o_proj.weight of shape \(32, 24\), got \(2, 2\)"),
        (under_another_name, "missing connections.0.* unknown policy.anchor"),
        (on_meta, "as a plain tensor that holds data, got a Tensor on meta"),
    ],
)
def test_a_file_that_could_not_be_loaded_is_not_written(change: Any, message: str, folder: Path) -> None:
    model = rebuilt(folder)
    with pytest.raises(ValueError, match=f"save_pretrained: `state_dict` must be .*{message}"):
        model.save_pretrained(folder / "again", state_dict=change(model.state_dict()))
    assert not (folder / "again").exists()
    with pytest.raises(ValueError, match="from_pretrained: `state_dict` must be"):
        ComposedForCausalLM.from_pretrained(folder / "composed", state_dict=change(model.state_dict()))


def lora(model: Any) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=r"connections\..*\.q_proj"), model)


def trained_module(model: Any) -> None:
    config = peft.LoraConfig(target_modules=r"connections\..*\.q_proj", modules_to_save=["o_proj"])
    peft.get_peft_model(model, config)


def weight_norm(model: Any) -> None:
    parametrizations.weight_norm(model.connections[0].q_proj)


@pytest.mark.seam(attach="PEFT adapters or parametrizations on the connections, then `save_pretrained`",
                  to="composition", result="refused",
                  why="merge them, or save the adapter alone with `PeftModel.save_pretrained`")  # fmt: skip
@pytest.mark.parametrize("attach", [lora, trained_module, weight_norm])
def test_adapters_in_connections_are_refused(attach: Any, folder: Path) -> None:
    model = rebuilt(folder)
    attach(model)
    with pytest.raises(ValueError, match="`connections` must be .* without adapters .*merge_and_unload"):
        model.save_pretrained(folder / "again")


@pytest.mark.seam(attach="PeftModel around a composition, then its `save_pretrained`", to="composition", result="works",
                  why="PEFT saves the adapter; after `merge_and_unload()` the composition saves itself")  # fmt: skip
def test_peft_saves_its_own_adapter(folder: Path) -> None:
    config = peft.LoraConfig(target_modules=r"connections\..*\.[qkvo]_proj", init_lora_weights=False)
    model = peft.get_peft_model(rebuilt(folder), config)
    model.save_pretrained(folder / "adapter")
    again = peft.PeftModel.from_pretrained(ComposedForCausalLM.from_pretrained(folder / "composed"), folder / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))
    merged = again.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "merged")), logits(merged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_saved_dtype_comes_back(dtype: torch.dtype, folder: Path) -> None:
    model = rebuilt(folder)
    model.connections.to(dtype)
    model.connections[0].o_proj.float()
    model.save_pretrained(folder / "again")
    loaded = ComposedForCausalLM.from_pretrained(folder / "again")
    assert {n: p.dtype for n, p in loaded.connections.named_parameters()} == {
        n: p.dtype for n, p in model.connections.named_parameters()
    }
    assert json.loads((folder / "again" / "config.json").read_text())["composition_dtype"] == str(
        max((dtype, torch.float32), key=lambda d: d.itemsize)
    ).removeprefix("torch.")
    assert loaded.anchor.dtype == torch.float32


def test_parts_come_back_in_their_dtype(folder: Path) -> None:
    model = rebuilt(folder, model_kwargs={"dtype": torch.bfloat16}, dtype=torch.float32)
    model.save_pretrained(folder / "again")
    loaded = ComposedForCausalLM.from_pretrained(folder / "again")
    assert loaded.anchor.dtype == loaded.augmenters[0].dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))
    assert ComposedForCausalLM.from_pretrained(folder / "again", dtype="float32").anchor.dtype == torch.float32


class Killed(BaseException):
    """Stands for SIGKILL, at one place."""


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_killed_process_leaves_the_old_composition_or_the_new_one(
    replaced: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ComposedForCausalLM.from_pretrained(folder / "composed")
    old = logits(model)
    model.config.use_cache = False
    model.generation_config.max_new_tokens = 3
    with torch.no_grad():
        for parameter in model.connections.parameters():
            parameter.mul_(2)
    done: list[Any] = []
    replace = os.replace

    def replace_and_die(source: Any, target: Any) -> None:
        if len(done) == replaced:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace_and_die)
        with pytest.raises(Killed):
            model.save_pretrained(folder / "composed")
    assert config_of(folder).get("use_cache", True), "config.json comes last"
    for loader in (ComposedForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained(folder / "composed")
        assert torch.equal(logits(loaded), old if replaced == 0 else logits(model))
        assert loaded.config.use_cache == (replaced == 0), "the config is that of the tensors"
        assert loaded.generation_config.max_new_tokens == (None if replaced == 0 else 3)


def test_a_full_disk_leaves_the_old_composition(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {f.name: f.read_bytes() for f in (folder / "composed").iterdir()}
    model = rebuilt(folder)
    model.connections[0].o_proj.weight.data.zero_()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calm_fast.hf.own_tensors.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder / "composed")
    assert {f.name: f.read_bytes() for f in (folder / "composed").iterdir()} == before


def test_a_config_of_another_composition_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """config.json and model.safetensors of two compositions with equal shapes, in one folder."""
    model = rebuilt(folder)
    other = ComposedForCausalLM.from_pretrained(folder / "composed")
    other.config.connections = [[(3, 2), (0, 0)]]
    other.connections[0].o_proj.weight.data.zero_()
    other.save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "config.json", folder / "composed" / "config.json")
    loaded = ComposedForCausalLM.from_pretrained(folder / "composed")
    assert loaded.config.connections == model.config.connections and torch.equal(logits(loaded), logits(model))


def test_a_generation_config_is_saved_with_it(folder: Path) -> None:
    model = rebuilt(folder)
    model.generation_config.max_new_tokens = 3
    model.generation_config.pad_token_id = 7
    model.save_pretrained(folder / "again")
    loaded = ComposedForCausalLM.from_pretrained(folder / "again")
    assert (loaded.generation_config.max_new_tokens, loaded.generation_config.pad_token_id) == (3, 7)
    (folder / "again" / "generation_config.json").unlink()
    loaded = ComposedForCausalLM.from_pretrained(folder / "again")
    assert loaded.generation_config.pad_token_id == loaded.anchor.generation_config.pad_token_id


def test_linked_files_stay_links(folder: Path) -> None:
    real = folder / "elsewhere.safetensors"
    file = folder / "composed" / "model.safetensors"
    shutil.move(file, real)
    os.symlink(real, file)
    model = rebuilt(folder)
    model.connections[0].o_proj.weight.data.zero_()
    model.save_pretrained(folder / "composed")
    assert file.is_symlink() and torch.equal(
        logits(ComposedForCausalLM.from_pretrained(folder / "composed")), logits(model)
    )
    with safe_open(real, "pt") as opened:
        assert not opened.get_tensor("connections.0.o_proj.weight").any()
