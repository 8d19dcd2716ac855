"""The source of an encoder-decoder composition: what the anchor's encoder and the augmenters make of it, once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__

from calm_fast.core.checks import bad_value
from calm_fast.hf.aligned_calls import align_call
from calm_fast.hf.encoded_calls import source_reading
from calm_fast.hf.hooks import Frame, switch
from calm_fast.hf.inputs import WHERE, AugmenterCall, Tokens, check_ids, check_tensors, check_vocabulary, per_augmenter
from calm_fast.hf.masks import Visibility, check_shape, given_visibility
from calm_fast.hf.recompute import begin_turn, end_turn
from calm_fast.hf.trials import check_padding, try_encoders

if TYPE_CHECKING:
    from calm_fast.hf.seq2seq import ComposedForSeq2SeqLM

_NOT_OF_ENCODERS = ("labels", "use_cache")  # generate passes on what it was given


class AugmenterStates(NamedTuple):
    """What the augmenters have made of the source.

    states: (B, N, DA) of every connected augmenter layer, by (augmenter, layer). lo, hi: (B, 1) int32 per augmenter,
    the interval of real tokens among these states; None if every token is real.
    """

    states: dict[tuple[int, int], torch.Tensor]
    lo: tuple[torch.Tensor | None, ...]
    hi: tuple[torch.Tensor | None, ...]


@dataclass
class SourceOutput(BaseModelOutput):
    """The output of ``model.get_encoder()``, which forward and generate take as ``encoder_outputs``.

    last_hidden_state (B, N, DB), hidden_states, attentions: of the anchor's encoder.
    encoder: the whole output of that encoder.
    layers: the connected augmenter layers, (augmenter, layer) pairs. augmenter_states: their states (B, N, DA).
    augmenter_lo, augmenter_hi: per augmenter the interval of real tokens, (B, 1) int32, or None for all.
    """

    encoder: ModelOutput | None = None
    layers: tuple[tuple[int, int], ...] | None = None
    augmenter_states: tuple[torch.Tensor, ...] | None = None
    augmenter_lo: tuple[torch.Tensor | None, ...] | None = None
    augmenter_hi: tuple[torch.Tensor | None, ...] | None = None

    @classmethod
    def of(cls, encoder: ModelOutput, read: AugmenterStates) -> SourceOutput:
        own = {name: encoder.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        states = tuple(read.states.values())
        return cls(**own, encoder=encoder, layers=tuple(read.states), augmenter_states=states,
                   augmenter_lo=read.lo, augmenter_hi=read.hi)  # fmt: skip

    def of_encoder(self) -> ModelOutput:
        """Return the output that the anchor takes as its encoder's, with this object's last_hidden_state."""
        assert self.encoder is not None
        return type(self.encoder)(**{**self.encoder, "last_hidden_state": self.last_hidden_state})

    def of_augmenters(self) -> AugmenterStates:
        """Return what the augmenters have made of the source."""
        assert self.layers is not None and self.augmenter_states is not None
        assert self.augmenter_lo is not None and self.augmenter_hi is not None
        states = dict(zip(self.layers, self.augmenter_states, strict=True))
        return AugmenterStates(states, self.augmenter_lo, self.augmenter_hi)

    def shallow_copy(self) -> SourceOutput:
        """Return a shallow copy: generate repeats the rows of the object that it gets."""
        return type(self)(**{field.name: getattr(self, field.name) for field in fields(self)})

    def repeat_augmenters(self, times: int) -> None:
        """Repeat every row of what the augmenters have read `times` times, in place; generate does so with the rest."""
        for name in ("augmenter_states", "augmenter_lo", "augmenter_hi"):
            rows = (None if t is None else t.repeat_interleave(times, dim=0) for t in getattr(self, name))
            setattr(self, name, tuple(rows))


class ComposedEncoder(nn.Module):
    """The encoder of a composition: the anchor's, and the augmenters. A view that holds nothing of its own."""

    main_input_name = "input_ids"

    def __init__(self, model: ComposedForSeq2SeqLM) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        augmenter_input_ids: Any = None,
        augmenter_attention_mask: Any = None,
        **kwargs: Any,
    ) -> SourceOutput:
        """Read the source.

        Args:
            input_ids: (B, N) int64 or int32. attention_mask: (B, N), 1 = real.
            augmenter_input_ids, augmenter_attention_mask: see `ComposedForSeq2SeqLM.forward`.
            kwargs: go to the anchor's encoder.
        Returns:
            a SourceOutput, to be passed on as ``encoder_outputs``.
        Raises:
            ValueError naming the argument.
        """
        with renamed_errors(self.model.where):
            read = read_source(self.model, input_ids, attention_mask, augmenter_input_ids, augmenter_attention_mask)
        anchor = self.model.anchor
        encoder: Any = anchor.get_encoder()
        parameters = inspect.signature(encoder.forward).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            kwargs = {name: value for name, value in kwargs.items() if name in parameters}
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_OF_ENCODERS}
        device = self.model.signatures[0].device(anchor)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        own = {name: value.to(device) for name, value in given.items() if value is not None}
        return SourceOutput.of(encoder(**own, **kwargs | {"return_dict": True}), read)


