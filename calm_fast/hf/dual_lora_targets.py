"""The layers that add_dual_lora replaces: found by name, and checked that they can be replaced."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.hf.layers import executed_on, is_hooked
from calm_fast.hf.wrappers import has_peft_layers, inner_model, own_modules

logger = logging.get_logger(__name__)
_ADD = "add_dual_lora"
_USUAL = ("q_proj", "v_proj")
# families whose default is not what their names suggest: RWKV divides the weights of `output` and `value` in eval mode
_OF_FAMILY = {"rwkv": ("attention.key", "receptance")}
# names of the projections to queries and values, or of a fused one; the first group that a model has as a whole counts
_PROJECTIONS = (
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
    ("qkv",),
    ("q_b_proj", "kv_b_proj"),
    ("q_proj", "kv_b_proj"),
    ("query", "value"),
    ("query_proj", "value_proj"),
    ("query_key", "value"),
    ("q_lin", "v_lin"),
    ("q_linear", "v_linear"),
    ("project_q", "project_v"),
    ("wq", "wv"),
    ("Wq", "Wv"),
    ("q", "v"),
    ("in_proj",),
)


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that adapt by default: the projections to queries and values, as in PEFT.

    That is q_proj and v_proj where the model has both; else what PEFT, if it is installed, has for the family; else
    the first group of `_PROJECTIONS` that the model has.

    Raises:
        ValueError: the model's linear layers have other names.
    """
    own = inner_model(model)
    family = str(getattr(getattr(own, "config", None), "model_type", ""))
    linear = [path for path, m in own_modules(model).items() if path and _is_linear(m) and _reads_text(path)]
    for names in (_OF_FAMILY.get(family), _USUAL, _of_peft(family), *_PROJECTIONS):
        if names and all(any(_ends_with(path, name) for path in linear) for name in names):
            return names
    expected = f"given for {type(own).__name__}, whose layers have none of the usual names"
    raise bad_value(_ADD, "target_modules", expected, f"None. {_names(linear)}")


def _reads_text(path: str) -> bool:
    """Whether a module is not of a vision or audio tower, nor of what cuts bytes into patches: no text trains those."""
    return not re.search(r"vision|visual|image|audio|patcher", path)


def _of_peft(family: str) -> tuple[str, ...] | None:
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as mapping
    except ImportError:
        return None
    names = mapping.get(family)
    return tuple(names) if isinstance(names, (list, tuple)) else None


def _is_linear(module: nn.Module) -> bool:
    inner = inner_model(module)
    return isinstance(inner, Conv1D) or (hasattr(inner, "in_features") and hasattr(inner, "out_features"))


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _names(linear: Iterable[str]) -> str:
    """Return a sentence that lists the last names of the paths `linear`."""
    names = list(dict.fromkeys(last for path in linear if not (last := path.rpartition(".")[2]).isdigit()))
    more = ", ..." if len(names) > 16 else ""
    return f"Its linear layers are {', '.join(names[:16])}{more}" if names else "It has no linear layer"


def find_targets(model: nn.Module, target_modules: Iterable[str] | str | None) -> dict[str, nn.Module]:
    """Return the linear layers that `target_modules` names, by path; None stands for `default_targets`.

    Raises:
        TypeError: `target_modules` is neither names nor a regular expression.
        ValueError: no layer matches, or a match cannot carry dual LoRA: it is not linear, or used at several places.
    """
    modules = {path: m for path, m in own_modules(model).items() if path}
    if target_modules is None:
        target_modules = default_targets(model)
        modules = {path: m for path, m in modules.items() if _reads_text(path)}
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
        found = {path: m for path, m in modules.items() if any(_ends_with(path, t) for t in wanted)}
    if not found:
        raise bad_value(
            _ADD, "target_modules", "names of linear layers", _no_match(inner_model(model), wanted, modules)
        )
    for path, module in found.items():
        _check_target(path, module, modules)
    return found


def _no_match(model: nn.Module, wanted: list[str], modules: dict[str, nn.Module]) -> str:
    linear = [path for path, m in modules.items() if _is_linear(m)]
    kind = type(model).__name__
    for path, p in model.named_parameters():
        if any(_ends_with(path, name) for name in wanted):
            what = f"{path}, a parameter of shape {tuple(p.shape)} of {kind} and no layer"
            return f"{what}: experts in one tensor cannot carry dual LoRA. {_names(linear)}"
    return f"{wanted}, which match no module of {kind}. {_names(linear)}"


def _check_target(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> None:
    if not isinstance(module, Conv1D) and not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        linear = [other for other, m in modules.items() if _is_linear(m)]
        got = f"{path}, which is a {type(module).__name__}. {_names(linear)}"
        raise bad_value(_ADD, "target_modules", "names of linear layers", got)
    if (reader := _reads_weight(path, modules)) is not None:
        expected = "names of layers that the model calls"
        got = f"{path}, whose weight {reader} reads without calling the layer, so that LoRA would be passed by"
        raise bad_value(_ADD, "target_modules", expected, f"{got}. Leave it out")
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
    found = {p: m for p, m in modules.items() if isinstance(inner_model(m), (nn.Linear, Conv1D)) and m is not head}
    left_out = [path for path in found if _reads_weight(path, modules) is not None]
    if left_out:
        why = "the model reads their weights without calling them"
        logger.warning(f"{_ADD}: 'all-linear' leaves out {', '.join(left_out[:4])} ({len(left_out)} layers): {why}.")
    return {path: m for path, m in found.items() if path not in left_out}


def _reads_weight(path: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the class that computes with the weight of the layer at `path` itself, None if no module around it does.

    The fused kernels of Mamba do so, and torch's MultiheadAttention. modules: by path, without the model itself.
    """
    names = path.split(".")
    for count in range(1, len(names)):
        around, inside = ".".join(names[:-count]), ".".join(names[-count:])
        if around not in modules:
            continue
        inner = inner_model(modules[around])
        if getattr(inner, "slow_but_exact", None) is False:
            continue  # BLOOM reads weights only where this is True
        kind = type(inner)
        if inside in _weights_read(kind):  # type: ignore[arg-type]  # classes are hashable
            return kind.__name__
    return None


@functools.cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the paths inside `kind` of layers whose weight its source uses for more than their dtype or device."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a console, or compiled
        return frozenset()
    uses = re.finditer(
        r"(isinstance\(\s*|init\.\w+\(\s*)?\bself\.(\w+(?:\.\w+)*)\.weight\b(?!\.(?:dtype|device|shape)\b)", source
    )
    return frozenset(use[2] for use in uses if use[1] is None)


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
