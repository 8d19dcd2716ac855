"""Training and evaluation mode of a composed model, and gradient checkpointing of its anchor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import Self

from calm_fast.core.checks import bad_value
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.hooks import ANCHOR, Checkpoint, running
from calm_fast.hf.layers import find_layers, is_offloaded
from calm_fast.hf.modes import put_in_mode
from calm_fast.hf.quantised import check_connections_train


def make_checkpointable(layer: nn.Module) -> None:
    """Give `layer` a forward that checkpoints itself if the composed forward of this thread asks for it.

    The hooks of a composition stay outside, so a replay, which autograd may start in another thread, needs no frame.
    transformers checkpoints a layer only if ``layer.training`` is set, which would switch the frozen layer's dropout
    on, for everyone who shares the layer. Outside of such a forward the layer runs as before.
    """
    inner = layer.__dict__.get("forward")
    if not (isinstance(inner, partial) and inner.func is _forward):
        layer.forward = partial(_forward, layer, inner)


def _forward(layer: nn.Module, inner: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    # looked up now: FSDP2 changes the class of a layer
    run: Callable[..., Any] = partial(type(layer).forward, layer) if inner is None else inner
    frame = running()
    checkpoint = None if frame is None or frame.stage != ANCHOR else frame.checkpoints.get(layer)
    if checkpoint is None or not torch.is_grad_enabled():
        return run(*args, **kwargs)
    # a reentrant checkpoint records nothing without a positional argument that requires a gradient: adapters of the
    # layer would lose theirs
    if not any(isinstance(t, torch.Tensor) and t.requires_grad for t in args):
        return run(*args, **kwargs)
    return checkpoint(partial(run, **kwargs), *args)


class CompositionTraining(PreTrainedModel):
    """The methods of a composition that Trainer calls to train it."""

    config: ComposedConfig
    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    connections: nn.ModuleList
    checkpoints: dict[nn.Module, Checkpoint]
    pairs: list[tuple[int, int, int]]

    def train(self, mode: bool = True) -> Self:
        """Put the connections into training mode, and adapters that train inside the parts.

        The parts themselves stay in eval mode, so they never use dropout. Raises ValueError if the weights of a
        connection are quantised and nothing in it trains them.
        """
        if mode:
            check_connections_train(f"{self._get_name()}.train", self.connections)
            self.check_connections_stay(f"{self._get_name()}.train")
        changed, self.training = self.training != mode, mode
        # never into training mode and back: another thread may be running a part
        self.augmenters.training = mode
        for child in self.children():
            if child is not self.anchor and child is not self.augmenters:
                child.train(mode)
        for part in (self.anchor, *self.augmenters):
            put_in_mode(part, mode)
        if changed and getattr(self, "use_kernels", False):
            self.set_use_kernels(True)  # transformers' train does so too
        return self

    def check_connections_stay(self, where: str) -> None:
        """Raise ValueError if accelerate offloads connections that train: their gradients would be lost."""
        if is_offloaded(self.connections) and any(p.requires_grad for p in self.connections.parameters()):
            expected = "on a device of their own while they train"
            got = (
                "some that accelerate offloads, whose gradients are lost. Offload the parts before composing (each of "
            )
            got += 'them by cpu_offload), or give dispatch_model a device_map in which "connections" has a device'
            raise bad_value(where, "connections", expected, got)

    def _checkpointable(self) -> list[GradientCheckpointingLayer]:
        """Return the anchor layers that can be checkpointed above the first connected one.

        Their input always needs a gradient. Layers that are plain modules (CTRL's) cannot.
        """
        first = max(0, min(b for _, _, b in self.pairs))
        layers = list(find_layers(self.anchor, self.config.anchor_layers)[1])[first + 1 :]
        return [layer for layer in layers if isinstance(layer, GradientCheckpointingLayer)]

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        path, layers = find_layers(self.anchor, self.config.anchor_layers)
        if enable and not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
            raise ValueError(
                "gradient checkpointing: `anchor` must be a model whose layers transformers can checkpoint, got "
                f"{type(self.anchor).__name__} with {path!r}; train without gradient checkpointing"
            )
        self.checkpoints = {}
        for index, layer in enumerate(self._checkpointable()):
            # transformers reads the flag to tell whether it is on; the layer's own training flag stays off
            layer.gradient_checkpointing = enable and index % every_n_layers == 0
            layer._gradient_checkpointing_func = gradient_checkpointing_func  # type: ignore[assignment]  # undeclared
            if layer.gradient_checkpointing:
                make_checkpointable(layer)
                self.checkpoints[layer] = gradient_checkpointing_func

    def enable_input_require_grads(self) -> None:
        """Do nothing: the connections make states require grad, and inputs that do would replay frozen layers."""

    def disable_input_require_grads(self) -> None:
        """Do nothing, as enable_input_require_grads does."""
