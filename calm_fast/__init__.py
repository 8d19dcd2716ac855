"""calm_fast: fused kernels for composing language models, dual LoRA and self-consistency scoring.

Importing this package only defines names. torch, Triton, the compiled library and transformers are imported when a name
that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from calm_fast._version import __version__

# public name -> the module that defines it, which is imported when the name is first used
_LAZY = {
    "CrossAttention": "calm_fast.modules.cross_attention",
    "ComposedConfig": "calm_fast.hf",
    "ComposedForCausalLM": "calm_fast.hf",
    "compose": "calm_fast.hf",
    "SelfConsistency": "calm_fast.consistency.self_consistency",
    "DualLoRALinear": "calm_fast.modules.dual_lora",
    "add_dual_lora": "calm_fast.hf.dual_lora",
    "explain": "calm_fast.core.dispatch",
    "get_gates": "calm_fast.hf.dual_lora",
    "load_dual_lora": "calm_fast.hf.dual_lora",
    "record_gates": "calm_fast.hf.dual_lora",
    "remove_dual_lora": "calm_fast.hf.dual_lora",
    "save_dual_lora": "calm_fast.hf.dual_lora",
    "save_lora_adapter": "calm_fast.hf.dual_lora",
    "score_sequences": "calm_fast.consistency.sampling.scoring",
    "set_dual_lora_mode": "calm_fast.hf.dual_lora",
    "validate_values": "calm_fast.core.checks",
}
_SUBMODULES = ("ops", "modules", "reference", "hf", "nat", "consistency")

__all__ = ["__version__", *_LAZY, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name not in _LAZY and name not in _SUBMODULES:
        raise AttributeError(f"module 'calm_fast' has no attribute {name!r}")
    from calm_fast.core.compatibility import importing

    with importing("transformers"):
        if name in _LAZY:
            value = getattr(importlib.import_module(_LAZY[name]), name)
        else:
            value = importlib.import_module(f"calm_fast.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
