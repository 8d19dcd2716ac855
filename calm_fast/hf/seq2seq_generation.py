"""Generation with a composition whose anchor is an encoder-decoder: transformers' generate around it."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value
from calm_fast.hf.cache import Identity
from calm_fast.hf.cache_names import NAMES, alias_cache, cache_of, generate_argument, given_cache
from calm_fast.hf.generation import RefusedGeneration, for_forward
from calm_fast.hf.seq2seq_cache import ComposedSeq2SeqCache, is_unused
from calm_fast.hf.source import ComposedEncoder, SourceOutput, renamed_errors
from calm_fast.modules.fixed_weights import fixed_weights


class Seq2SeqGeneration(RefusedGeneration):
    """The methods of ComposedForSeq2SeqLM that make transformers' generate work."""

    anchor: PreTrainedModel
    pairs: list[tuple[int, int, int]]
    identity: Identity
    where: ClassVar[str]

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder: the anchor's, and the augmenters, which read the same source."""
        if modality is not None:
            raise bad_value("get_encoder", "modality", "None, because the parts read text", repr(modality))
        return ComposedEncoder(self)  # type: ignore[arg-type]  # every such class is a ComposedForSeq2SeqLM

    def get_decoder(self, modality: str | None = None) -> nn.Module:
        """Return the anchor's decoder."""
        return cast(nn.Module, self.anchor.get_decoder())

    def new_cache(self, anchor_cache: EncoderDecoderCache | None = None) -> ComposedSeq2SeqCache:
        """Return an empty cache around that of the anchor (default, two new DynamicCaches)."""
        if anchor_cache is None:
            # of T5, only the decoder's own config counts its layers; what is read of a source never slides
            own = DynamicCache(config=self.anchor.get_decoder().config)
            anchor_cache = EncoderDecoderCache(own, DynamicCache())
        parts = anchor_cache.self_attention_cache, anchor_cache.cross_attention_cache
        return ComposedSeq2SeqCache(*parts, len(self.pairs), self.identity.name)

    def own_cache(self, **given: Any) -> ComposedSeq2SeqCache | None:
        """Return the cache that was passed under one of its names as a cache of this composition, or None.

        An empty EncoderDecoderCache is taken as the anchor's. Raises ValueError for a cache under two names, one that
        another model filled, or one of another kind.
        """
        name, cache = given_cache(**given)
        if cache is None:
            return None
        if isinstance(cache, ComposedSeq2SeqCache) and cache.owner == self.identity.name:
            return cache
        if not isinstance(cache, ComposedSeq2SeqCache) and is_unused(cache):
            return self.new_cache(cache)
        expected = "`cache` of this composition's own outputs, or an empty EncoderDecoderCache"
        raise bad_value(self.where, name, expected, f"another {type(cache).__name__}")

    def _prepare_cache_for_generation(  # type: ignore[override]  # passes on what a release adds
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        self._check_drafts(generation_config)
        if getattr(generation_config, "guidance_scale", None) not in (None, 1):
            got = f"{generation_config.guidance_scale}. transformers guides decoder-only models only"
            raise bad_value("generate", "guidance_scale", "None or 1 over an encoder-decoder", got)
        # families with caches of their own kind override this
        prepare: Any = self.anchor._prepare_cache_for_generation
        prepare(generation_config, model_kwargs, *args, **kwargs)
        name = generate_argument()
        cache = model_kwargs.get(name)
        if cache is not None and not isinstance(cache, ComposedSeq2SeqCache):
            model_kwargs[name] = self.own_cache(**{name: cache})

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **model_kwargs: Any) -> Any:
        """Repeat the rows of every input for beams and samples."""
        read = model_kwargs.get("encoder_outputs")
        if expand_size > 1 and isinstance(read, SourceOutput):
            read.repeat_augmenters(expand_size)
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]  # transformers' own self type
        return expand(expand_size, *args, **model_kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation, assigned=())  # generate reads the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare inputs as the anchor does."""
        prepare: Any = self.anchor.prepare_inputs_for_generation
        return for_forward(prepare(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Run transformers' generate; the augmenters read the source once, with the anchor's encoder.

        The cache is returned as ``cache`` and as ``past_key_values``. No parameter may change meanwhile
        (`calm_fast.fixed_weights`). Raises ValueError for a cache that holds tokens, because transformers would read
        them twice.
        """
        given = {name: kwargs.pop(name, None) for name in NAMES}
        cache = self.own_cache(**given)
        # a draft model gets its last draft's cache back, and transformers does not say where the new tokens begin
        drafting = getattr(kwargs.get("generation_config"), "is_assistant", False)
        if cache is not None and not drafting:
            if not is_unused(cache):
                got = "one with tokens. Generate without it, with the text so far as `decoder_input_ids`"
                raise bad_value("generate", "cache", "an empty cache", got)
            kwargs[generate_argument()] = cache
        read = kwargs.get("encoder_outputs")
        if isinstance(read, SourceOutput):
            kwargs["encoder_outputs"] = read.shallow_copy()
        with renamed_errors(self.where), fixed_weights(cast(nn.Module, self)):
            outputs = super().generate(*args, **kwargs)
        return alias_cache(outputs, cache_of(outputs)) if isinstance(outputs, ModelOutput) else outputs
