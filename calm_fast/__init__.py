"""calm_fast: fused kernels for composing language models, dual LoRA and self-consistency scoring.

Importing this package only defines names, and tells transformers' Auto classes the model types of compositions. torch,
Triton, the compiled library and transformers are imported when a name that needs them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calm_fast._version import __version__
from calm_fast.core.registration import register_model_types

if TYPE_CHECKING:  # the names of _LAZY, for type checkers
    from calm_fast.consistency.sampling.scoring import score_sequences as score_sequences
    from calm_fast.consistency.self_consistency import SelfConsistency as SelfConsistency
    from calm_fast.core.checks import validate_values as validate_values
    from calm_fast.core.dispatch import explain as explain
    from calm_fast.hf import ComposedConfig as ComposedConfig
    from calm_fast.hf import ComposedForCausalLM as ComposedForCausalLM
    from calm_fast.hf import ComposedForSeq2SeqLM as ComposedForSeq2SeqLM
    from calm_fast.hf import compose as compose
    from calm_fast.hf.dual_lora import add_dual_lora as add_dual_lora
    from calm_fast.hf.dual_lora import get_gates as get_gates
    from calm_fast.hf.dual_lora import record_gates as record_gates
    from calm_fast.hf.dual_lora import remove_dual_lora as remove_dual_lora
    from calm_fast.hf.dual_lora import set_dual_lora_mode as set_dual_lora_mode
    from calm_fast.hf.dual_lora_files import load_dual_lora as load_dual_lora
    from calm_fast.hf.dual_lora_files import save_dual_lora as save_dual_lora
    from calm_fast.hf.dual_lora_files import save_lora_adapter as save_lora_adapter
    from calm_fast.modules.cross_attention import CrossAttention as CrossAttention
    from calm_fast.modules.dual_lora import DualLoRALinear as DualLoRALinear
    from calm_fast.modules.fixed_weights import fixed_weights as fixed_weights

# public name -> the module that defines it, which is imported when the name is first used
_LAZY = {
    "CrossAttention": "calm_fast.modules.cross_attention",
    "ComposedConfig": "calm_fast.hf",
    "ComposedForCausalLM": "calm_fast.hf",
    "ComposedForSeq2SeqLM": "calm_fast.hf",
    "compose": "calm_fast.hf",
    "SelfConsistency": "calm_fast.consistency.self_consistency",
    "DualLoRALinear": "calm_fast.modules.dual_lora",
    "add_dual_lora": "calm_fast.hf.dual_lora",
    "fixed_weights": "calm_fast.modules.fixed_weights",
    "explain": "calm_fast.core.dispatch",
    "get_gates": "calm_fast.hf.dual_lora",
    "load_dual_lora": "calm_fast.hf.dual_lora_files",
    "record_gates": "calm_fast.hf.dual_lora",
    "remove_dual_lora": "calm_fast.hf.dual_lora",
    "save_dual_lora": "calm_fast.hf.dual_lora_files",
    "save_lora_adapter": "calm_fast.hf.dual_lora_files",
    "score_sequences": "calm_fast.consistency.sampling.scoring",
    "set_dual_lora_mode": "calm_fast.hf.dual_lora",
    "validate_values": "calm_fast.core.checks",
}
_SUBMODULES = ("ops", "modules", "reference", "hf", "nat", "consistency")

__all__ = ["__version__", *_LAZY, *_SUBMODULES]

# AutoConfig, AutoModelForCausalLM, pipeline() and the like load a saved composition once `calm_fast` is imported
register_model_types(
    "calm_fast.hf",
    {"calm_fast_composed": "ComposedConfig", "calm_fast_composed_seq2seq": "ComposedSeq2SeqConfig"},
)


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
