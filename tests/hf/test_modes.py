"""The training flags of a composition and of what is inside its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import composed_model, prompts
from peft import LoraConfig, get_peft_model

from calm_fast import add_dual_lora
from calm_fast.hf import ComposedForCausalLM

REFUSED = pytest.mark.seam(
    attach="`train()` of a part or a module inside it",
    to="composition",
    result="refused",
    why="its dropout would act; call `train()` or `eval()` of the composition",
)


@REFUSED
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("anchor", "FalconForCausalLM of the part"),
        ("augmenters.0", "FalconForCausalLM of the part"),
        ("anchor.transformer.h.1", "FalconDecoderLayer transformer.h.1 of the part"),
        ("augmenters.0.transformer.h.0.mlp", "FalconMLP transformer.h.0.mlp of the part"),
    ],
)
def test_a_part_in_training_mode_is_refused(path: str, name: str, training: bool) -> None:
    model, ids = composed_model("falcon").train(training), prompts()
    expected = model(ids, use_cache=False).logits
    model.get_submodule(path).train()
    with pytest.raises(
        ValueError, match=rf"`model.training` .* got {name} .* Call {'train' if training else 'eval'}\(\)"
    ):
        model(ids)
    model.train(training)
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_a_part_put_into_training_mode_during_generation_is_refused() -> None:
    model, ids = composed_model("falcon"), prompts()
    cache = model(ids).cache
    model.anchor.train()
    with pytest.raises(ValueError, match=r"`model.training` .* FalconForCausalLM"):
        model(ids[:, :1], cache=cache)


def wrapped(model: ComposedForCausalLM, how: str) -> torch.nn.Module:
    if how == "torch.compile":
        return torch.compile(model, backend="eager")
    if how == "PeftModel":
        return get_peft_model(model, LoraConfig(target_modules=r"connections\..*q_proj"))
    return torch.nn.Sequential(model)


@pytest.mark.parametrize("how", ["torch.compile", "PeftModel", "Sequential"])
@pytest.mark.seam(
    attach="`train()` and `eval()` of a wrapper (PeftModel, `torch.compile`, DDP)",
    to="composition",
    result="works",
    why="the parts stay in eval mode",
)
def test_wrappers_leave_the_parts_in_eval_mode(how: str) -> None:
    model = composed_model("falcon")
    outer = wrapped(model, how)
    for mode in (True, False):
        outer.train(mode)
        assert model.training is model.connections[0].training is mode
        assert not any(module.training for part in (model.anchor, *model.augmenters) for module in part.modules())


def with_adapters(model: ComposedForCausalLM, how: str, dropout: float) -> torch.nn.Module:
    if how == "DualLoRALinear":
        add_dual_lora(model.anchor, target_modules=("q_proj",), rank=4, dropout=dropout)
        for name, parameter in model.anchor.named_parameters():
            if name.endswith("value_up"):
                torch.nn.init.normal_(parameter)
        return model
    config = LoraConfig(r=4, lora_dropout=dropout, target_modules=r"anchor\..*q_proj", init_lora_weights=False)
    config.use_dora = how == "DoRA"
    return get_peft_model(model, config)


@pytest.mark.parametrize("how", ["LoRA", "DoRA", "DualLoRALinear"])
@pytest.mark.seam(
    attach="`lora_dropout` of adapters that train inside a part",
    to="composition",
    result="works",
    why="it acts in training mode, and the part's own dropout does not",
)
def test_dropout_of_adapters_in_a_part_acts_only_in_training_mode(how: str) -> None:
    model, ids = composed_model("llama"), prompts()
    outer = with_adapters(model, how, 0.5)
    outer.eval()
    expected = outer(ids, use_cache=False).logits
    outer.train()
    first, second = (outer(ids, use_cache=False).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert not any(type(m).__name__ == "LlamaDecoderLayer" and m.training for m in model.anchor.modules())
    outer.eval()
    assert torch.equal(outer(ids, use_cache=False).logits, expected)


def active(model: ComposedForCausalLM) -> list[Any]:
    return [m for m in model.anchor.modules() if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0]


def test_a_new_adapter_with_dropout_is_refused_in_eval_mode() -> None:
    """PEFT makes adapters in training mode, whatever the mode of the model is."""
    model, ids = composed_model("llama"), prompts()
    outer = with_adapters(model, "LoRA", 0.5)
    assert active(model)
    with pytest.raises(ValueError, match=r"`model.training` .* Call eval\(\) of the composition"):
        outer(ids)
    assert not active(model.eval())
    outer(ids)
    with_adapters(composed_model("llama"), "LoRA", 0.0)(ids)  # without dropout the mode does not matter
