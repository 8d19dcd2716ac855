"""Quantised tiny models, as each library makes them, and what holds of all of them as parts and bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from calm_fast import add_dual_lora, load_dual_lora, remove_dual_lora, save_dual_lora
from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.dual_lora import dual_lora_layers

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(3))


def tiny(seed: int) -> Any:
    """Return a model of widths that every library's groups of 32 or 64 weights divide."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | {"initializer_range": 0.1})).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


def saved(seed: int, folder: Path) -> Path:
    """Return the folder of the saved model, which is written once."""
    path = folder / f"model{seed}"
    if not path.is_dir():
        tiny(seed).save_pretrained(path)
    return path


def torchao_config(bits: int) -> Any:
    """Return torchao's weight-only config for a CPU: int8 per channel, or int4 in groups of 32."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if bits == 8:
        return Int8WeightOnlyConfig()
    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def in_place(model: nn.Module, bits: int) -> Any:
    """Quantise the linear layers of `model` by torchao. Return it."""
    from torchao.quantization import quantize_

    quantize_(model, torchao_config(bits))
    return model


def setting(kind: str) -> Any:
    """Return the quantization_config of from_pretrained."""
    import transformers

    if kind == "torchao int8":
        return transformers.TorchAoConfig(torchao_config(8))
    if kind == "bitsandbytes int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bitsandbytes nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return transformers.QuantoConfig(weights="int8")


def quantised(kind: str, seed: int, folder: Path) -> Any:
    """Return model `seed` quantised as `kind` says; `folder` keeps the files that are read."""
    if kind == "torchao int4":
        return in_place(tiny(seed), 4)
    if kind == "torchao int8 in place":
        return in_place(tiny(seed), 8)
    read = AutoModelForCausalLM.from_pretrained
    return read(saved(seed, folder), quantization_config=setting(kind), device_map="cpu").eval()


def composed(anchor: Any, augmenter: Any) -> Any:
    """Return a composition of both, the same at every call, in which every residual counts."""
    torch.manual_seed(2)
    model = compose(anchor, augmenter, [(0, 0), (1, 1)])
    generator = torch.Generator().manual_seed(7)
    for connection in model.connections:
        nn.init.normal_(connection.o_proj.weight, std=0.2, generator=generator)
    return model


def check_in_role(kind: str, role: str, folder: Path) -> None:
    """Check a composition whose `role` ("anchor", "augmenter") is quantised against that model alone."""
    model = quantised(kind, 0 if role == "anchor" else 1, folder)
    anchor, augmenter = (model, tiny(1)) if role == "anchor" else (tiny(0), model)
    untrained = compose(anchor, augmenter, [(0, 0), (1, 1)])
    want = logits(anchor)  # after compose, which keeps 4-bit weights from being rounded at their first evaluation
    assert torch.equal(logits(untrained), want), "at init the composition is the anchor, bit for bit"
    with torch.no_grad():
        states = augmenter(IDS, output_hidden_states=True).hidden_states[1]
    both = composed(anchor, augmenter)
    read: list[torch.Tensor] = []
    handle = both.connections[0].register_forward_pre_hook(lambda _layer, args: read.append(args[1]))
    assert not torch.equal(logits(both), want)
    handle.remove()
    assert torch.equal(read[0], states), "the connection reads what the augmenter alone computes"
    # a step after an evaluation, as in a training run
    both.train()(IDS, labels=IDS).loss.backward()
    for name, p in both.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == name.startswith("connections."), name
    written = both.eval().generate(IDS[:1], max_new_tokens=3, do_sample=False)
    text = IDS[:1]
    for _ in range(written.shape[1] - text.shape[1]):
        with torch.no_grad():
            text = torch.cat((text, both(text).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(written, text)


def check_under_dual_lora(kind: str, folder: Path) -> None:
    """Check dual LoRA over a quantised base: the base at init, gradients of all that trains, files."""
    model = add_dual_lora(quantised(kind, 0, folder), ("q_proj", "v_proj"), rank=3, gate_dim=4, value_dim=4)
    got = logits(model)  # after add_dual_lora, which keeps 4-bit weights from being rounded at their first evaluation
    want = logits(remove_dual_lora(model))
    assert torch.equal(got, want)
    add_dual_lora(model, ("q_proj", "v_proj"), rank=3, gate_dim=4, value_dim=4)
    torch.manual_seed(1)
    for layer in dual_lora_layers(model).values():
        for p in layer.parameters(recurse=False):
            nn.init.normal_(p, std=0.2)
    model.train()(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    trained = logits(model)
    assert not torch.equal(trained, want)
    layers = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=1, learning_rate=0.1, optim="sgd", save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model.zero_grad()
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in IDS.tolist()]).train()
    assert all(not torch.equal(p, layers[name]) for name, p in model.named_parameters() if p.requires_grad)
    trained = logits(model)
    save_dual_lora(model, folder / "dual")
    assert torch.equal(logits(load_dual_lora(quantised(kind, 0, folder), folder / "dual")), trained)
    assert torch.equal(logits(remove_dual_lora(model)), want)
    assert not getattr(model, "_hf_peft_config_loaded", False)


def check_files(kind: str, folder: Path) -> None:
    """Check how a composition with parts that are quantised while they are loaded is saved and loaded."""
    plain = composed(saved(0, folder), saved(1, folder))
    plain.save_pretrained(folder / "plain")
    parts = [quantised(kind, seed, folder) for seed in (0, 1)]
    model = composed(*parts)
    want = logits(model)
    assert not torch.equal(want, logits(plain))
    with pytest.raises(ValueError, match="^save_pretrained: `anchor` must be .* quantised while it was loaded"):
        model.save_pretrained(folder / "refused")
    # quantised while the parts of a saved composition are loaded
    config = setting(kind)
    again = ComposedForCausalLM.from_pretrained(folder / "plain", quantization_config=config, device_map="cpu")
    assert torch.equal(logits(again), want)
    # the very parts are passed
    model.save_pretrained(folder / "passed", check_parts=False)
    again = ComposedForCausalLM.from_pretrained(folder / "passed", anchor=parts[0], augmenters=parts[1])
    assert torch.equal(logits(again), want)


def check_quantised_files(kind: str, folder: Path) -> None:
    """Check a composition of parts that were saved quantised: the references are enough."""
    for seed in (0, 1):
        quantised(kind, seed, folder).save_pretrained(folder / f"small{seed}")
    model = composed(folder / "small0", folder / "small1")
    model.save_pretrained(folder / "composed")
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(folder / "composed")), logits(model))
