"""Generation with a composed model: its cache, and transformers' generate around it."""

from __future__ import annotations

from typing import Any, NoReturn, cast

from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value
from calm_fast.hf.cache import ComposedCache, cache_of_first_layers
from calm_fast.hf.cache_names import NAMES, alias_cache, cache_of, generate_argument, given_cache
from calm_fast.hf.inputs import WHERE, check_tensors
from calm_fast.hf.masks import check_left_padded


def own_cache(**given: Any) -> ComposedCache | None:
    """Return the cache that was passed under one of its names, or None.

    Raises ValueError for a cache under two names, or of another kind.
    """
    name, cache = given_cache(**given)
    if cache is not None and not isinstance(cache, ComposedCache):
        raise bad_value(WHERE, name, "a ComposedCache", type(cache).__name__)
    return cache


class CompositionGeneration(GenerationMixin):
    """The methods of ComposedForCausalLM that make transformers' generate work."""

    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    depths: list[int]
    pairs: list[tuple[int, int, int]]

    def _augmenter(self, index: int) -> PreTrainedModel:
        return cast(PreTrainedModel, self.augmenters[index])

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: continuous batching has one cache for all rows."""
        raise ValueError(
            "continuous batching (generate_batch, paged caches): a composition cannot run it, because its packed rows "
            "have 4-D masks and one cache for all parts; use generate() with left padding"
        )

    def new_cache(self, anchor_cache: Cache | None = None) -> ComposedCache:
        """Return an empty cache for generation around `anchor_cache` (default, a new DynamicCache)."""
        parts = [self.anchor, *map(self._augmenter, range(len(self.augmenters)))]
        texts = [part.config.get_text_config(decoder=True) for part in parts]
        anchor_cache = DynamicCache(config=texts[0]) if anchor_cache is None else anchor_cache
        caches = [cache_of_first_layers(text, depth) for text, depth in zip(texts[1:], self.depths, strict=True)]
        return ComposedCache(anchor_cache, caches, len(self.pairs))

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # generate() reads the mask's shape before the first forward
        check_tensors(**{name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")})
        check_left_padded(model_kwargs.get("attention_mask"))
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]  # transformers' own self type

    def _prepare_cache_for_generation(  # type: ignore[override]  # passes on what a release adds
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        for name in ("augmenter_input_ids", "augmenter_attention_mask", "augmenter_position_ids", "lo", "hi"):
            if model_kwargs.get(name) is not None:
                got = "a value. Call forward step by step for an augmenter with tokens of its own"
                raise bad_value("generate", name, "None, because every part reads the anchor's tokens", got)
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # transformers' own self type
            generation_config, model_kwargs, *args, **kwargs
        )
        name = generate_argument()
        cache = model_kwargs.get(name)
        # transformers made it: a user's cache of another kind is refused in generate()
        if cache is not None and not isinstance(cache, ComposedCache):
            model_kwargs[name] = self.new_cache(cache)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' generate; a ComposedCache is taken and returned as ``cache`` and as ``past_key_values``.

        Raises ValueError for a cache passed under two names, or one that is not a ComposedCache.
        """
        cache = own_cache(**{name: kwargs.pop(name, None) for name in NAMES})
        if cache is not None:
            kwargs[generate_argument()] = cache
        outputs = super().generate(*args, **kwargs)
        return alias_cache(outputs, cache_of(outputs)) if isinstance(outputs, ModelOutput) else outputs