@contextmanager
def renamed_errors(where: str) -> Iterator[None]:
    """Let the errors of checks that all compositions share name the class `where`."""
    try:
        yield
    except (TypeError, ValueError) as problem:
        message = str(problem)
        if message.startswith(f"{WHERE}: "):
            problem.args = (where + message.removeprefix(WHERE),)
        raise


def read_source(
    model: ComposedForSeq2SeqLM,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    own_ids: Any = None,
    own_mask: Any = None,
) -> AugmenterStates:
    """Run every augmenter of `model` on the source.

    ids, mask: (B, N) of the anchor's encoder, which an augmenter reads unless it has own_ids: a tensor for all of them,
    or a list with a tensor or None for each; own_mask in the same way. An augmenter with an aligner reads the same text
    in its own tokens, all of it, because the source is known in full. A bidirectional augmenter reads each row in full.

    Raises ValueError naming the argument.
    """
    check_tensors(attention_mask=mask)
    if ids is not None:
        check_ids("input_ids", ids)
        if mask is not None:
            check_shape("attention_mask", mask, ids.shape[0], 0, ids.shape[1])
    external = {"augmenter_input_ids": own_ids, "augmenter_attention_mask": own_mask}
    if model.aligned and ids is not None:
        external |= {"augmenter_position_ids": None, "lo": None, "hi": None}
        streams = [None if encoder else one for one, encoder in zip(model.aligners, model.encoders, strict=True)]
        align_call(streams, ids, mask, None, external, None, False, 0, ids.shape[1])
    count = len(model.augmenters)
    own = [per_augmenter(name, external[name], count) for name in ("augmenter_input_ids", "augmenter_attention_mask")]
    calls = [_call(model, index, ids, mask, *given) for index, given in enumerate(zip(*own, strict=True))]
    if any(model.may_count):
        check_padding(model, WHERE, [None, *(call.inputs["attention_mask"] for call in calls)])
    frame = Frame(model.hooks.owner, {})
    begin_turn(model.stateful)
    before = switch(frame)
    try:
        model._read_augmenters(frame, calls, None, 0, {})
        model.hooks.check_read(frame, model.pairs)
    finally:
        switch(before)
        end_turn(model.stateful)
    seen = [call.visibility for call in calls]
    # without padding every token is read, and no bound is needed
    lo, hi = (tuple(None if one.lo is None else side for one, side in zip(seen, sides, strict=True)) for sides in
              ([one.lo for one in seen], [one.hi for one in seen]))  # fmt: skip
    return AugmenterStates(frame.states, lo, hi)


def _call(
    model: ComposedForSeq2SeqLM,
    index: int,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    own_ids: torch.Tensor | None,
    own_mask: torch.Tensor | None,
) -> AugmenterCall:
    """Return the tokens of augmenter `index`, and the interval (B, 1) of real ones that every decoder token reads."""
    name, mask_name = "augmenter_input_ids", "augmenter_attention_mask"
    if own_ids is None:
        if own_mask is not None:
            raise bad_value(WHERE, name, "given with an augmenter's own mask", "None")
        if ids is None:
            expected = "given where the augmenters have not read the source"
            got = "None. Pass it, or `encoder_outputs` of model.get_encoder(), which runs the augmenters too"
            raise bad_value(WHERE, "input_ids", expected, got)
        own_ids, own_mask, name, mask_name = ids, mask, "input_ids", "attention_mask"
    else:
        check_ids(name, own_ids)
        if ids is not None and own_ids.shape[0] != ids.shape[0]:
            raise bad_value(WHERE, name, f"of batch size {ids.shape[0]}", f"shape {tuple(own_ids.shape)}")
        if own_mask is not None:
            check_shape(mask_name, own_mask, own_ids.shape[0], 0, own_ids.shape[1])
    if model.encoders[index] is not None:
        return _encoded(model, index, own_ids, own_mask, own=name != "input_ids")
    check_vocabulary(name, own_ids, [model._augmenter(index)])
    batch, tokens = own_ids.shape
    everything = torch.full((batch, 1), tokens, dtype=torch.int32, device=own_ids.device)
    visible = given_visibility(None, everything, mask_name, own_mask, batch, 1, 0, tokens, False)
    # left padding must not move the positions of the text
    positions = None if own_mask is None else (own_mask.long().cumsum(1) - 1).clamp(min=0)
    return AugmenterCall(Tokens(input_ids=own_ids, attention_mask=own_mask, position_ids=positions), visible)


def _encoded(
    model: ComposedForSeq2SeqLM, index: int, ids: torch.Tensor, mask: torch.Tensor | None, own: bool
) -> AugmenterCall:
    """Return what bidirectional augmenter `index` reads. own: the ids are of its own tokenizer."""
    aligner: Any = model.aligners[index]
    reading = source_reading(aligner, ids, mask, own)
    try_encoders(model, {index: reading})
    check_vocabulary("augmenter_input_ids" if reading.own else "input_ids", reading.ids, [model._augmenter(index)])
    seen = Visibility(reading.lo, reading.hi, False, cacheable=True)
    return AugmenterCall(Tokens(input_ids=ids, attention_mask=None, position_ids=None), seen, None, reading)
