"""The arguments each part of a composed model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from calm_fast.core.checks import describe, values_checked
from calm_fast.core.compatibility import tried
from calm_fast.hf.cache_names import NAMES, cache_argument, generate_argument, has_own_cache
from calm_fast.hf.masks import Visibility, aligned_visibility

# families without a transformers Cache, which transformers' own flag does not name
WITHOUT_CACHE = {
    "recurrent_gemma": "keeps its state inside the model",
    "openai-gpt": "has none: every step reads the whole text",
}


def lacks_cache(model: PreTrainedModel) -> str:
    """Return why this family has no transformers Cache, or "" if it is expected to take one."""
    if known := WITHOUT_CACHE.get(model.config.model_type):
        return known
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return "keeps its state elsewhere"
    return "has a cache of its own, a dict" if has_own_cache(model.forward) else ""


@dataclass(frozen=True)
class Signature:
    """Names a family's forward uses: its cache argument, and whether it takes positions and logits_to_keep.

    cache, prepared, generated: the cache's argument name in the called module's forward, in the family's
    prepare_inputs_for_generation, and in transformers' generate. stock: inputs are prepared by transformers' own
    method, which changes nothing in a step without padding. home: the module that holds the model's first parameter,
    and the parameter's name there.
    """

    cache: str
    prepared: str
    generated: str
    position_ids: bool
    logits_to_keep: bool
    stock: bool = False
    home: tuple[nn.Module, str] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, called: nn.Module | None = None) -> Signature:
        """Read it from the model. `called`: the module inside it that will be called, by default the model itself.

        Raises ValueError for an encoder-decoder, for a family without a transformers Cache, and for a forward whose
        cache argument has no known name: such a model is never silently treated as having no cache.
        """
        name = type(model).__name__
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name} cannot be composed: expected a decoder-only model, got an encoder-decoder")
        if why := lacks_cache(model):
            raise ValueError(f"{name} cannot be composed: expected a model with a transformers Cache; this one {why}")
        called = model if called is None else called
        cache = cache_argument(called.forward)
        if cache is None:
            got = ", ".join(inspect.signature(called.forward).parameters)
            raise ValueError(
                f"{type(called).__name__}.forward: expected a cache argument named {' or '.join(NAMES)}, got the "
                f"arguments {got}. If forward is wrapped, wrap it with functools.wraps; if the model has no cache, "
                f"define _supports_default_dynamic_cache() to return False. {tried('transformers')}"
            )
        names = inspect.signature(model.forward).parameters
        prepare = getattr(type(model), "prepare_inputs_for_generation", None)
        prepared = None if prepare is None else cache_argument(prepare)
        stock = prepare is GenerationMixin.prepare_inputs_for_generation and not model.is_remote_code()
        home = next(((m, name) for m in model.modules() for name, p in m._parameters.items() if p is not None), None)
        return cls(
            cache,
            prepared or generate_argument(),
            generate_argument(),
            "position_ids" in names,
            "logits_to_keep" in names,
            stock,
            home,
        )

    def device(self, model: PreTrainedModel) -> torch.device:
        """model.device without the walk through the modules that it takes: every step of a generation asks."""
        parameter = None if self.home is None else self.home[0]._parameters.get(self.home[1])
        return model.device if parameter is None else parameter.device


def check_ids(name: str, ids: Any) -> None:
    """Token ids are an integer tensor (batch, tokens); ValueError otherwise."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor of token ids (batch, tokens), got {describe(ids)}")
    if ids.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions (batch, tokens), got shape {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64 or int32 token ids, got {ids.dtype}")


def check_tensors(**given: Any) -> None:
    """Each is a tensor or None, as plain transformers models take them; ValueError naming it otherwise."""
    for name, value in given.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(f"{name}: expected a tensor (batch, tokens) or None, got {describe(value)}")


def check_vocabulary(name: str, ids: torch.Tensor, models: Iterable[PreTrainedModel]) -> None:
    """Every model embeds every id: ValueError otherwise. Looks only where values may be read."""
    if not values_checked(ids) or ids.numel() == 0:
        return
    # asked each time: the parts are the caller's too, who may resize them
    rows = [(getattr(model.get_input_embeddings(), "num_embeddings", None), model) for model in models]
    known = [(count, type(model).__name__) for count, model in rows if isinstance(count, int)]
    if not known:
        return
    count, owner = min(known)
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= count:
        raise ValueError(
            f"{name}: expected token ids from 0 to {count - 1} ({owner} embeds {count}), got {low if low < 0 else high}"
        )


class AugmenterCall(NamedTuple):
    """One augmenter's token arguments and what the anchor's tokens may read of them."""

    inputs: dict[str, torch.Tensor | None]
    visibility: Visibility


def _per_augmenter(name: str, value: Any, count: int) -> list[torch.Tensor | None]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count or not all(v is None or isinstance(v, torch.Tensor) for v in values):
        got = describe(value) if not isinstance(value, (list, tuple)) else f"{len(value)}: {describe(value)}"
        raise ValueError(
            f"{name}: expected a tensor, or a list with a tensor or None for each of {count} augmenters, got {got}"
        )
    return values


def augmenter_calls(
    count: int, inputs: dict[str, torch.Tensor | None], external: dict[str, Any], past: int, separable: bool
) -> tuple[list[AugmenterCall], bool]:
    """The call of every augmenter, and whether the rows hold several documents.

    inputs: the anchor's input_ids, attention_mask, position_ids; external: the same of the augmenters' own,
    and lo, hi, each None, a tensor or a list per augmenter; past: tokens in the cache; separable: whether the
    anchor itself separates documents by restarting positions here (transformers does so without a cache).
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = inputs["position_ids"] if separable else None
    aligned = aligned_visibility(mask, positions, ids.shape[0], past, ids.shape[1])
    packed = mask is None and aligned.lo is not None

    if all(value is None for value in external.values()):
        return [AugmenterCall(inputs, aligned)] * count, packed
    own = {name: _per_augmenter(name, value, count) for name, value in external.items()}
    calls = []
    for index in range(count):
        given = {name: values[index] for name, values in own.items()}
        lo, hi = given.pop("lo"), given.pop("hi")
        if hi is None and any(value is not None for value in (lo, *given.values())):
            raise ValueError("hi: required with lo or an augmenter's own tokens, to say what each token may read")
        tokens = {name.removeprefix("augmenter_"): value for name, value in given.items()}
        if tokens["input_ids"] is None:
            if any(value is not None for value in tokens.values()):
                raise ValueError("augmenter_input_ids: required with an augmenter's own mask or positions")
            tokens = inputs
        else:
            check_ids("augmenter_input_ids", tokens["input_ids"])
        calls.append(AugmenterCall(tokens, aligned if hi is None else Visibility(lo, hi, False)))
    return calls, packed


def _knows_length(cache: Cache | None, past: int) -> bool:
    """Whether a family that asks this cache how many tokens came before gets the right answer.

    A truncated hybrid may ask an attention layer that never runs.
    """
    if not isinstance(cache, DynamicCache):
        return True
    attention = next((layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)), None)
    return attention is None or attention.get_seq_length() == past


def part_inputs(
    model: PreTrainedModel,
    signature: Signature,
    inputs: dict[str, torch.Tensor | None],
    cache: Cache | None,
    past: int,
) -> dict[str, Any]:
    """Keyword arguments of one part, on its device; with a cache, as the family prepares its own decoding."""
    device = signature.device(model)
    inputs = {name: None if value is None else value.to(device) for name, value in inputs.items()}
    if not signature.position_ids:
        del inputs["position_ids"]
    elif inputs["position_ids"] is None and not _knows_length(cache, past):
        ids = inputs["input_ids"]
        inputs["position_ids"] = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    if cache is None:
        return {**inputs, "use_cache": False}
    inputs["use_cache"] = True
    plain = type(cache) is DynamicCache and (inputs["attention_mask"] is None or inputs.get("position_ids") is not None)
    if (signature.stock and plain) or not hasattr(model, "prepare_inputs_for_generation"):
        return inputs | {signature.cache: cache}
    inputs[signature.prepared] = cache
    prepared = model.prepare_inputs_for_generation(**inputs, is_first_iteration=past == 0)
    prepared.pop("logits_to_keep", None)  # some families fill in their own; the caller's counts
    for name in NAMES:  # code of another release prepares under another name than forward takes
        if name != signature.cache and name in prepared:
            prepared[signature.cache] = prepared.pop(name)
    return prepared
