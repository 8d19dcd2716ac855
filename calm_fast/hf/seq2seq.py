"""ComposedForSeq2SeqLM: a frozen encoder-decoder whose decoder reads frozen augmenters."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, cast

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value, describe
from calm_fast.hf.cache_names import alias_cache
from calm_fast.hf.causality import check_parts
from calm_fast.hf.composition import Composition
from calm_fast.hf.config import ComposedSeq2SeqConfig
from calm_fast.hf.hooks import ANCHOR, Frame, switch
from calm_fast.hf.inputs import check_ids, check_vocabulary
from calm_fast.hf.keywords import ANCHOR_ONLY
from calm_fast.hf.modes import check_modes
from calm_fast.hf.seq2seq_cache import ComposedSeq2SeqCache
from calm_fast.hf.seq2seq_generation import Seq2SeqGeneration
from calm_fast.hf.source import AugmenterStates, SourceOutput, read_source, renamed_errors

_NAME = "ComposedForSeq2SeqLM"


# GenerationMixin is named once more, because PreTrainedModel.can_generate looks for it among the direct bases
class ComposedForSeq2SeqLM(Seq2SeqGeneration, Composition, GenerationMixin):
    """A frozen encoder-decoder that reads frozen augmenters through trained cross-attention. ``compose`` builds it.

    After decoder layer b of every connection (a, b):

        H_B <- H_B + CrossAttention(H_B, H_A)

    H_A is the state after augmenter layer a for the source, the text that the encoder reads. The source is known in
    full before the decoder begins, so every decoder token reads all of its real tokens. Otherwise as
    `ComposedForCausalLM`: residuals at one layer add, and the parts stay frozen and in eval mode.

    anchor: an encoder-decoder language model, kept whole and shared with the caller.
    augmenters: causal LMs, or encoders that read the source in full (``bidirectional="prompt"``), kept as views without
    LM head and without the layers past the last connected one.
    connections: ``connections[i]`` is the CrossAttention of ``pairs[i]`` = (augmenter, augmenter layer, decoder layer).

    Several threads may run one instance, or instances that share parts. Source: CALM (arXiv 2401.02412) section 3.
    """

    config_class = ComposedSeq2SeqConfig
    where = _NAME
    encoder_decoder = True

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the decoder's ids for labels (B, M) by the anchor's own rule; DataCollatorForSeq2Seq calls this."""
        prepare: Any = self.anchor.prepare_decoder_input_ids_from_labels
        return cast(torch.Tensor, prepare(labels=labels))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        augmenter_input_ids: Any = None,
        augmenter_attention_mask: Any = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Return the logits of the composed model, with the anchor's own loss, hidden states and attentions.

        Args:
            input_ids: (B, N) int64 or int32, the source. attention_mask: (B, N), 1 = real; padding may stand anywhere.
            decoder_input_ids: (B, M); with a cache the new ones. decoder_attention_mask: (B, past + M).
            encoder_outputs: of ``model.get_encoder()``, instead of the source. Those of the anchor's own encoder need
                the source beside them, for the augmenters.
            cache: of this model's own outputs, or an empty EncoderDecoderCache; also taken as past_key_values.
            labels: (B, M); the anchor makes decoder_input_ids and the loss of them by its own rules.
            use_cache: default, True in eval mode without labels if the anchor's config says so.
            augmenter_input_ids: (B, N'), a source of the augmenters' own, of which every decoder token reads all real
                tokens; augmenter_attention_mask: (B, N'). Each is a tensor for all augmenters, or a list with a tensor
                or None for each.
            kwargs: go to the anchor, which must know them.
        Returns:
            the anchor's output; it holds the cache as ``cache`` and as ``past_key_values``.
        Raises:
            ValueError naming the argument.
        """
        with renamed_errors(_NAME):
            if self.unproven and not torch.compiler.is_compiling():
                check_parts(self, _NAME, defer=False)
            self._check_callable(kwargs)
            self._check_keywords(kwargs)
            own = self.own_cache(cache=cache, past_key_values=past_key_values)
            if own is None and use_cache is None:
                use_cache = self.config.use_cache and not self.training and labels is None
            if own is None and use_cache:
                own = self.new_cache()
            checkpoints = self.checkpoints if self.training and torch.is_grad_enabled() else {}
            if checkpoints and own is not None:
                raise bad_value(_NAME, "use_cache", "False while training with gradient checkpointing", "a cache")
            first = own is None or own.get_seq_length() == 0
            check_modes((self.anchor, *self.augmenters), self.training, every_module=first)
            if decoder_input_ids is not None:
                check_ids("decoder_input_ids", decoder_input_ids, empty=False)
                if first or decoder_input_ids.shape[1] > 1:
                    check_vocabulary("decoder_input_ids", decoder_input_ids, [self.anchor])
            if input_ids is not None and encoder_outputs is None:
                check_ids("input_ids", input_ids, empty=False)
                check_vocabulary("input_ids", input_ids, [self.anchor])
            if isinstance(encoder_outputs, SourceOutput):
                read, encoder_outputs = encoder_outputs.of_augmenters(), encoder_outputs.of_encoder()
            else:
                read = read_source(self, input_ids, attention_mask, augmenter_input_ids, augmenter_attention_mask)
            given = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "decoder_input_ids": decoder_input_ids,
                "decoder_attention_mask": decoder_attention_mask,
                "labels": labels,
                "encoder_outputs": encoder_outputs,
            }
            inputs = self._on_device({name: value for name, value in given.items() if value is not None} | kwargs)
            # a cache says enough, and some families hand use_cache to their encoder, which refuses it
            inputs |= {"use_cache": False} if own is None else {self.signatures[0].cache: own}
            frame = Frame(self.hooks.owner, checkpoints)
            frame.residual = partial(self._add_residuals, read, own)
            frame.stage = ANCHOR
            begun = own is not None and own.begin()
            before = switch(frame)
            try:
                outputs = self.anchor(**inputs, return_dict=True)
                self.hooks.check_added(frame, self.pairs)
            finally:
                switch(before)
                if begun and own is not None:
                    own.end()
            outputs = alias_cache(outputs, own)
        return outputs if return_dict is None or return_dict else outputs.to_tuple()

    def _add_residuals(
        self, read: AugmenterStates, cache: ComposedSeq2SeqCache | None, layer: int, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return `hidden` (B, M, DB), the state after decoder layer `layer`, plus the residual of each connection."""
        batch, m, _ = hidden.shape
        total: torch.Tensor | None = None
        for index in self.by_layer[layer]:
            augmenter, a, _ = self.pairs[index]
            state = read.states[augmenter, a].to(hidden.device)
            if state.shape[0] != batch:
                got = f"{batch} rows of the decoder. Repeat the rows of the source, or pass a new cache"
                raise bad_value(_NAME, "decoder_input_ids", f"of {state.shape[0]} rows, as many as the source", got)
            lo, hi = (
                None if side is None else side.to(hidden.device).expand(batch, m)
                for side in (read.lo[augmenter], read.hi[augmenter])
            )
            keys = None if cache is None else cache.connections[index]
            if keys is not None and keys.length:
                if keys.length != state.shape[1]:
                    got = f"one of {state.shape[1]} tokens. Pass a new cache for another source"
                    raise bad_value(_NAME, "encoder_outputs", f"the source of {keys.length} tokens in the cache", got)
                state = state[:, :0]
            elif keys is not None:
                keys.most = state.shape[1]
            out: torch.Tensor = self.connections[index](hidden, state, lo, hi, keys)
            total = out if total is None else total + (out - hidden)
        assert total is not None  # hooks are installed on connected layers only
        return total

    def _check_keywords(self, kwargs: dict[str, Any]) -> None:
        """Raise ValueError for an argument that the anchor does not name: families ignore unknown ones."""
        known = inspect.signature(self.anchor.forward).parameters
        for name, value in kwargs.items():
            if value is not None and name not in known and name not in ANCHOR_ONLY:
                raise bad_value(_NAME, name, f"an argument of {type(self.anchor).__name__}", describe(value))

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.signatures[0].device(self.anchor)
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
