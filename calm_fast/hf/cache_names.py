"""The names that transformers releases give the key-value cache.

Up to 5.23 a decoder takes and returns its cache as ``past_key_values`` (the Mamba family: ``cache_params``). Since 5.24
both are called ``cache``, and the old names are deprecated. Nothing here compares release numbers: each name is read
off the function or the output class that uses it. All other code gets the names from this module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.compatibility import IncompatibleRelease, tried

NAMES = ("cache", "past_key_values", "cache_params")  # newest first


def _named(function: Callable[..., Any]) -> dict[str, bool]:
    """Map each known name among the parameters of `function`, newest first, to True if its annotation is a dict."""
    parameters = inspect.signature(function).parameters
    return {name: "dict[" in str(parameters[name].annotation).lower() for name in NAMES if name in parameters}


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Return the name under which `function` takes a transformers Cache, or None if no parameter has a known name.

    A parameter annotated as a dict is not a Cache: XLM and Flaubert have had such a ``cache`` all along.
    """
    return next((name for name, own in _named(function).items() if not own), None)


def has_own_cache(function: Callable[..., Any]) -> bool:
    """Return True if `function` has a parameter with a known cache name that is a dict, not a transformers Cache."""
    return any(_named(function).values())


@functools.cache
def generate_argument() -> str:
    """Return the name under which generate() takes, passes on and returns a cache in the installed transformers.

    Raises IncompatibleRelease, an ImportError, if transformers uses none of the known names.
    """
    name = cache_argument(GenerationMixin.prepare_inputs_for_generation)
    if name is None:
        raise IncompatibleRelease(
            f"GenerationMixin.prepare_inputs_for_generation: the cache argument must be named {' or '.join(NAMES)}, "
            f"got no such argument. {tried('transformers')}"
        )
    return name


def given_cache(**given: Any) -> tuple[str, Any]:
    """Return (name, cache) of the one cache that was passed under any of its names, or (first name, None).

    Raises ValueError if a cache was passed under two names.
    """
    found = [(name, cache) for name, cache in given.items() if cache is not None]
    if len(found) > 1:
        names = " and ".join(f"`{name}`" for name, _ in found)
        raise ValueError(f"ComposedForCausalLM: the cache must be given under one name, got {names}; drop all but one")
    return found[0] if found else (next(iter(given)), None)


def cache_of(outputs: ModelOutput) -> Any:
    """Return the cache of a transformers model's outputs, or None if they hold none."""
    fields = type(outputs).__dataclass_fields__  # type: ignore[attr-defined]  # every subclass is a dataclass
    name = next((name for name in NAMES if name in fields), None)
    return None if name is None else getattr(outputs, name)


def with_cache(outputs: ModelOutput, cache: Any, field: str) -> ModelOutput:
    """Return `outputs` with `cache` under `field`, readable as ``outputs.cache`` and as ``outputs.past_key_values``.

    Mamba's output class has no ``attentions``, and up to 5.23 no field of this name: such outputs are copied into a
    CausalLMOutputWithPast, those without logits into a BaseModelOutputWithPast.
    """
    fields = type(outputs).__dataclass_fields__  # type: ignore[attr-defined]  # every subclass is a dataclass
    if not {field, "attentions"} <= fields.keys():
        extra = {name: outputs.get(name) for name in ("hidden_states", "attentions")}
        if "last_hidden_state" in outputs:
            outputs = BaseModelOutputWithPast(last_hidden_state=outputs["last_hidden_state"], **extra)
        else:
            outputs = CausalLMOutputWithPast(loss=outputs.get("loss"), logits=outputs["logits"], **extra)
    if cache is not None:
        outputs[field] = cache
    return alias_cache(outputs, cache)


def alias_cache(outputs: ModelOutput, cache: Any) -> ModelOutput:
    """Set `cache` as an attribute of `outputs` under each of the two names that its class lacks; return `outputs`."""
    for name in ("cache", "past_key_values"):
        if not hasattr(type(outputs), name):
            setattr(outputs, name, cache)
    return outputs
