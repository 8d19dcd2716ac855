"""Parts that accelerate offloads or dispatches, and compositions on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
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
