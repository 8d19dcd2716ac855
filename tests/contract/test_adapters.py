"""Dual LoRA in five families: unchanged at init, PEFT adapters both ways, one training step, saved files."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES, OTHERS, prompts

from calm_fast import add_dual_lora, load_dual_lora, remove_dual_lora, save_dual_lora, save_lora_adapter
from calm_fast.hf.dual_lora import dual_lora_layers

MODELS = FAMILIES | OTHERS
# family -> the linear layers that take a LoRA
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gemma3_text": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "mamba": ("in_proj",),
}
each_family = pytest.mark.parametrize("name", TARGETS)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(prompts()).logits


def scatter(model: torch.nn.Module) -> None:
    """Move every trained factor away from its initial value."""
    torch.manual_seed(1)
    for layer in dual_lora_layers(model).values():
        for parameter in layer.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.2)


@each_family
def test_dual_lora_is_added_trained_saved_and_removed(name: str, tmp_path: Path) -> None:
    # frozen first: torch.matmul may choose another product for a weight that needs gradients (docs/numerics.md)
    model = MODELS[name].model().requires_grad_(False)
    before = logits(model)
    add_dual_lora(model, TARGETS[name], rank=3, gate_dim=4, value_dim=4)
    assert torch.equal(logits(model), before)
    model(prompts(), labels=prompts()).loss.backward()
    trained = [p for layer in dual_lora_layers(model).values() for p in layer.parameters(recurse=False)]
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)
    scatter(model)
    save_dual_lora(model, tmp_path)
    loaded = load_dual_lora(MODELS[name].model(), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), before)
    assert torch.equal(logits(remove_dual_lora(model)), before)


@each_family
def test_saving_asks_every_layer_for_tied_weights_and_peft_for_none(name: str, tmp_path: Path) -> None:
    """A layer refuses the first, also inside a model that add_dual_lora has not seen."""
    model = MODELS[name].model()
    add_dual_lora(model.base_model, TARGETS[name], rank=3)
    with pytest.raises(ValueError, match="save_pretrained: `model` must be one without dual LoRA"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path)


@each_family
def test_adapters_go_to_peft_and_back(name: str, tmp_path: Path) -> None:
    model = add_dual_lora(MODELS[name].model(), TARGETS[name], rank=3, alpha=7.0, mode="neg")
    scatter(model)
    save_lora_adapter(model, tmp_path / "ours", "neg", base_model="tiny")
    theirs = peft.PeftModel.from_pretrained(MODELS[name].model(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = add_dual_lora(MODELS[name].model(), TARGETS[name], tmp_path / "theirs", rank=2, mode="neg")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
