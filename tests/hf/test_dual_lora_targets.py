"""The layers that add_dual_lora adapts by default, and those that cannot carry dual LoRA."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, prompts
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GitConfig,
    GitForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from calm_fast import add_dual_lora, remove_dual_lora
from calm_fast.hf.dual_lora import dual_lora_layers
from calm_fast.hf.dual_lora_targets import default_targets

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def family(name: str) -> Any:
    return (FAMILIES | OTHERS)[name].model(0)


DEFAULTS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "mpt": ("Wqkv",),
    "ctrl": ("Wq", "Wv"),
    "mamba": ("in_proj",),
    "rwkv": ("attention.key", "receptance"),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_family_has_default_targets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = family(name), prompts()
    assert default_targets(model) == DEFAULTS[name]
    before = model(ids).logits
    add_dual_lora(model, rank=2, gate_dim=4, value_dim=4)
    found = {path.rpartition(".")[2] for path in dual_lora_layers(model)}
    assert found == {target.rpartition(".")[2] for target in DEFAULTS[name]}
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    model(ids, use_cache=False).logits.square().mean().backward()
    # every layer takes part: nothing reads the weight and passes the LoRA by
    assert all(layer.lora_a_pos.grad is not None for layer in dual_lora_layers(model).values())
    remove_dual_lora(model)
    monkeypatch.setitem(sys.modules, "peft.utils", None)  # as where PEFT is not installed
    assert default_targets(model) == DEFAULTS[name]


def test_an_encoder_has_default_targets() -> None:
    assert default_targets(BertLMHeadModel(BertConfig(**SIZES))) == ("query", "value")


def test_defaults_are_layers_that_text_passes_through() -> None:
    """GIT's vision tower has q_proj and v_proj, its decoder has not: those adapters would never train on text."""
    sizes = SIZES | {"num_hidden_layers": 1}
    model = GitForCausalLM(GitConfig(**sizes, vision_config={**sizes, "image_size": 32, "patch_size": 16}))
    assert default_targets(model) == ("query", "value")
    add_dual_lora(model, rank=2, gate_dim=4, value_dim=4)
    model(input_ids=prompts()).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_unknown_names_are_refused_with_the_names_that_there_are() -> None:
    model = torch.nn.Sequential()
    model.add_module("body", torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4), "down": torch.nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match="`target_modules` must be given for Sequential, .* are up, down"):
        add_dual_lora(model)


@pytest.mark.parametrize("target", ["dt_proj", "out_proj"])
def test_a_layer_that_the_model_does_not_call_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=f"{target}, whose weight MambaMixer reads .* LoRA would be passed by"):
        add_dual_lora(family("mamba"), (target,))


class _Fused(torch.nn.Module):
    """Computes with the weight of a layer two modules below."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.mlp.up.weight.T


def test_a_layer_deeper_down_whose_weight_is_read_is_refused() -> None:
    with pytest.raises(ValueError, match="0.mlp.up, whose weight _Fused reads without calling the layer"):
        add_dual_lora(torch.nn.Sequential(_Fused()), ("up",))


def test_all_linear_leaves_out_layers_that_the_model_does_not_call() -> None:
    model = add_dual_lora(family("mamba"), "all-linear", rank=2, gate_dim=4, value_dim=4)
    assert {path.rpartition(".")[2] for path in dual_lora_layers(model)} == {"in_proj"}


def test_a_layer_whose_dtype_the_model_reads_works() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = prompts()
    before = model(input_ids=ids, labels=ids).logits
    add_dual_lora(model, ("wo",), rank=2, gate_dim=4, value_dim=4)
    layer = next(iter(dual_lora_layers(model).values()))
    assert layer.weight is layer.base.weight and layer.bias is None
    torch.testing.assert_close(model(input_ids=ids, labels=ids).logits, before, rtol=0, atol=1e-5)
