"""The layers of a transformers decoder, and a truncated view of it that shares every weight.

`find_layers` is the only place that decides where a model family keeps its decoder layers. It knows no family by name:
one rule serves all that docs/composition.md lists. To add a family:

1. Add a row to `FAMILIES` or `OTHERS` in tests/hf/families.py (the names its config uses) and run tests/hf. Usually
   that is all.
2. If the rule finds no list of layers, or several, pass the dotted path as ``anchor_layers`` / ``augmenter_layers`` of
   compose(); a saved composition records it.
3. If the family keeps its state outside a transformers Cache, add it to `WITHOUT_CACHE` in calm_fast/hf/recompute.py,
   so that the whole text is read in every step.
4. Add the family to the table in docs/composition.md.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from calm_fast.core.checks import bad_value


def find_layers(
    model: PreTrainedModel, path: str | None = None, *, where: str = "find_layers", argument: str = "path"
) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers of a transformers model.

    The rule: inside ``get_decoder()``, else ``base_model``, else the model, take the outermost ModuleLists whose
    members are all ``GradientCheckpointingLayer``. If there is none, take those of plain modules that have the config's
    number of layers. Of several lists, take the one with this number. `path` (dotted, from `model`) overrides the rule.

    where, argument: the function and its argument that an error names.

    Returns (dotted path from `model`, the ModuleList). Raises ValueError if the rule does not find exactly one list, or
    if `path` is not the path of a non-empty ModuleList.
    """
    name = type(model).__name__
    if path is not None:
        module = dict(model.named_modules(remove_duplicate=False)).get(path)
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            raise bad_value(where, argument, f"the dotted path of a non-empty ModuleList of {name}", repr(path))
        return path, module

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    count = _layer_count(model)
    found: list[nn.ModuleList] = []
    for root in (decoder, model.base_model, model):
        found = [] if root is None else _layer_lists(root, count)
        if found:
            break
    fitting = [layers for layers in found if len(layers) == count]
    if len(found) > 1 and len(fitting) == 1:
        found = fitting
    paths = [next(p for p, module in model.named_modules() if module is layers) for layers in found]
    if len(found) != 1:
        raise bad_value(
            where,
            argument,
            f"given where a model does not have exactly one list of decoder layers ({name} has {len(found)}: "
            f"{', '.join(paths) or 'none'})",
            "None. Pass the dotted path of the layers",
        )
    return paths[0], found[0]


def _layer_count(model: PreTrainedModel) -> int | None:
    """Return the number of decoder layers that the config names."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "decoder_layers", None)  # of an encoder-decoder, where num_hidden_layers is the encoder's
    return count if count is not None else getattr(config, "num_hidden_layers", None)


def _layer_lists(root: nn.Module, count: int | None) -> list[nn.ModuleList]:
    """Return the lists in `root` that may be its layers: of checkpointable ones, else of `count` plain modules."""
    plain: dict[str, nn.ModuleList] = {}
    found: dict[str, nn.ModuleList] = {}
    for prefix, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            if not any(prefix.startswith(outer + ".") for outer in found):
                found[prefix] = module
        elif len(module) == count and not any(prefix.startswith(outer + ".") for outer in plain):
            plain[prefix] = module
    return list((found or plain).values())


def hidden_size(model: PreTrainedModel) -> int:
    """Return the width of the hidden states between the decoder layers."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def shallow_copy(module: nn.Module) -> nn.Module:
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = dict(module.__dict__)
    # an instance-level forward (accelerate's hooks) is bound to the full module
    copy.__dict__.pop("forward", None)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(module.__dict__[table])
    return copy


def truncated_view(model: PreTrainedModel, layers_path: str, depth: int) -> PreTrainedModel:
    """Return a model of the same class with the first `depth` layers and no LM head, sharing all weights.

    Only the containers on the way to the layers are copied, shallowly. `model` itself is not changed. The layers past
    `depth` and the LM head are freed once the caller drops `model`.
    """
    view = cast(PreTrainedModel, shallow_copy(model))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    view._modules = {name: child for name, child in view._modules.items() if head is None or child is not head}
    parent: nn.Module = view
    *containers, last = layers_path.split(".")
    for name in containers:
        child = shallow_copy(parent.get_submodule(name))
        parent._modules[name] = child
        parent = child
    layers = cast(nn.ModuleList, parent.get_submodule(last))
    shortened = nn.ModuleList(list(layers)[:depth])
    shortened.training = layers.training  # a new list is in training mode
    parent._modules[last] = shortened
    return view


def cache_depth(view: PreTrainedModel, layers_path: str) -> int:
    """Return how many layers of a cache the layers of a truncated view fill.

    Usually one each; a layer of LongCat-Flash holds two attentions, each with a cache layer of its own.
    """
    layers = view.get_submodule(layers_path)
    indices = [getattr(module, "layer_idx", None) for module in layers.modules()]
    return max([len(cast(nn.ModuleList, layers)), *(index + 1 for index in indices if isinstance(index, int))])


def headless_path(model: PreTrainedModel, layers_path: str) -> tuple[str, ...]:
    """Return the names from `model` down to the innermost transformers model that holds the layers.

    That model has no LM head.
    """
    names = layers_path.split(".")[:-1]
    depths = range(len(names), -1, -1)
    inner = next(n for n in depths if isinstance(model.get_submodule(".".join(names[:n])), PreTrainedModel))
    return tuple(names[:inner])


def submodule(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """Return ``model.get_submodule(".".join(names))`` for names that exist, fast enough for every decode step."""
    for name in names:
        model = model._modules[name]  # type: ignore[assignment]  # None only for names that do not exist
    return model


def device_of(module: nn.Module, model: nn.Module) -> torch.device:
    """Return the device on which `module`, a part of `model`, computes.

    Offloaded parameters are on the meta device: accelerate's hooks load them for each call and know the device. The
    answer is meta only if neither a hook nor a parameter of `model` names another device.
    """
    return _stored_on(module) or executed_on(module) or _stored_on(model) or executed_on(model) or torch.device("meta")


def _stored_on(module: nn.Module) -> torch.device | None:
    if next(module.parameters(), None) is None:
        return torch.device("cpu")
    return next((p.device for p in module.parameters() if not p.is_meta), None)


def is_hooked(module: nn.Module) -> bool:
    """Return True if accelerate has put a hook on `module` itself."""
    return getattr(module, "_hf_hook", None) is not None


def is_offloaded(module: nn.Module) -> bool:
    """Return True if accelerate takes the weights of `module` or of a module in it away after each call."""
    hooks = (getattr(child, "_hf_hook", None) for child in module.modules())
    return any(getattr(one, "offload", False) for hook in hooks for one in getattr(hook, "hooks", (hook,)))


def executed_on(module: nn.Module) -> torch.device | None:
    """Return the device of the first accelerate hook in `module` (AlignDevicesHook, alone or in a SequentialHook)."""
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    return None
