"""Augmenters that train, through adapters or weights of their own: frozen by default, they run without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import nn

from calm_fast.core.checks import bad_value
from calm_fast.hf.inputs import WHERE


def trains(augmenter: nn.Module) -> bool:
    """Return True if autograd shall record `augmenter`: one of its parameters requires a gradient."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in augmenter.parameters())


def check_trained_parts(
    index: int, augmenter: nn.Module, layers_path: str, read: int, states: Iterable[torch.Tensor]
) -> None:
    """Raise ValueError if a parameter of augmenter `index` requires a gradient that it can never get.

    layers_path: of its decoder layers. read: how many of them are read by connections: 0 if those read the embedding
    output only. states: what they read in this forward. A parameter outside of the layers (embeddings, norms) must be
    reached from these. Layers that are read are trusted: experts and the like may have no token in one forward.
    """
    layers = augmenter.get_submodule(layers_path)
    names = {name: p for name, p in augmenter.named_parameters() if p.requires_grad}
    inside = {id(p) for p in layers.parameters()}
    for depth, layer in enumerate(layers.children()):
        dead = {id(p) for p in layer.parameters()} if depth >= read else set()
        found = [name for name, p in names.items() if id(p) in dead]
        if found:
            _refuse(index, found, f"layer {depth}, of which the connections read only the input")
    outside = {name: p for name, p in names.items() if id(p) not in inside}
    if outside and not torch.compiler.is_compiling():
        reached = _leaves(states)
        found = [name for name, p in outside.items() if id(p) not in reached]
        if found:
            _refuse(index, found, "a part that no connected layer depends on")


def _refuse(index: int, names: list[str], why: str) -> NoReturn:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    raise bad_value(
        WHERE,
        f"augmenters.{index}",
        "trainable only where the connections read it",
        f"requires_grad in {names[0]}{more}, in {why}. Call requires_grad_(False) on it, leave the module out of the "
        "adapter (PEFT's exclude_modules), or connect a later layer",
    )


def _leaves(states: Iterable[torch.Tensor]) -> set[int]:
    """Return the ids of the leaves that the graphs of `states` reach."""
    pending = [state.grad_fn for state in states]
    seen, found = set(pending), {id(state) for state in states}
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):  # of AccumulateGrad: the leaf that it adds to
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                pending.append(following)
    return found
