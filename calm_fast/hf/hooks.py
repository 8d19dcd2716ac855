"""Forward hooks that read augmenter states and add residuals, active only during the forward of a composed model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from calm_fast.core.checks import describe
from calm_fast.hf.connections import EMBEDDING

ANCHOR = "anchor"  # Frame.stage while the anchor runs
Residual = Callable[[int, torch.Tensor], torch.Tensor]


def _no_residual(layer: int, hidden: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(f"Frame: no composed model is running, so anchor layer {layer} has no residual")


class Frame:
    """State that one forward of a composed model shares with its hooks.

    ``stage`` is the index of the augmenter that runs, ANCHOR while the anchor runs, and None outside of a forward, when
    every hook does nothing. ``states`` holds hidden states (B, N, DA) by (augmenter, augmenter layer).
    ``residual(layer, hidden)`` returns `hidden` (B, M, DB) with the residuals of anchor layer `layer` added.

    Hooks refer to the frame and not to the composition. An anchor therefore never keeps a composition alive, a deep
    copy of a composition gets its own frame, and the hooks of a deep copy of an anchor alone do nothing.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the current forward."""
        self.stage: int | str | None = None
        self.states: dict[tuple[int, int], torch.Tensor] = {}
        self.residual: Residual = _no_residual

    def snapshot(self) -> tuple[Any, ...]:
        """Return the state for restore()."""
        return self.stage, self.states, self.residual

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        """Set the state that snapshot() returned."""
        self.stage, self.states, self.residual = snapshot


def _checked(hidden: Any, layer: nn.Module) -> torch.Tensor:
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        got = f"shape {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else describe(hidden)
        raise ValueError(
            f"ComposedForCausalLM: `connections` must name layers whose hidden states are (batch, tokens, width), "
            f"{type(layer).__name__} cannot be connected: got {got}"
        )
    return hidden


def _entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return _checked(args[0] if args else kwargs.get("hidden_states"), layer)


def _leaving(layer: nn.Module, output: Any) -> torch.Tensor:
    return _checked(output[0] if isinstance(output, tuple) else output, layer)


def read_entering(frame: Frame, key: tuple[int, int], layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Pre-hook of an augmenter's layer 0: keep the embedding output, which includes positions and scaling."""
    if frame.stage == key[0]:
        frame.states[key] = _entering(layer, args, kwargs)


def read_leaving(frame: Frame, key: tuple[int, int], layer: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of an augmenter's layer: keep its hidden state."""
    if frame.stage == key[0]:
        frame.states[key] = _leaving(layer, output)


def add_entering(frame: Frame, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Pre-hook of the anchor's layer 0: add the residuals of the embedding output."""
    if frame.stage != ANCHOR:
        return None
    hidden = frame.residual(index, _entering(layer, args, kwargs))
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def add_leaving(frame: Frame, index: int, layer: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of an anchor layer: add its residuals and keep the rest of a tuple output (BLOOM, Falcon, MPT)."""
    if frame.stage != ANCHOR:
        return None
    hidden = frame.residual(index, _leaving(layer, output))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def install(
    owner: nn.Module,
    pairs: Sequence[tuple[int, int, int]],
    frame: Frame,
    anchor_layers: nn.ModuleList,
    augmenter_layers: Sequence[nn.ModuleList],
) -> None:
    """Register the hooks of `pairs`, each (augmenter, augmenter layer, anchor layer).

    The hooks are removed when `owner` is garbage-collected. Anchor hooks are prepended, so that the hidden states
    which transformers records include the residual.
    """
    handles = []
    for augmenter, a in sorted({pair[:2] for pair in pairs}):
        layer = augmenter_layers[augmenter][max(a, 0)]
        if a == EMBEDDING:
            hook = partial(read_entering, frame, (augmenter, a))
            handles.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(partial(read_leaving, frame, (augmenter, a)), prepend=True))
    for b in sorted({pair[2] for pair in pairs}):
        layer = anchor_layers[max(b, 0)]
        if b == EMBEDDING:
            handles.append(
                layer.register_forward_pre_hook(partial(add_entering, frame, b), prepend=True, with_kwargs=True)
            )
        else:
            handles.append(layer.register_forward_hook(partial(add_leaving, frame, b), prepend=True))
    weakref.finalize(owner, _remove, handles)


def checkpoint_in_eval(
    layer: nn.Module, frame: Frame, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any
) -> Any:
    """Checkpoint a frozen layer with its dropout off, in the forward and in the replay.

    transformers checkpoints a layer only if ``layer.training`` is set. In some releases the hooks run inside the
    checkpoint. Its replay comes after the forward has ended, so the frame is restored for it.
    """
    active = frame.snapshot()

    def run_in_eval(*inputs: Any) -> Any:
        training, layer.training = layer.training, False
        current = frame.snapshot()
        frame.restore(active)
        try:
            return run(*inputs)
        finally:
            layer.training = training
            frame.restore(current)

    return checkpoint(run_in_eval, *args)
