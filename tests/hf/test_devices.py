"""Parts that accelerate offloads or dispatches, and compositions on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from families import FAMILIES, composed_model, prompts, randomize

from calm_fast.hf import ComposedForCausalLM, compose

PAIRS = [(-1, -1), (0, 1), (2, 2)]


def offload(model: Any, how: str, folder: Path) -> Any:
    """Offload all of `model` ("cpu", "disk"), or some layers as a device_map with "disk" does."""
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        disk_offload(model, str(folder), execution_device="cpu")
    else:
        places = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        places |= {"model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
        dispatch_model(model, places, offload_dir=str(folder), main_device="cpu")
    return model


@pytest.mark.seam(
    attach="parts offloaded by accelerate (cpu, disk, device_map)",
    to="composition",
    result="works",
    why="a connection lies where accelerate runs its layer",
)
@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
@pytest.mark.parametrize("offloaded", ["anchor", "augmenter", "both"])
def test_offloaded_parts_give_the_results_of_parts_in_memory(how: str, offloaded: str, tmp_path: Path) -> None:
    plain, ids = composed_model("llama", PAIRS), prompts()
    plain.save_pretrained(tmp_path / "composition")
    anchor, augmenter = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    if offloaded != "augmenter":
        offload(anchor, how, tmp_path / "a")
    if offloaded != "anchor":
        offload(augmenter, how, tmp_path / "b")
    loaded = ComposedForCausalLM.from_pretrained(tmp_path / "composition", anchor=anchor, augmenters=augmenter)
    for model in (loaded, randomize(compose(anchor, augmenter, PAIRS))):
        assert {p.device.type for p in model.connections.parameters()} == {"cpu"}
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain(ids).logits)
        gradients = [
            torch.autograd.grad(each.train()(ids, labels=ids).loss, list(each.connections.parameters()))
            for each in (model, plain)
        ]
        plain.eval()
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.seam(
    attach="`model.to` with offloaded parts",
    to="composition",
    result="refused",
    why="torch cannot copy what is offloaded; move the parts before they are dispatched",
)
def test_a_composition_with_offloaded_parts_cannot_be_moved(tmp_path: Path) -> None:
    model = compose(offload(FAMILIES["llama"].model(0), "disk", tmp_path), FAMILIES["llama"].model(1), PAIRS)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor|offloaded"):
        model.to("cpu")


@pytest.mark.seam(
    attach="the meta device (shape inference)",
    to="composition",
    result="works",
    why="the logits are on the meta device and have no values",
)
@torch.no_grad()
def test_a_composition_on_the_meta_device_infers_shapes() -> None:
    moved, ids = composed_model("llama", PAIRS), prompts()
    assert moved.to("meta")(ids).logits.shape == (2, 9, 97)
    with torch.device("meta"):
        made = compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), PAIRS)
    for given in (ids, ids.to("meta")):
        logits = made(given, use_cache=True).logits
        assert logits.is_meta and logits.shape == (2, 9, 97)
    mixed = compose(FAMILIES["llama"].model(0).to("meta"), FAMILIES["llama"].model(1), PAIRS)
    assert not any(p.is_meta for p in mixed.connections.parameters()), "an augmenter is in memory"


def offload_composed(model: Any, how: str, folder: Path) -> Any:
    """Offload a composition after composing: all of it ("cpu", "disk"), or its parts ("device_map")."""
    if how != "device_map":
        return offload(model, how, folder)
    places = {"anchor": "disk", "augmenters": "disk", "connections": "cpu"}
    return dispatch_model(model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True)


def gradients(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.train()(ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.connections.parameters()])


@pytest.mark.seam(
    attach="accelerate's cpu_offload, disk_offload, dispatch_model after composing",
    to="composition",
    result="works",
    why="its hooks run around every module, and connections call theirs",
)
@pytest.mark.parametrize("how", ["cpu", "disk", "device_map"])
def test_an_offloaded_composition_gives_the_same_results(how: str, tmp_path: Path) -> None:
    plain, ids = composed_model("llama", PAIRS), prompts()
    model = offload_composed(composed_model("llama", PAIRS), how, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    written = [one.generate(ids, max_new_tokens=4, do_sample=False) for one in (model, plain)]
    assert torch.equal(*written)
    if how == "device_map":
        torch.testing.assert_close(gradients(model, ids), gradients(plain, ids), rtol=0, atol=0)


@pytest.mark.seam(
    attach="accelerate's cpu_offload, disk_offload after composing, and training",
    to="composition",
    result="refused",
    why="the gradients of offloaded connections would be lost",
)
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_connections_do_not_train(how: str, tmp_path: Path) -> None:
    model = offload_composed(composed_model("llama", PAIRS), how, tmp_path / "off")
    with pytest.raises(
        ValueError, match=r"ComposedForCausalLM.train: `connections` must be on a device .* dispatch_model"
    ):
        model.train()
    with pytest.raises(ValueError, match="save_pretrained: `connections` .* meta.*remove_hook_from_module"):
        model.save_pretrained(tmp_path / "saved", check_parts=False)
    remove_hook_from_module(model, recurse=True)
    plain, ids = composed_model("llama", PAIRS), prompts()
    torch.testing.assert_close(gradients(model, ids), gradients(plain, ids), rtol=0, atol=0)
    offload_composed(model, how, tmp_path / "again")
    with pytest.raises(ValueError, match="ComposedForCausalLM: `connections` must be on a device"):
        model(ids, labels=ids)


def test_a_device_map_of_the_composition_is_refused(tmp_path: Path) -> None:
    for name, seed in (("anchor", 0), ("augmenter", 1)):
        FAMILIES["llama"].model(seed).save_pretrained(tmp_path / name)
    compose(tmp_path / "anchor", tmp_path / "augmenter", PAIRS).save_pretrained(tmp_path / "composition")
    places = {"anchor": "cpu", "augmenters": "cpu", "connections": "cpu"}
    with pytest.raises(ValueError, match="from_pretrained: `device_map` must be a map of the modules of a part"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composition", device_map=places)
    with pytest.raises(ValueError, match="compose: `model_kwargs` must be a map of the modules of a part"):
        compose(tmp_path / "anchor", tmp_path / "augmenter", PAIRS, model_kwargs={"device_map": places})
