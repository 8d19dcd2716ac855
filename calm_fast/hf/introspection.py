"""What transformers' Trainer and other tools read off a model's class or attributes, answered for a composition.

Tools decide by names where a plain causal LM answers by its class: the shift of labels under label smoothing, the
normalisation of the loss under gradient accumulation, whether a cache can be rolled back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # re-exported without __all__
from typing_extensions import Self

from calm_fast.core.checks import bad_value
from calm_fast.hf.cache_names import NAMES
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.inputs import WHERE, Signature
from calm_fast.hf.layers import headless_path, submodule
from calm_fast.hf.liger import register_compositions
from calm_fast.hf.recompute import lacks_cache, stateful_modules


def offsets_positions(model: PreTrainedModel) -> bool:
    """Return True if a table of learned positions has a row for padding, behind which a text begins (RoBERTa)."""
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    return any(isinstance(table, nn.Embedding) and table.padding_idx is not None for table in tables)


def takes_loss_arguments(model: PreTrainedModel) -> bool:
    """Return True if Trainer gives the loss of `model` the number of items in the batch, by Trainer's own rule."""
    stated = getattr(model, "accepts_loss_kwargs", None)
    if stated is not None:
        return bool(stated)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


class HeadlessComposition(nn.Module):
    """A composition without its LM head, as tools call ``model.base_model``: a view that holds nothing of its own.

    Returns the output of the anchor's own base model: last_hidden_state, whose product with the anchor's LM head gives
    the composed logits as far as the anchor's family does nothing else between them and after.
    """

    # transformers asks every base model for its plans to split it over devices
    _tp_plan = None
    _pp_plan = None

    def __init__(self, model: HeadlessForward) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput | tuple[Any, ...]:
        """Run ComposedForCausalLM.forward with headless=True.

        Raises ValueError if augmenters with another tokenizer would read a whole text of which nobody says where its
        prompt ends: tools that call a base model (TRL) do not, and generation would read the prompt otherwise.
        """
        told = any(kwargs.get(name) is not None for name in ("prompt_length", "augmenter_input_ids", *NAMES))
        if self.model.aligned and not told and kwargs.get("use_cache") is False:
            expected = (
                "given, or `augmenter_input_ids`, where a tool calls `base_model` of a composition that aligns texts"
            )
            got = "None. In TRL take AlignedCollator(model, tokenizer) as `data_collator` (docs/training_libraries.md)"
            raise bad_value(WHERE, "prompt_length", expected, got)
        # the class's forward: tools replace the instance's by one that calls the base model
        run = type(self.model).forward
        return cast("ModelOutput | tuple[Any, ...]", run(self.model, *args, headless=True, **kwargs))


class HeadlessForward(PreTrainedModel):
    """The names under which tools find ComposedForCausalLM without its LM head."""

    anchor: PreTrainedModel
    aligned: bool

    @property
    def base_model(self) -> nn.Module:
        """The composition without its LM head."""
        return HeadlessComposition(self)

    def get_decoder(self) -> nn.Module:
        return self.base_model

    def _anchor_body(self, labels: torch.Tensor | None) -> tuple[nn.Module, Signature]:
        """Return (the anchor without its LM head, its signature), for a headless forward."""
        if labels is not None:
            raise bad_value(WHERE, "labels", "None with headless=True, which computes no loss", "a value")
        body = self.anchor.base_model
        if body is self.anchor:
            body = submodule(
                self.anchor, headless_path(self.anchor, cast(ComposedConfig, self.config).anchor_layers or "")
            )
        if body is self.anchor:
            got = f"True, but {type(self.anchor).__name__} has no model inside that holds its layers"
            raise bad_value(WHERE, "headless", "False for this anchor", got)
        return body, Signature.of(self.anchor, body, where=WHERE, argument="anchor")


class CompositionIntrospection(PreTrainedModel):
    """The names and flags of a composition that tools read."""

    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    where: ClassVar[str]
    encoder_decoder: ClassVar[bool]
    signatures: list[Signature]
    encoders: list[Any]

    def _describe_parts(self, anchor: PreTrainedModel, augmenters: Iterable[PreTrainedModel]) -> None:
        """Set the flags that follow from the parts."""
        # the anchor computes the loss, so Trainer must scale it as it scales the anchor's
        self._takes_loss_arguments = takes_loss_arguments(anchor)
        # Trainer counts the labels of a loss that shifts from the second on; a subclass may have any name
        self.loss_type = anchor.loss_type if self.encoder_decoder else "ForCausalLM"
        models = (anchor, *augmenters)
        without = [f"{type(part).__name__} {why}" for part in models if (why := lacks_cache(part))]
        self.stateful = stateful_modules([self.anchor, self.augmenters] if without else [])
        # the augmenters of an encoder-decoder read its source once
        self.recomputes = "" if self.encoder_decoder else ", and ".join(dict.fromkeys(without))
        self.told = False
        # transformers refuses assisted generation where a state cannot be rolled back, be it an augmenter's
        self._is_stateful = bool(self.recomputes) or any(part._is_stateful for part in models)
        # parts that may read padding as text: without a Cache, whose forward takes no positions (BART's decoder), or
        # whose own positions begin behind their padding id (RoBERTa)
        tried = zip(self.signatures, (None, *self.encoders), (anchor, *augmenters), strict=True)
        self.may_count = [
            e is None and (bool(one.recomputes) or not one.position_ids or offsets_positions(part))
            for one, e, part in tried
        ]
        # by number (0 is the anchor), of such parts that were tried: True if padding does not matter to them
        self.leaves_out: dict[int, bool] = {}
        # by attention implementation, once the anchor was tried: why it takes no prefix mask, or ""
        self.prefix_problems: dict[str, str] = {}

    @property
    def accepts_loss_kwargs(self) -> bool:
        """True if Trainer shall give the loss the number of items.

        Trainer asks when it is built, which is the time to make compositions known to Liger.
        """
        register_compositions()
        return self._takes_loss_arguments

    def _get_name(self) -> str:
        """Return the name of the registered class, also for a subclass and under FSDP2, which renames the class.

        Trainer looks this name up to decide whether label smoothing shifts the labels.
        """
        return self.where

    def train(self, mode: bool = True) -> Self:
        """Set the mode as CompositionTraining.train does. Raises ValueError if Trainer activated NEFTune."""
        alpha = getattr(self.anchor.get_input_embeddings(), "neftune_noise_alpha", None) if mode else None
        if alpha is not None:
            raise bad_value(
                f"{self.where}.train",
                "neftune_noise_alpha",
                "None, because NEFTune adds noise to embeddings in training mode and the parts stay in eval mode",
                f"{alpha}. Train without it; if a stopped run left it behind, delete the attribute from "
                "model.get_input_embeddings()",
            )
        return super().train(mode)
