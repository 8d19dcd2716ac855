"""Generation with a composed model: its cache, and transformers' generate around it."""

from __future__ import annotations

import functools
from typing import Any, NoReturn, cast

import torch
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value
from calm_fast.hf.aligned_calls import prompt_ends
from calm_fast.hf.aligned_text import AlignedText, Aligner
from calm_fast.hf.cache import AROUND, ComposedCache, Identity, cache_of_first_layers, is_empty
from calm_fast.hf.cache_names import NAMES, alias_cache, cache_of, generate_argument, given_cache
from calm_fast.hf.encoded_text import EncodedText
from calm_fast.hf.encoders import Encoder
from calm_fast.hf.inputs import WHERE, check_ids, check_tensors
from calm_fast.hf.layers import cache_depth
from calm_fast.hf.masks import check_prompt
from calm_fast.hf.recompute import without_cache
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


def _prompt_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many tokens the prompts given to generate have, padding and cached tokens included."""
    ids = args[0] if args and args[0] is not None else kwargs.get("inputs", kwargs.get("input_ids"))
    # transformers starts with one token of its own if there are none, and takes only the new ids if a mask is longer
    given = [t.shape[1] for t in (ids, kwargs.get("attention_mask")) if isinstance(t, torch.Tensor) and t.ndim == 2]
    return max(given, default=1)


def _goes_on_drafting(cache: ComposedCache | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if a draft goes on: the tokens that came meanwhile are no prompt."""
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    return cache is not None and bool(getattr(config, "is_assistant", False)) and cache.get_seq_length() > 0


