"""ComposedForCausalLM: a frozen anchor that reads frozen augmenters through trained cross-attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value
from calm_fast.core.dispatch import active_transform
from calm_fast.hf.cache import ComposedCache
from calm_fast.hf.cache_names import with_cache
from calm_fast.hf.callers import check_prompt_is_told
from calm_fast.hf.causality import check_parts
from calm_fast.hf.composition import Composition
from calm_fast.hf.cross_cache import FixedCrossLayer
from calm_fast.hf.generation import CompositionGeneration
from calm_fast.hf.given_states import given_states
from calm_fast.hf.hooks import ANCHOR, Frame, switch
from calm_fast.hf.inputs import (
    WHERE,
    AugmenterCall,
    Past,
    Tokens,
    augmenter_calls,
    check_ids,
    check_tensors,
    kept_positions,
    part_inputs,
    remember,
)
from calm_fast.hf.introspection import HeadlessForward
from calm_fast.hf.keywords import shared_keywords
from calm_fast.hf.modes import check_modes
from calm_fast.hf.prefixes import give_prefix_mask, read_prefix, widened
from calm_fast.hf.reading import TextCall, read_texts
from calm_fast.hf.recompute import begin_turn, end_turn
from calm_fast.hf.trials import check_padding, check_parts_separate, check_prefix_call


# GenerationMixin is named once more, because PreTrainedModel.can_generate looks for it among the direct bases
class ComposedForCausalLM(HeadlessForward, Composition, CompositionGeneration, GenerationMixin):
    """A frozen anchor that reads frozen augmenters through trained cross-attention. Build one with ``compose``.

    After anchor layer b of every connection (a, b):

        H_B <- H_B + CrossAttention(H_B, H_A)

    H_A is the state after augmenter layer a for the same tokens. Connections that end at the same anchor layer, of one
    augmenter or of several, all read H_B as that layer left it, and their residuals add. The parts stay in eval mode.
    Gradients flow through the anchor from its first connection up.

    anchor: a causal LM, kept whole and shared with the caller.
    augmenters: causal LMs, kept as views without LM head and without the layers past the last connected one.
    connections: ``connections[i]`` is the CrossAttention of ``pairs[i]`` = (augmenter, augmenter layer, anchor layer).

    Several threads may run one instance, or instances that share parts. Source: CALM (arXiv 2401.02412) section 3.
    """

    def _add_residuals(
        self,
        states: dict[tuple[int, int], torch.Tensor],
        calls: list[AugmenterCall],
        cache: ComposedCache | None,
        tokens: int,
        kept: int | torch.Tensor,
        layer: int,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """Return `hidden` (B, M, DB), the state after anchor layer `layer`, plus the residual of each connection.

        tokens: the number of anchor tokens given; M is it, or `kept`, the number of last tokens whose logits are asked
        for (Gemma 4 drops the others before its KV-sharing layers).
        """
        m = hidden.shape[1]
        if m != tokens and (not isinstance(kept, int) or m != kept):
            got = f"layer {layer}, a {self.hooks.adds[layer]}, which runs on {m}. Connect another layer"
            raise bad_value(WHERE, "connections", f"of anchor layers that run on the {tokens} tokens given", got)
        total: torch.Tensor | None = None
        for index in self.by_layer[layer]:
            augmenter, a, _ = self.pairs[index]
            state = states[augmenter, a].to(hidden.device)
            lo, hi, causal, *_ = calls[augmenter].visibility
            # layers may lie on several devices, and may run on the last tokens only
            lo, hi = (None if t is None else t.to(hidden.device)[..., -m:] for t in (lo, hi))
            keys = None if cache is None else cache.cross[index]
            if hi is None and isinstance(keys, FixedCrossLayer):
                hi, causal = keys.ends(tokens, m).to(hidden.device), False
            out: torch.Tensor = self.connections[index](hidden, state, lo, hi, keys, causal=causal)
            total = out if total is None else total + (out - hidden)
        assert total is not None  # hooks are installed on connected layers only
        return total

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        augmenter_input_ids: Any = None,
        augmenter_attention_mask: Any = None,
        augmenter_position_ids: Any = None,
        lo: Any = None,
        hi: Any = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        headless: bool = False,
        prompt_length: Any = None,
        prefix_lengths: Any = None,
        augmenter_hidden_states: Any = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Return the logits of the composed model, with the anchor's own loss, hidden states and attentions.

        Args:
            input_ids: (B, M) int64 or int32.
            attention_mask: (B, past + M), 1 = real; one block of ones per row if a cache is kept.
            position_ids: (1 or B, M); restarts separate documents if there is no mask and no cache, as in transformers.
            cache: a ComposedCache, or an empty cache of transformers, which becomes the anchor's and may be passed
                again; also taken as past_key_values or cache_params, its names before transformers 5.24.
            labels: (B, M), shifted by the anchor's loss.
            use_cache: default, True in eval mode without labels if the anchor's config says so.
            kwargs: what to return and num_items_in_batch go to the anchor; document limits (cu_seq_lens_q, seq_idx and
                so on) go to every part. Others are refused, because they would not reach the augmenters.
            augmenter_input_ids: (B, N), read by the augmenter instead of input_ids; requires hi. With a cache, the new
                ones, (B, 0) if there are none.
            augmenter_attention_mask: (B, past + N) for them; intervals leave out its padding. augmenter_position_ids:
                (1 or B, N).
            lo, hi: (B, M) int32; anchor token i reads the augmenter tokens lo <= j < hi, instead of the aligned causal
                rule.
        The last five are a tensor for all augmenters, or a list with a tensor or None for each.
            headless: True returns the output of the anchor's base model, with last_hidden_state and no logits.
            prompt_length: for augmenters with another tokenizer (`aligners`), whose text is made of input_ids unless
                augmenter_input_ids are given, and for bidirectional ones: how many tokens (padding and the cache's
                included) are the prompt, after which they get all text so far; an int, or int64 (B,) or (B, prompts).
                Default, the tokens of this call without a cache, or of the call that begins the cache; bidirectional
                augmenters need it in training and without a cache.
            prefix_lengths: how many tokens of a row (padding included) see each other, the later ones too: an int, or
                int64 (B,), within the call that begins a text. The anchor needs full attention in every layer, and
                labels in the prefix must be -100. Of a prefix each token reads what any of them may read.
            augmenter_hidden_states: states of a frozen augmenter that were computed before, in place of running it: a
                list with a tensor (B, connected layers, N, DA) or None (run it) per augmenter, a tensor for a single
                one. Layers ascend, N are the tokens that it would read; without a cache only. The caller answers for
                their values: `cache_augmenter_states` makes and checks them.
        Returns:
            the anchor's output; it holds the cache as ``cache`` and as ``past_key_values``.
        Raises:
            ValueError naming the argument.
        """
        if self.unproven and not torch.compiler.is_compiling():
            check_parts(self, WHERE, defer=False)
        self._check_callable(kwargs)
        if input_ids is None:
            raise bad_value(WHERE, "input_ids", "a tensor of token ids (batch, tokens)", "None")
        check_ids("input_ids", input_ids, empty=False)
        check_tensors(attention_mask=attention_mask, position_ids=position_ids, labels=labels)
        recurrent = kwargs.pop("cache_params", None)
        cache = self.own_cache(cache=cache, past_key_values=past_key_values, cache_params=recurrent)
        past = 0 if cache is None else cache.before(attention_mask is not None)
        inputs = Tokens(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        external = {
            "augmenter_input_ids": augmenter_input_ids,
            "augmenter_attention_mask": augmenter_attention_mask,
            "augmenter_position_ids": augmenter_position_ids,
            "lo": lo,
            "hi": hi,
        }
        cached = self._caches(cache, use_cache, self.training or labels is not None)
        texts: TextCall | None = None
        if self.aligned:
            if prompt_length is None and augmenter_input_ids is None and not torch.compiler.is_compiling():
                check_prompt_is_told(self.where)
            learns = self.training or labels is not None
            texts = read_texts(self, inputs, external, Past(past, cached, cache), prompt_length, learns)
        calls, uncacheable = augmenter_calls(len(self.augmenters), inputs, external, Past(past, cached, cache))
        if texts is not None:
            calls = texts.calls(calls)
        given = None
        if augmenter_hidden_states is not None:
            given = given_states(self, augmenter_hidden_states, calls, cache is not None or bool(use_cache))
            cached = False
        tracing = torch.compiler.is_compiling() or active_transform() is not None
        if any(self.may_count):
            check_padding(self, WHERE, [attention_mask, *(call.inputs["attention_mask"] for call in calls)])
        packed = uncacheable and attention_mask is None and position_ids is not None
        if packed and not self.separates and not tracing:
            assert position_ids is not None
            check_parts_separate(self, WHERE, position_ids)
        prefix = None
        if prefix_lengths is not None and (prefix := read_prefix(prefix_lengths, input_ids, past, cache)) is not None:
            check_prefix_call(self, prefix, packed, labels, kwargs)
            new = input_ids.shape[1]
            calls = [c if c.reading else c._replace(visibility=widened(c.visibility, prefix, new)) for c in calls]
        first = input_ids.shape[1] > 1 or past == 0  # the token of a decode step comes from the model itself
        check_modes((self.anchor, *self.augmenters), self.training, every_module=first)
        if (first or external["augmenter_input_ids"] is not None) and active_transform() is None:  # vmap hides ids
            self._check_vocabularies(calls, inputs, first)
        if cache is None and (not uncacheable if cached is None else cached):
            cache = self.new_cache()
        shared = {}
        if kwargs:
            aligned = all(value is None for value in external.values())
            separable = attention_mask is None and cache is None and aligned
            shared = shared_keywords(kwargs, input_ids, position_ids, separable, past)
        called, signature = self._anchor_body(labels) if headless else (self.anchor, self.signatures[0])
        if labels is not None:
            kwargs["labels"] = labels
        if headless:
            logits_to_keep = 0
        elif signature.logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep if tracing else kept_positions(logits_to_keep, input_ids)
        checkpoints = self.checkpoints if self.training and torch.is_grad_enabled() else {}
        if checkpoints and cache is not None:
            raise bad_value(WHERE, "use_cache", "False while training with gradient checkpointing", "a cache")
        frame = Frame(self.hooks.owner, checkpoints)
        begun = cache is not None and cache.begin()
        begin_turn(self.stateful)
        before = switch(frame)
        try:
            if cache is not None:
                remember(cache, past, inputs, calls)
                cache.prefix = cache.prefix if past > 0 else prefix_lengths
                if texts is not None:
                    texts.commit(cache)
            self._read_augmenters(frame, calls, cache, past, shared, given)
            self.hooks.check_read(frame, self.pairs)
            frame.residual = partial(
                self._add_residuals, frame.states, calls, cache, input_ids.shape[1], logits_to_keep
            )
            frame.stage = ANCHOR
            own = None if cache is None else cache.anchor
            prepared = part_inputs(self.anchor, signature, inputs, own, past)
            if prefix is not None:
                give_prefix_mask(self.anchor, prepared, prefix, inputs, own)
            outputs = called(**(prepared | kwargs), return_dict=True)
            self.hooks.check_added(frame, self.pairs)
            if cache is not None:
                cache.count(input_ids.shape[1])
        except IndexError:  # of an embedding
            self._check_vocabularies(calls, inputs)
            raise
        finally:
            switch(before)
            end_turn(self.stateful)
            if begun and cache is not None:
                cache.end()
        outputs = with_cache(outputs, cache, signature.generated)
        return outputs if return_dict is None or return_dict else outputs.to_tuple()
