"""Whole transformers models: compositions of frozen ones, and dual LoRA. docs/architecture.md lists the files.

Importing this package registers ComposedConfig with ComposedForCausalLM, and ComposedSeq2SeqConfig with
ComposedForSeq2SeqLM, in transformers' Auto classes, and the two models in its tables of names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from calm_fast.core.compatibility import importing

with importing("transformers"):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    from calm_fast.hf.cache import ComposedCache
    from calm_fast.hf.compose_models import compose
    from calm_fast.hf.composed import ComposedForCausalLM
    from calm_fast.hf.config import ComposedConfig, ComposedSeq2SeqConfig
    from calm_fast.hf.connections import resolve_connections
    from calm_fast.hf.layers import find_layers
    from calm_fast.hf.seq2seq import ComposedForSeq2SeqLM

if TYPE_CHECKING:
    from calm_fast.hf.alignment import AlignedCollator as AlignedCollator
    from calm_fast.hf.alignment import StreamAligner as StreamAligner
    from calm_fast.hf.cached_states import AugmenterStateCache as AugmenterStateCache
    from calm_fast.hf.cached_states import cache_augmenter_states as cache_augmenter_states
    from calm_fast.hf.reference_model import frozen_copy as frozen_copy
    from calm_fast.hf.watching import watch as watch

_LAZY = {
    "AlignedCollator": "alignment",
    "AugmenterStateCache": "cached_states",
    "StreamAligner": "alignment",
    "cache_augmenter_states": "cached_states",
    "frozen_copy": "reference_model",
    "watch": "watching",
}  # name -> the module of this folder that defines it

AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, ComposedForCausalLM, exist_ok=True)
AutoConfig.register(ComposedSeq2SeqConfig.model_type, ComposedSeq2SeqConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(ComposedSeq2SeqConfig, ComposedForSeq2SeqLM, exist_ok=True)
# register() leaves out the table of names by which Trainer decides to shift labels under label smoothing, and by which
# pipelines, model cards and the server know a causal LM. The Auto classes do not load from this entry: they skip model
# types that are not transformers' own.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ComposedConfig.model_type] = ComposedForCausalLM.__name__
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[ComposedSeq2SeqConfig.model_type] = ComposedForSeq2SeqLM.__name__

__all__ = [
    "AlignedCollator",
    "AugmenterStateCache",
    "ComposedCache",
    "ComposedConfig",
    "ComposedForCausalLM",
    "ComposedForSeq2SeqLM",
    "ComposedSeq2SeqConfig",
    "StreamAligner",
    "cache_augmenter_states",
    "compose",
    "find_layers",
    "frozen_copy",
    "resolve_connections",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