def for_forward(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a step without the tokenizers for `stop_strings` and drafts, which generate leaves in."""
    return {name: value for name, value in inputs.items() if name not in ("tokenizer", "assistant_tokenizer")}


class RefusedGeneration(GenerationMixin):
    """The ways to generate that no composition can offer, refused by name."""

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: continuous batching has one cache for all rows."""
        raise ValueError(
            "continuous batching (generate_batch, paged caches): a composition cannot run it, because its packed rows "
            "have 4-D masks and one cache for all parts; use generate() with left padding"
        )

    def _check_drafts(self, generation_config: Any) -> None:
        """Refuse the ways to draft that run a part of the model by itself."""
        for name in ("assistant_early_exit", "use_mtp", "speculation_type"):
            value = getattr(generation_config, name, None)
            if value:
                got = f"{value!r}. Draft with `assistant_model`, for instance the anchor, or `prompt_lookup_num_tokens`"
                raise bad_value("generate", name, "None, because a composition has no layers of its own to run", got)


class CompositionGeneration(RefusedGeneration):
    """The methods of ComposedForCausalLM that make transformers' generate work."""

    config: Any
    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    pairs: list[tuple[int, int, int]]
    identity: Identity
    aligned: bool  # True if the model makes an augmenter's text: for another tokenizer, or a bidirectional augmenter
    encoders: list[Encoder | None]  # how each bidirectional augmenter is called
    recomputes: str  # why no cache can be kept, or "": a part has no transformers Cache
    told: bool  # True once generate has said so
    _aligners: list[Aligner | None]

    def new_cache(self, anchor_cache: Cache | None = None, max_length: int = 0) -> ComposedCache:
        """Return an empty cache for generation around `anchor_cache` (default, a new DynamicCache).

        max_length: make every part of a fixed size, for at most so many tokens. A decoding step without a mask then has
        the same shapes each time and reads no count on the host: torch.compile traces it once, and a CUDA graph can
        hold it. For augmenters that read the anchor's tokens, and families whose layers all have full attention.
        Raises ValueError for a max_length with an anchor_cache, or over augmenters with another tokenizer or
        bidirectional ones.
        """
        if self.recomputes:
            expected = "a composition whose parts all have a cache"
            raise bad_value("new_cache", "self", expected, f"one in which {self.recomputes}")
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0:
            raise bad_value("new_cache", "max_length", "a number of tokens, or 0 for a growing cache", repr(max_length))
        if max_length and (anchor_cache is not None or self.aligned):
            reader = "an augmenter with another tokenizer, or a bidirectional one"
            got = "an anchor_cache" if anchor_cache is not None else reader
            raise bad_value("new_cache", "max_length", "0 with it", f"{max_length} and {got}")
        parts = [self.anchor, *(cast(PreTrainedModel, augmenter) for augmenter in self.augmenters)]
        texts = [part.config.get_text_config(decoder=True) for part in parts]
        if anchor_cache is None:
            fixed = max_length > 0
            anchor_cache = StaticCache(texts[0], max_length) if fixed else DynamicCache(config=texts[0])
        views = zip(self.augmenters, self.config.augmenter_layers, strict=True)
        filled = [cache_depth(cast(PreTrainedModel, view), path) for view, path in views]
        of_parts = zip(texts[1:], filled, self.encoders, strict=True)
        # a bidirectional augmenter keeps nothing
        caches = [cache_of_first_layers(t, n, max_length) if e is None else DynamicCache() for t, n, e in of_parts]
        readers = [augmenter for augmenter, _, _ in self.pairs]
        cache = ComposedCache(anchor_cache, caches, len(self.pairs), self.identity.name, readers, max_length)
        if self.aligned:
            both = zip(self._aligners, self.encoders, strict=True)
            cache.texts = [EncodedText() if e is not None else None if a is None else AlignedText() for a, e in both]
        return cache

    def own_cache(self, **given: Any) -> ComposedCache | None:
        """Return the cache that was passed under one of its names as a ComposedCache of this composition, or None.

        An empty cache of transformers is taken as the anchor's. The user's object remembers the ComposedCache around
        it, so that it continues when it comes again, also as a deep copy.

        Raises ValueError for a cache under two names, one that another model filled, or one of another kind.
        """
        name, cache = given_cache(**given)
        if cache is None:
            return None
        if self.recomputes:
            got = f"a {type(cache).__name__}. Pass all tokens in every call"
            raise bad_value(WHERE, name, f"None, because {self.recomputes}", got)
        if not isinstance(cache, ComposedCache):
            return self._around(name, cache)
        if cache.owner != self.identity.name:
            expected = "a cache that this composition filled, or an empty DynamicCache"
            got = "the ComposedCache of another composition, or of one that was loaded or copied before"
            raise bad_value(WHERE, name, expected, got)
        return cache

    def _caches(self, cache: ComposedCache | None, use_cache: bool | None, learns: bool) -> bool | None:
        """Return True if a call has or starts a cache, False if not, None if it would start one by default.

        learns: the call has labels or is in training mode. Raises ValueError for use_cache=True over a part without a
        transformers Cache.
        """
        if cache is not None:
            return True
        if self.recomputes and use_cache:
            got = "True. Pass all tokens in every call; generate does so by itself"
            raise bad_value(WHERE, "use_cache", f"False or None, because {self.recomputes}", got)
        if self.recomputes or (use_cache is None and (learns or not self.config.use_cache)):
            return False
        return use_cache

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
        if model_kwargs.get("augmenter_hidden_states") is not None:
            got = "a value. Leave it out: the augmenters read the text that grows"
            raise bad_value("generate", "augmenter_hidden_states", "None", got)
        self._check_drafts(generation_config)
        if model_kwargs.get("prefix_lengths") is not None and (generation_config.guidance_scale or 1) != 1:
            got = "a value, which the text without the prompt could not have. Generate without guidance"
            raise bad_value("generate", "prefix_lengths", "None with guidance_scale", got)
        if self.recomputes:
            without_cache(self.recomputes, generation_config, self.told)
            self.told = True
        # the caller's mask, or one that transformers made from pad tokens
        all_real = check_prompt(model_kwargs.get("attention_mask"), generation_config.use_cache is not False)
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
        if isinstance(cache, ComposedCache):
            cache.expect(generation_config.max_length)
            cache.all_real = all_real and cache.padded is False
            self._begin_texts(cache, generation_config, model_kwargs)

    def _begin_texts(self, cache: ComposedCache, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Tell the texts of `cache` where the prompts end and which tokens end a row.

        The end of the prompts leaves `model_kwargs`, which a draft model would get too.
        """
        ends = model_kwargs.pop("prompt_length", None)
        stops = generation_config.eos_token_id
        for text in cache.texts:
            if text is not None:
                text.prompt = text.prompt if ends is None else prompt_ends(ends)
                text.stops = frozenset(stops if isinstance(stops, (list, tuple)) else [] if stops is None else [stops])

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Return transformers' processors; the one for classifier-free guidance learns where its prompt ends.

        It runs the model on a text of its own, and without a cache it reads that from the start in every step.
        """
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]  # transformers' own self type
        for processor in processors if self.aligned else ():
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                ids = processor.unconditional_context["input_ids"]
                # by default the text without the prompt is the prompt's last token
                length = ids.shape[1] if isinstance(ids, torch.Tensor) else 1
                processor.model = functools.partial(cast(nn.Module, self), prompt_length=length)
        return processors

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())  # generate reads the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare inputs as transformers does, without a mask in a generation that began with real tokens only.

        generate extends the mask by ones. Read on a GPU it would stop every step; unread it would cost kernels.
        """
        inputs = for_forward(super().prepare_inputs_for_generation(*args, **kwargs))
        if getattr(kwargs.get(generate_argument()), "all_real", False):
            inputs.pop("attention_mask", None)
        return inputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' generate; the cache is returned as ``cache`` and as ``past_key_values``.

        It is taken under these names too: a ComposedCache, or an empty cache of transformers, which may be passed again
        turn after turn. No parameter may change meanwhile (`calm_fast.fixed_weights`). Raises ValueError as own_cache
        does, and for a prompt without a token.
        """
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if isinstance(ids, torch.Tensor) and ids.ndim == 2:
            check_ids("input_ids", ids, empty=False)
        if kwargs.get("prefix_lengths") is not None and kwargs.get("assistant_model") is not None:
            got = "a value, which the draft model would get too. Draft with `prompt_lookup_num_tokens`"
            raise bad_value("generate", "prefix_lengths", "None with assistant_model", got)
        cache = self.own_cache(**{name: kwargs.pop(name, None) for name in NAMES})
        if self.aligned and kwargs.get("prompt_length") is None and not _goes_on_drafting(cache, args, kwargs):
            kwargs["prompt_length"] = _prompt_tokens(args, kwargs)
        with fixed_weights(cast(nn.Module, self)):
            if cache is None:
                outputs = super().generate(*args, **kwargs)
                cache = cache_of(outputs) if isinstance(outputs, ModelOutput) else None
                if isinstance(cache, ComposedCache):
                    cache.end_generation()
            else:
                _check_goes_on(cache, ids if kwargs.get("attention_mask") is None else kwargs["attention_mask"])
                begun = cache.begin()
                try:
                    outputs = super().generate(*args, **kwargs, **{generate_argument(): cache})
                finally:
                    cache.end_generation()
                    if begun:
                        cache.end()
        return alias_cache(outputs, cache_of(outputs)) if isinstance(outputs, ModelOutput) else outputs
