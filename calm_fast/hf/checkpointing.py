"""Gradient checkpointing of an anchor's layers, which stay in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from calm_fast.hf.hooks import ANCHOR, running


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
