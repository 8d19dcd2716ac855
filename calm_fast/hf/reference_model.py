"""A frozen copy of a composition that shares its parts: the reference model of preference training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.hf.composition import Composition
from calm_fast.hf.hooks import install
from calm_fast.hf.wrappers import distribution

_WHERE = "frozen_copy"


def frozen_copy(model: Composition) -> Composition:
    """Return a copy of a composition whose connections are its own and frozen, and whose parts are those of `model`.

    DPOTrainer and KTOTrainer compare a model in training with how it was before (`ref_model`). A deep copy would hold
    every part twice; this holds the connections twice. Make it before the trainer, which replaces the model's forward.
    It gives the logits that `model` gives now, bit for bit, whatever becomes of the connections of `model`.

    ``parameters()`` of the copy are those of its connections only, so that nothing updates the shared parts through it:
    TRL's `sync_ref_model` stops with an error, and needs ``copy.deepcopy(model)``.

    The copy refuses to run once a shared part trains or has got an adapter (PEFT): it would follow that part.

    Raises:
        TypeError: `model` is no composition.
        ValueError: a part of it trains, it is distributed, or its forward has been replaced.
    """
    if not isinstance(model, Composition):
        raise bad_type(_WHERE, "model", "a composition (of compose, not wrapped)", model)
    parts = (model.anchor, *model.augmenters)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("connections.")]
    if trained:
        got = f"{trained[0]} that trains ({len(trained)} in all). Take copy.deepcopy(model)"
        raise bad_value(_WHERE, "model", "a composition whose parts are frozen", got)
    if by := distribution(model):
        raise bad_value(_WHERE, "model", "one that is not distributed yet", f"one under {by}. Copy it first")
    if "forward" in vars(model):
        got = "one that a trainer, accelerate or torch has given another. Copy it first"
        raise bad_value(_WHERE, "model", "one with the forward of its class", got)
    shared: list[Any] = [module for part in parts for module in part.modules()]
    shared += [part.config for part in parts] + [*model.tokenizers, *model.aligners, model.hooks]
    copied: Any = copy.deepcopy(model, {id(one): one for one in shared})
    path, augmenter_paths = str(model.config.anchor_layers), model.config.augmenter_layers
    layers = [view.get_submodule(str(name)) for view, name in zip(model.augmenters, augmenter_paths, strict=True)]
    copied.hooks = install(copied.pairs, model.anchor.get_submodule(path), layers)  # type: ignore[arg-type]
    copied.connections.requires_grad_(False)
    copied.frozen_parts = copied.names_of_parts()
    copied.parameters = partial(_own_parameters, copied)
    return copied.eval()


def _own_parameters(model: Composition, recurse: bool = True) -> Iterator[nn.Parameter]:
    """Stand in for `parameters` of a frozen copy."""
    return model.connections.parameters() if recurse else iter(())
