"""Parts without a transformers Cache: a composition with one reads the whole text in every step of a generation."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from calm_fast.core.checks import bad_value
from calm_fast.core.compatibility import require
from calm_fast.hf.cache_names import has_own_cache

# Families without a transformers Cache that transformers' own flag does not exclude: model_type -> reason.
WITHOUT_CACHE = {
    "recurrent_gemma": "keeps its state inside the model",
    "openai-gpt": "has none: every step reads the whole text",
}
# attribute under which a module keeps a state from one call to the next, with or without a cache
_STATE = "recurrent_states"
_turn = threading.RLock()


def lacks_cache(model: PreTrainedModel) -> str:
    """Return the reason why this model has no transformers Cache, or "" if it should have one."""
    if why := getattr(model, "recomputes", ""):  # a composition with such a part
        return str(why)
    if known := WITHOUT_CACHE.get(model.config.model_type):
        return known
    config = model.config.get_text_config(decoder=True)
    if all(getattr(config, name, None) is None for name in ("num_hidden_layers", "decoder_layers")):
        return "has several stacks of layers, for which transformers makes no cache"  # BLT
    require("transformers", GenerationMixin, "_supports_default_dynamic_cache")
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():  # remote code may do without the mixin
        return "keeps its state elsewhere"
    return "has a cache of its own, a dict" if has_own_cache(model.forward) else ""


def check_rescaling(model: PreTrainedModel, where: str, argument: str) -> None:
    """Raise ValueError for an RWKV that divides its weights in place when it first runs.

    A truncated view shares the weights and not the flag that says whether they are divided.
    """
    every = getattr(model.config, "rescale_every", 0) if model.config.model_type == "rwkv" else 0
    if 0 < every < model.config.num_hidden_layers:
        expected = "a model whose forward leaves its weights as they are"
        got = f"{type(model).__name__} with rescale_every={every} in its config. Load it with rescale_every=0"
        raise bad_value(where, argument, expected, got)


def stateful_modules(models: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules that keep a state between calls (RecurrentGemma's)."""
    return [module for model in models for module in model.modules() if hasattr(module, _STATE)]


def begin_turn(modules: list[nn.Module]) -> None:
    """Wait until no other thread runs a composition whose modules keep a state, if there are such `modules`."""
    if modules and not torch.compiler.is_compiling():
        _turn.acquire()


def end_turn(modules: list[nn.Module]) -> None:
    """Drop the state, which may hold a graph of autograd, and let other threads run."""
    for module in modules:
        setattr(module, _STATE, None)
    if modules and not torch.compiler.is_compiling():
        _turn.release()


def without_cache(reason: str, generation_config: Any, told: bool) -> None:
    """Set up a generation that reads the whole text in every step, and warn unless the user was `told`.

    reason: why the composition has no cache. Raises ValueError if a kind of cache is asked for.
    """
    kind = getattr(generation_config, "cache_implementation", None)
    if kind is not None:
        raise bad_value("generate", "cache_implementation", f"None, because {reason}", repr(kind))
    if generation_config.use_cache is not False and not told:
        warnings.warn(
            f"generate: no cache is kept, because {reason}. Every step reads the whole text; pass use_cache=False to "
            "say that this is known.",
            UserWarning,
            stacklevel=2,
        )
    generation_config.use_cache = False
