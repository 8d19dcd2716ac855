"""What transformers' Trainer and other tools read off a model's class or attributes, answered for a composition.

Tools decide by names where a plain causal LM answers by its class: the shift of labels under label smoothing, the
normalisation of the loss under gradient accumulation, whether a cache can be rolled back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from transformers import PreTrainedModel
from typing_extensions import Self

from calm_fast.core.checks import bad_value


def takes_loss_arguments(model: PreTrainedModel) -> bool:
    """Return True if Trainer gives the loss of `model` the number of items in the batch, by Trainer's own rule."""
    stated = getattr(model, "accepts_loss_kwargs", None)
    if stated is not None:
        return bool(stated)
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


class CompositionIntrospection(PreTrainedModel):
    """The names and flags of ComposedForCausalLM that tools read."""

    anchor: PreTrainedModel

    def _describe_parts(self, anchor: PreTrainedModel, augmenters: Iterable[PreTrainedModel]) -> None:
        """Set the flags that follow from the parts."""
        # the anchor computes the loss, so Trainer must scale it as it scales the anchor's
        self.accepts_loss_kwargs = takes_loss_arguments(anchor)
        # Trainer counts the labels of a loss that shifts from the second on; a subclass may have any name
        self.loss_type = "ForCausalLM"
        # transformers refuses assisted generation where a state cannot be rolled back, be it an augmenter's
        self._is_stateful = any(getattr(part, "_is_stateful", False) for part in (anchor, *augmenters))

    def _get_name(self) -> str:
        """Return the name of the registered class, also for a subclass and under FSDP2, which renames the class.

        Trainer looks this name up to decide whether label smoothing shifts the labels.
        """
        return "ComposedForCausalLM"

    def train(self, mode: bool = True) -> Self:
        """Set the mode as CompositionTraining.train does. Raises ValueError if Trainer activated NEFTune."""
        alpha = getattr(self.anchor.get_input_embeddings(), "neftune_noise_alpha", None) if mode else None
        if alpha is not None:
            raise bad_value(
                "ComposedForCausalLM.train",
                "neftune_noise_alpha",
                "None, because NEFTune adds noise to embeddings in training mode and the parts stay in eval mode",
                f"{alpha}. Train without it; if a stopped run left it behind, delete the attribute from "
                "model.get_input_embeddings()",
            )
        return super().train(mode)
