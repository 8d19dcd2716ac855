"""Composition of transformers models.

Importing this package registers ComposedConfig and ComposedForCausalLM with transformers' Auto classes.
"""

from __future__ import annotations

from calm_fast.core.compatibility import importing

with importing("transformers"):
    from transformers import AutoConfig, AutoModelForCausalLM

    from calm_fast.hf.cache import ComposedCache
    from calm_fast.hf.compose_models import compose
    from calm_fast.hf.composed import ComposedForCausalLM
    from calm_fast.hf.config import ComposedConfig
    from calm_fast.hf.connections import resolve_connections
    from calm_fast.hf.layers import find_layers

AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)

__all__ = [
    "ComposedCache",
    "ComposedConfig",
    "ComposedForCausalLM",
    "compose",
    "find_layers",
    "resolve_connections",
]
