"""Where a transformers decoder keeps its layers, and a truncated view of it that shares every weight."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is not None else model.base_model


def find_layers(model: PreTrainedModel, path: str | None = None) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers of a transformers model.

    The rule: inside ``get_decoder()`` (else ``base_model``), the outermost ModuleList whose members are all
    ``GradientCheckpointingLayer``; there must be exactly one. ``path`` (dotted, from ``model``) overrides it.
    Returns (dotted path from ``model``, the ModuleList). Raises ValueError naming what was found otherwise.
    """
    name = type(model).__name__
    if path is not None:
        layers = dict(model.named_modules(remove_duplicate=False)).get(path)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise ValueError(f"layers_path: expected the path of a non-empty ModuleList of {name}, got {path!r}")
        return path, layers

    found: dict[str, nn.ModuleList] = {}
    for prefix, module in _decoder(model).named_modules():
        inside = any(prefix.startswith(outer + ".") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
            if all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
                found[prefix] = module
    if len(found) != 1:
        raise ValueError(
            f"layers_path: {name} has {len(found)} lists of decoder layers ({', '.join(found) or 'none'}), "
            "expected exactly 1; pass its dotted path"
        )
    layers = next(iter(found.values()))
    return next(p for p, module in model.named_modules() if module is layers), layers


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the hidden states between the decoder layers."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def _shallow_copy(module: nn.Module) -> nn.Module:
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    # an instance-level forward (accelerate's hooks) is bound to the full module
    copy.__dict__.pop("forward", None)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(module.__dict__[table])
    return copy


def truncated_view(model: PreTrainedModel, layers_path: str, depth: int) -> PreTrainedModel:
    """A model of the same class with the first ``depth`` layers and no LM head, sharing all weights.

    Only the containers on the way to the layers are copied (shallowly): ``model`` itself is left untouched,
    and layers past ``depth`` and the LM head are freed once the caller lets go of ``model``.
    """
    view = _shallow_copy(model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    view._modules = {name: child for name, child in view._modules.items() if head is None or child is not head}
    parent = view
    *containers, last = layers_path.split(".")
    for name in containers:
        child = _shallow_copy(parent._modules[name])
        parent._modules[name] = child
        parent = child
    parent._modules[last] = nn.ModuleList(list(parent._modules[last])[:depth])
    return view


def headless_path(model: PreTrainedModel, layers_path: str) -> tuple[str, ...]:
    """Names from ``model`` down to the innermost transformers model around the layers: the one without LM head."""
    names = layers_path.split(".")[:-1]
    depths = range(len(names), -1, -1)
    inner = next(n for n in depths if isinstance(model.get_submodule(".".join(names[:n])), PreTrainedModel))
    return tuple(names[:inner])


def submodule(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """``model.get_submodule(".".join(names))`` for names that exist: asked in every step of a generation."""
    for name in names:
        model = model._modules[name]
    return model


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter (cpu if it has none)."""
    parameter = next(module.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
