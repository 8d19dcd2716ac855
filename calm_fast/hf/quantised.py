"""Quantised weights in a model, whichever library put them there, and where they are refused."""

from __future__ import annotations

import torch
from torch import nn

from calm_fast.core.checks import bad_value
from calm_fast.hf.wrappers import is_shard, peft_layer_types
from calm_fast.modules.fixed_weights import PLAIN

ALONE = "Quantise the parts alone (model.anchor, and each of model.augmenters)"


def _quantised(p: torch.Tensor) -> bool:
    return not is_shard(p) and (type(p) not in PLAIN or not (p.is_floating_point() or p.is_complex()))


def quantised_weight(model: nn.Module) -> str:
    """Return the name and kind of the first quantised weight in `model`, or "".

    torchao and quanto have tensors of their own kind, bitsandbytes integers, torch.ao layers without parameters.
    """
    for name, p in model.named_parameters():
        if _quantised(p):
            return f"{name}, a {type(p).__name__}"
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn."):
            return f"{name}, a {type(module).__name__} of torch.ao"
    return ""


def is_quantised(model: nn.Module) -> bool:
    """Return True if weights of `model` are quantised: while transformers loaded them, or later."""
    return getattr(model, "hf_quantizer", None) is not None or bool(quantised_weight(model))


def keep_4bit_layout(where: str, argument: str, model: nn.Module) -> None:
    """Keep bitsandbytes from rewriting the 4-bit weights of `model` at their first evaluation on a CPU.

    On CPUs with bfloat16 instructions a layer in eval mode moves its weights to another layout, and they stay there:
    scales are rounded to bfloat16, the product has no gradient any more, and the state dict has other values. A part
    of a composition is always in eval mode, also while the connections train.

    Raises:
        ValueError: weights have been moved already.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "support_avx512bf16_for_cpu")}
    for name, layer in layers.items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise bad_value(
                where,
                argument,
                "a 4-bit model that has not been evaluated on this CPU",
                f"one whose weights bitsandbytes has rounded for evaluation ({name}): no gradient passes through them. "
                f"Load the model again, and call {where} before its first forward pass",
            )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False


def check_connections_train(where: str, connections: nn.ModuleList) -> None:
    """Raise ValueError if weights of a connection are quantised and do not train: a run would train its norms only.

    A layer under a PEFT adapter is passed by, because the adapter trains, and so are quantised weights that train.
    """
    for index, connection in enumerate(connections):
        for name, child in connection.named_children():
            if isinstance(child, peft_layer_types()) or any(
                _quantised(p) and p.requires_grad for p in child.parameters()
            ):
                continue
            if found := quantised_weight(child):
                got = f"{index}.{name}.{found}, which has no gradient. {ALONE}, or put LoRA on them (PEFT)"
                raise bad_value(where, "connections", "weights that can train", got)
