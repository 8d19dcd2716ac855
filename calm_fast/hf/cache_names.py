"""Names that a transformers release gives the key-value cache.

Until 5.23 a decoder takes and returns its cache as ``past_key_values`` (Mamba and its kind: ``cache_params``); since
5.24 both are called ``cache``, and the old names are announced to go. Nothing here compares release numbers: every
name is read off the function or the output class that uses it. All other code asks this module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from calm_fast.core.compatibility import IncompatibleRelease, tried

NAMES = ("cache", "past_key_values", "cache_params")  # newest first


def _named(function: Callable[..., Any]) -> dict[str, bool]:
    """Known names among the parameters of `function`, newest first -> whether the annotation is a dict."""
    parameters = inspect.signature(function).parameters
    return {name: "dict[" in str(parameters[name].annotation).lower() for name in NAMES if name in parameters}


def cache_argument(function: Callable[..., Any]) -> str | None:
    """Return the name under which `function` takes a transformers Cache, or None if no parameter has a known name.

    A parameter annotated as a dict is not a Cache: XLM and Flaubert have had such a ``cache`` all along.
    """
    return next((name for name, own in _named(function).items() if not own), None)


def has_own_cache(function: Callable[..., Any]) -> bool:
    """Return whether `function` takes a cache under a known name that is a dict, not a transformers Cache."""
    return any(_named(function).values())


@functools.cache
def generate_argument() -> str:
    """Return the name under which generate() takes, passes on and returns a cache in the installed transformers.

    Raises IncompatibleRelease, an ImportError, if transformers uses none of the known names.
    """
    name = cache_argument(GenerationMixin.prepare_inputs_for_generation)
    if name is None:
        raise IncompatibleRelease(
            f"GenerationMixin.prepare_inputs_for_generation: expected a cache argument named {' or '.join(NAMES)}, got "
            f"none. {tried('transformers')}"
        )
    return name


def given_cache(**given: Any) -> tuple[str, Any]:
    """Return (name, cache) of the one cache that a caller gave under any of its names; the cache is None if none was.

    Raises ValueError if it was given under two names.
    """
    found = [(name, cache) for name, cache in given.items() if cache is not None]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise ValueError(f"{names}: these name the same cache; expected only one of them")
    return found[0] if found else (next(iter(given)), None)


def cache_of(outputs: ModelOutput) -> Any:
    """Return the cache of a transformers model's outputs, or None if they hold none."""
    fields = type(outputs).__dataclass_fields__
    name = next((name for name in NAMES if name in fields), None)
    return None if name is None else getattr(outputs, name)


def with_cache(outputs: ModelOutput, cache: Any, field: str) -> ModelOutput:
    """Return `outputs` with `cache` under `field`, and readable as ``outputs.cache`` and ``outputs.past_key_values``.

    Outputs of a class without that field (Mamba's until 5.23) or without attentions (Mamba's) are put into a
    CausalLMOutputWithPast.
    """
    if not {field, "attentions"} <= type(outputs).__dataclass_fields__.keys():
        outputs = CausalLMOutputWithPast(
            loss=outputs.loss,
            logits=outputs.logits,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
    if cache is not None:
        outputs[field] = cache
    return alias_cache(outputs, cache)


def alias_cache(outputs: ModelOutput, cache: Any) -> ModelOutput:
    """Make `cache` an attribute of `outputs` under whichever of the two names its class lacks; return `outputs`."""
    for name in ("cache", "past_key_values"):
        if not hasattr(type(outputs), name):
            setattr(outputs, name, cache)
    return outputs
