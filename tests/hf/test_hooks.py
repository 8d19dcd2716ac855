"""The hooks of a composition: how long they live, what copies get, and layers that run several times or never."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, composed_model, prompts, randomize, switch
from torch import nn
from transformers import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from calm_fast.hf import compose


def hooks(model: nn.Module) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.model.layers)


@pytest.mark.seam(attach="`copy.copy`", to="composition", result="works", why="copies share the hooks")
def test_a_shallow_copy_outlives_the_original() -> None:
    model, ids = composed_model("llama"), prompts()
    expected, anchor = model(ids).logits, model.anchor
    twin = copy.copy(model)
    del model
    gc.collect()
    assert torch.equal(twin(ids).logits, expected)
    del twin
    gc.collect()
    assert hooks(anchor) == 0


@pytest.mark.seam(
    attach="`copy.deepcopy`", to="composition", result="works", why="the copy has parts and hooks of its own"
)
def test_the_hooks_of_a_deep_copy_go_with_it() -> None:
    model, ids = composed_model("llama"), prompts()
    expected, count = model(ids).logits, hooks(model.anchor)
    twin = copy.deepcopy(model)
    anchor = twin.anchor
    assert hooks(anchor) == count
    del twin
    gc.collect()
    assert hooks(anchor) == 0 and hooks(model.anchor) == count
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.seam(
    attach="`torch.save` of the whole model", to="composition", result="works", why="`save_pretrained` writes less"
)
def test_a_pickled_composition_is_one_of_its_own() -> None:
    model, ids = composed_model("llama"), prompts()
    switch(model, "enable")()
    expected, file = model(ids).logits, io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    anchor = loaded.anchor
    assert torch.equal(loaded(ids).logits, expected) and not torch.equal(anchor(ids).logits, expected)
    loaded.train()(ids, labels=ids).loss.backward()
    assert model.connections[0].o_proj.weight.grad is None
    del loaded
    gc.collect()
    assert hooks(anchor) == 0


@pytest.mark.parametrize("part", ["anchor", "augmenter"])
def test_one_module_at_two_places_is_refused(part: str) -> None:
    anchor, augmenter = FAMILIES["llama"].model(0), FAMILIES["llama"].model(1)
    layers = {"anchor": anchor, "augmenter": augmenter}[part].model.layers
    layers[2] = layers[0]
    with pytest.raises(
        ValueError, match=rf"compose: `connections` .* LlamaDecoderLayer is layers \[0, 2\] of the {part}"
    ):
        compose(anchor, augmenter, [(-1, 1), (2, 2)])
    assert hooks(anchor) == hooks(augmenter) == 0
    compose(anchor, augmenter, [(1, 1)])(prompts())  # the layers between run once


@pytest.mark.parametrize("part", ["the anchor", "augmenter 0"])
@pytest.mark.seam(
    attach="a layer that runs several times per forward",
    to="composition",
    result="refused",
    why="connect a layer that runs once",
)
def test_a_layer_that_runs_twice_is_refused(part: str) -> None:
    model = composed_model("llama", [(0, 0)])
    body = model.anchor.model if part == "the anchor" else model.augmenters[0].model
    layer = body.layers[0]
    body.register_forward_pre_hook(lambda module, args, kwargs: module.__dict__.update(looped=False), with_kwargs=True)

    def again(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not body.looped:
            body.looped = True
            return module(output, *args[1:], **kwargs)
        return None

    layer.register_forward_hook(again, with_kwargs=True)
    with pytest.raises(
        ValueError, match=f"`connections` must be of layers that run once .* LlamaDecoderLayer of {part}"
    ):
        model(prompts(), use_cache=False)


def mllama() -> nn.Module:
    """Return a model whose layer 2 runs only with an image."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [2]}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return MllamaForCausalLM(MllamaTextConfig(**sizes, **heads, **ids)).eval()


@pytest.mark.seam(
    attach="a layer that does not run (Mllama's cross-attention without an image)",
    to="composition",
    result="refused",
    why="connect a layer that runs in every forward",
)
@pytest.mark.parametrize("role", ["anchor", "augmenter 0"])
def test_a_connected_layer_that_does_not_run_is_refused(role: str) -> None:
    llama, skipping, ids = FAMILIES["llama"].model(0), mllama(), prompts()
    parts = (skipping, llama) if role == "anchor" else (llama, skipping)
    message = (
        rf"`connections` .* \(2, 2\), but layer 2 of (the )?{role}, a MllamaCrossAttentionDecoderLayer, did not run"
    )
    with pytest.raises(ValueError, match="compose: " + message):
        compose(*parts, [(0, 1), (2, 2)], vocab_size=VOCAB)
    model = compose(*parts, [(0, 1), (2, 2)], vocab_size=VOCAB, probe=False)
    for mode in (True, False):
        with pytest.raises(ValueError, match=message):
            model.train(mode)(ids)
    randomize(compose(*parts, [(0, 1), (1, 0)], vocab_size=VOCAB))(ids)  # layers that run can be connected
