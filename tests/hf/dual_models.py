"""Tiny models for the tests of dual LoRA."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from calm_fast.hf.dual_lora import dual_lora_layers

TARGETS = ("q_proj", "v_proj")
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0, **config: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | {"initializer_range": 0.1} | config)).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def scatter(model: torch.nn.Module) -> torch.nn.Module:
    """Move every dual LoRA parameter away from its initial value. Return the model."""
    torch.manual_seed(1)
    for layer in dual_lora_layers(model).values():
        for p in layer.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.2)
    return model
