"""Generation with a composed model: its cache, and transformers' generate around it."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value
from calm_fast.hf.cache import AROUND, ComposedCache, Identity, cache_of_first_layers, is_empty
from calm_fast.hf.cache_names import NAMES, alias_cache, cache_of, generate_argument, given_cache
from calm_fast.hf.inputs import WHERE, check_tensors
from calm_fast.hf.masks import check_left_padded
from calm_fast.modules.fixed_weights import fixed_weights


def _check_goes_on(cache: ComposedCache, text: Any) -> None:
    """Raise ValueError unless `text` (B, T), the mask or the ids given to generate, goes on after the cached tokens.

    transformers slices the ids by the difference, and reads tokens twice where it is not positive.
    """
    past = int(cache.get_seq_length())
    if past > 0 and isinstance(text, torch.Tensor) and text.ndim == 2 and text.shape[1] <= past:
        got = (
            f"{text.shape[1]} tokens. Pass a new cache for another text; crop one that holds the whole text by a token"
        )
        raise bad_value("generate", "input_ids", f"a whole text that goes on after the {past} tokens cached", got)


class CompositionGeneration(GenerationMixin):
    """The methods of ComposedForCausalLM that make transformers' generate work."""

    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    depths: list[int]
    pairs: list[tuple[int, int, int]]
    identity: Identity

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
        return ComposedCache(anchor_cache, caches, len(self.pairs), self.identity.name)

    def own_cache(self, **given: Any) -> ComposedCache | None:
        """Return the cache that was passed under one of its names as a ComposedCache of this composition, or None.

        An empty cache of transformers is taken as the anchor's. The user's object remembers the ComposedCache around
        it, so that it continues when it comes again, also as a deep copy.

        Raises ValueError for a cache under two names, one that another model filled, or one of another kind.
        """
        name, cache = given_cache(**given)
        if cache is None:
            return None
        if not isinstance(cache, ComposedCache):
            return self._around(name, cache)
        if cache.owner != self.identity.name:
            expected = "a cache that this composition filled, or an empty DynamicCache"
            got = "the ComposedCache of another composition, or of one that was loaded or copied before"
            raise bad_value(WHERE, name, expected, got)
        return cache

    def _around(self, name: str, cache: Any) -> ComposedCache:
        """Return the ComposedCache around a user's own cache."""
        expected = "a ComposedCache, or an empty cache of transformers like DynamicCache or StaticCache"
        if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
            raise bad_value(WHERE, name, expected, type(cache).__name__)
        if is_empty(cache):
            around = self.new_cache(cache)
            setattr(cache, AROUND, around)
            return around
        known = getattr(cache, AROUND, None)
        if isinstance(known, ComposedCache) and known.anchor is cache and known.owner == self.identity.name:
            if known.in_step():
                return known
            got = f"a {type(cache).__name__} that was changed since; crop or reset outputs.{name} instead"
            raise bad_value(WHERE, name, "as this composition left it", got)
        got = (
            f"a {type(cache).__name__} that another model filled. The augmenters have not read its tokens: pass an "
            "empty cache and all tokens"
        )
        raise bad_value(WHERE, name, expected, got)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # generate() reads the mask's shape before the first forward
        check_tensors(**{name: model_kwargs.get(name) for name in ("attention_mask", "position_ids")})
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]  # transformers' own self type

    def _prepare_cache_for_generation(  # type: ignore[override]  # passes on what a release adds
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        for name in ("augmenter_input_ids", "augmenter_attention_mask", "augmenter_position_ids", "lo", "hi"):
            if model_kwargs.get(name) is not None:
                got = "a value. Call forward step by step for an augmenter with tokens of its own"
                raise bad_value("generate", name, "None, because every part reads the anchor's tokens", got)
        self._check_drafts(generation_config)
        check_left_padded(model_kwargs.get("attention_mask"))  # the caller's, or made from pad tokens by transformers
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # transformers' own self type
            generation_config, model_kwargs, *args, **kwargs
        )
        name = generate_argument()
        cache: Cache | None = model_kwargs.get(name)
        # transformers made it: generate() has wrapped or refused a user's own
        if cache is not None and not isinstance(cache, ComposedCache):
            cache = model_kwargs[name] = self.new_cache(cache)
            if getattr(generation_config, "is_assistant", False) and hasattr(cache, "activate_past_recording"):
                cache.activate_past_recording()  # transformers has asked only the anchor's

    def _check_drafts(self, generation_config: Any) -> None:
        """Refuse the ways to draft that run a part of the model by itself."""
        for name in ("assistant_early_exit", "use_mtp", "speculation_type"):
            value = getattr(generation_config, name, None)
            if value:
                got = f"{value!r}. Draft with `assistant_model`, for instance the anchor, or `prompt_lookup_num_tokens`"
                raise bad_value("generate", name, "None, because a composition has no layers of its own to run", got)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' generate; the cache is returned as ``cache`` and as ``past_key_values``.

        It is taken under these names too: a ComposedCache, or an empty cache of transformers, which may be passed again
        turn after turn. No parameter may change meanwhile (`calm_fast.fixed_weights`). Raises ValueError as own_cache
        does.
        """
        cache = self.own_cache(**{name: kwargs.pop(name, None) for name in NAMES})
        with fixed_weights(cast(nn.Module, self)):
            if cache is None:
                outputs = super().generate(*args, **kwargs)
            else:
                ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
                _check_goes_on(cache, ids if kwargs.get("attention_mask") is None else kwargs["attention_mask"])
                begun = cache.begin()
                try:
                    outputs = super().generate(*args, **kwargs, **{generate_argument(): cache})
                finally:
                    if begun:
                        cache.end()
        return alias_cache(outputs, cache_of(outputs)) if isinstance(outputs, ModelOutput) else outputs
