"""The layers that add_dual_lora replaces: found by name, and checked that they can be replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.hf.layers import executed_on, is_hooked
from calm_fast.hf.wrappers import has_peft_layers, inner_model, own_modules

_ADD = "add_dual_lora"


def find_targets(model: nn.Module, target_modules: Iterable[str] | str) -> dict[str, nn.Module]:
    """Return the linear layers that `target_modules` names, by path.

    Raises:
        TypeError: `target_modules` is neither names nor a regular expression.
        ValueError: no layer matches, or a match cannot carry dual LoRA: it is not linear, or used at several places.
    """
    modules = {path: m for path, m in own_modules(model).items() if path}
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        wanted = [target_modules]
        found = _all_linear(model, modules)
    elif isinstance(target_modules, str):
        wanted = [target_modules]
        try:
            matches = re.compile(target_modules).fullmatch
        except re.error as problem:
            expected = "module names, or one regular expression"
            raise bad_value(_ADD, "target_modules", expected, f"{target_modules!r}: {problem}") from problem
        found = {path: m for path, m in modules.items() if matches(path)}
    else:
        wanted = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
        if not all(isinstance(name, str) for name in wanted):
            raise bad_type(_ADD, "target_modules", "module names, or one regular expression", target_modules)
        found = {path: m for path, m in modules.items() if any(path == t or path.endswith(f".{t}") for t in wanted)}
    if not found:
        kind = type(inner_model(model)).__name__
        raise bad_value(_ADD, "target_modules", "names of linear layers", f"{wanted}, which match no module of {kind}")
    for path, module in found.items():
        _check_target(path, module, modules)
    return found


def _check_target(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
    if not isinstance(module, Conv1D) and not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        raise bad_value(_ADD, "target_modules", "names of linear layers", f"{path}, which is a {type(module).__name__}")
    places = [other for other, m in modules.items() if m is module]
    if len(places) > 1:
        raise bad_value(
            _ADD,
            "target_modules",
            "names of layers that the model uses at one place",
            f"{path}, which is one module with {', '.join(p for p in places if p != path)}. Leave it out, or copy the "
            "module for each place first",
        )


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return every linear layer but the LM head, by path: PEFT's "all-linear" for a causal language model."""
    own = inner_model(model)
    if has_peft_layers(own):
        raise bad_value(
            _ADD,
            "target_modules",
            "layer names for a model with PEFT adapters",
            "'all-linear', which would adapt the adapters; merge them first (merge_and_unload), or name the layers",
        )
    head = own.get_output_embeddings() if isinstance(own, PreTrainedModel) else None
    return {path: m for path, m in modules.items() if isinstance(inner_model(m), (nn.Linear, Conv1D)) and m is not head}


def conv1d_sizes(base: nn.Module) -> dict[str, Any]:
    """Return the sizes of GPT-2's Conv1D, which has no attributes for them; nothing for another layer."""
    if not isinstance(base, Conv1D):
        return {}
    d_in, d_out = base.weight.shape
    return {"in_features": d_in, "out_features": d_out}


def layer_device(where: str, path: str, base: nn.Module) -> dict[str, Any]:
    """Return the device of the new parameters where `base` does not show it: accelerate has offloaded its weight.

    Raises:
        ValueError: the weight is offloaded and nothing tells to where it is loaded.
    """
    weight = next(base.parameters(), None)
    if weight is None or not weight.is_meta or not is_hooked(base):
        return {}  # a model that is built on "meta" as a whole has no hooks
    if (device := executed_on(base)) is not None:
        return {"device": device}
    raise bad_value(where, "model", "a model whose weights are loaded, or offloaded by accelerate", f"{path} on meta")
