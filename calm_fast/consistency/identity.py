"""What a run of SelfConsistency depends on, as JSON: functions by name, models by checksums."""

from __future__ import annotations

from typing import Any

import torch

from calm_fast.core.fingerprint import json_checksum, model_fingerprint
from calm_fast.modules.dual_lora import DualLoRALinear

# the name under which earlier versions recorded our own function: their runs go on
_RECORDED = {"calm_fast.consistency.answers.equality.equivalent": "calm_fast.consistency.answers.equivalent"}


def setting_name(value: Any) -> Any:
    """Return a setting as JSON, a function as its name."""
    if not hasattr(value, "__qualname__"):
        return value
    name = f"{value.__module__}.{value.__qualname__}"
    return _RECORDED.get(name, name)


def vocabulary_checksum(tokenizer: Any) -> str:
    """Return a checksum of the tokens and their ids."""
    return json_checksum(sorted(tokenizer.get_vocab().items()))[:16]


def dual_lora_modes(model: Any) -> dict[str, str]:
    """Return the mode of every dual LoRA layer, which is no parameter of the model."""
    return {name: module.mode for name, module in model.named_modules() if isinstance(module, DualLoRALinear)}


def model_identity(model: Any) -> str | None:
    """Return the class of a model and a checksum of its weights."""
    if model is None:
        return None
    weights = f" {model_fingerprint(model)[:16]}" if isinstance(model, torch.nn.Module) else ""
    return type(model).__qualname__ + weights
