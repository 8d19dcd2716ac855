"""Forward hooks that read augmenter states and add residuals, active only inside a composed forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from calm_fast.hf.connections import EMBEDDING

ANCHOR = "anchor"


class Frame:
    """What one composed forward shares with its hooks.

    ``stage`` is None outside of a forward (every hook is then inert), the index of the augmenter that runs,
    or ANCHOR. The hooks hold the frame and nothing else: an anchor never keeps a composition alive, a deep
    copy of a composition gets its own frame, and a deep copy of an anchor alone gets inert hooks.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.stage: int | str | None = None
        self.states: dict[tuple[int, int], torch.Tensor] = {}
        self.residual: Callable[[int, torch.Tensor], torch.Tensor] | None = None

    def snapshot(self) -> tuple[Any, ...]:
        return self.stage, self.states, self.residual

    def restore(self, snapshot: tuple[Any, ...]) -> None:
        self.stage, self.states, self.residual = snapshot


def _checked(hidden: Any, layer: nn.Module) -> torch.Tensor:
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise ValueError(
            f"{type(layer).__name__} cannot be connected: expected hidden states (batch, tokens, width), got {shape}"
        )
    return hidden


def _entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return _checked(args[0] if args else kwargs.get("hidden_states"), layer)


def _leaving(layer: nn.Module, output: Any) -> torch.Tensor:
    return _checked(output[0] if isinstance(output, tuple) else output, layer)


def read_entering(frame: Frame, key: tuple[int, int], layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Pre-hook of an augmenter's layer 0: keep the embedding output, positions and scaling included."""
    if frame.stage == key[0]:
        frame.states[key] = _entering(layer, args, kwargs)


def read_leaving(frame: Frame, key: tuple[int, int], layer: nn.Module, args: Any, output: Any) -> None:
    """Hook of an augmenter's layer: keep its hidden state."""
    if frame.stage == key[0]:
        frame.states[key] = _leaving(layer, output)


def add_entering(frame: Frame, index: int, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    """Pre-hook of the anchor's layer 0: add the residuals of the embedding output."""
    if frame.stage != ANCHOR:
        return None
    hidden = frame.residual(index, _entering(layer, args, kwargs))
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def add_leaving(frame: Frame, index: int, layer: nn.Module, args: Any, output: Any) -> Any:
    """Hook of an anchor layer: add its residuals, keeping the rest of a tuple output (BLOOM, Falcon, MPT)."""
    if frame.stage != ANCHOR:
        return None
    hidden = frame.residual(index, _leaving(layer, output))
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def install(
    owner: nn.Module, frame: Frame, anchor_layers: nn.ModuleList, augmenter_layers: Sequence[nn.ModuleList]
) -> None:
    """Register the hooks of ``owner.pairs``; they go when ``owner`` is collected.

    Anchor hooks are prepended, so that transformers' own capture of hidden states records the state with
    residual.
    """
    handles = []
    for augmenter, a in sorted({pair[:2] for pair in owner.pairs}):
        layer = augmenter_layers[augmenter][max(a, 0)]
        if a == EMBEDDING:
            hook = partial(read_entering, frame, (augmenter, a))
            handles.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(partial(read_leaving, frame, (augmenter, a)), prepend=True))
    for b in sorted({pair[2] for pair in owner.pairs}):
        layer = anchor_layers[max(b, 0)]
        if b == EMBEDDING:
            hook = partial(add_entering, frame, b)
            handles.append(layer.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(partial(add_leaving, frame, b), prepend=True))
    weakref.finalize(owner, _remove, handles)


def checkpoint_in_eval(layer: nn.Module, frame: Frame, checkpoint: Callable, run: Callable, *args: Any) -> Any:
    """Checkpoint a frozen layer without its dropout, in the forward and in the replay.

    transformers checkpoints a layer only while ``layer.training``. In some releases the hooks run inside the
    checkpoint: a replay comes after the forward has ended and needs the frame as it was.
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
