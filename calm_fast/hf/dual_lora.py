"""Dual LoRA on transformers models: add the layers, switch their mode, save and load them, remove them."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calm_fast.core.checks import bad_type, bad_value, check_finite_number, describe
from calm_fast.hf.adapters import LoraFactors, read_adapter, write_adapter
from calm_fast.modules.dual_lora import DualLoRALinear, GateStatistics, check_dropout, check_size

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "dual_lora_config.json", "dual_lora.safetensors"
_RESTORE = "_dual_lora_restore"
_OPTIONS = frozenset(inspect.signature(DualLoRALinear).parameters) - {"base", "rank", "alpha"}
# the other arguments of PEFT's LoraConfig (0.21): each changes which layers adapt or what they compute
_PEFT_UNSUPPORTED = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode exclude_modules
    fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern
    alpha_pattern megatron_config megatron_core trainable_token_indices loftq_config eva_config corda_config
    lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora qalora_group_size monteclora_config
    layer_replication runtime_config lora_bias target_parameters use_bdlora arrow_config kasa_config
    ensure_weight_tying
    """.split()
)
_ADD = "add_dual_lora"
Adapter = str | os.PathLike[str] | Mapping[str, torch.Tensor]


def add_dual_lora(
    model: nn.Module,
    target_modules: Iterable[str] | str = ("q_proj", "v_proj"),
    negative: Adapter | None = None,
    *,
    positive: Adapter | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    mode: str = "mix",
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    **options: Any,
) -> nn.Module:
    """Replace linear layers of a model by DualLoRALinear layers over them, in place, and freeze the rest of the model.

    Args:
        model: any module tree with linear layers, usually a transformers model.
        target_modules: as PEFT reads it. Module names, each the last part(s) of a path ("q_proj",
            "self_attn.q_proj"); or "all-linear", every linear layer but the LM head; or one string, a regular
            expression for whole paths.
        negative, positive: an adapter to start from: the folder of a PEFT LoRA adapter, or its state dict, whose
            scaling is then taken as 1. Rank and scaling come from the adapter. It must cover every targeted layer.
        rank, alpha: of the LoRAs that no adapter gives, by default 8 and 16; the scaling is alpha / rank.
        mode: "neg", "pos" or "mix", see `DualLoRALinear.set_mode`.
        r, lora_alpha, lora_dropout: PEFT's names for `rank`, `alpha` and the option `dropout`, with the same defaults
            (8, 16 and 0). Other arguments of PEFT's LoraConfig are refused.
        **options: passed to DualLoRALinear (variant, gate_dim, value_dim, dropout, ...).
    Returns:
        the same model. `remove_dual_lora` restores it exactly.
    Raises:
        TypeError: an argument has the wrong type, is given in both spellings, is one that only PEFT has, or is no
            option of DualLoRALinear.
        ValueError: an argument is out of range, no layer matches, a match is not a linear layer, the model has dual
            LoRA already, or an adapter lacks a targeted layer, covers a layer that is not targeted, or has factors of
            another shape.
    Source: NAT (arXiv 2312.12832) section 3.2.
    """
    if not isinstance(model, nn.Module):
        raise bad_type(_ADD, "model", "a loaded model (an nn.Module)", model)
    _check_option_names(options)
    if r is not None:
        check_size(_ADD, "r", r)
        rank = _one_spelling("rank", rank, "r", r)
    if lora_alpha is not None:
        check_finite_number(_ADD, "lora_alpha", lora_alpha)
        alpha = _one_spelling("alpha", alpha, "lora_alpha", lora_alpha)
    if lora_dropout is not None:
        check_dropout(_ADD, "lora_dropout", lora_dropout)
        options["dropout"] = _one_spelling("dropout", options.get("dropout"), "lora_dropout", lora_dropout)
    rank, alpha = 8 if rank is None else rank, 16.0 if alpha is None else alpha
    if dual_lora_layers(model):
        raise bad_value(_ADD, "model", "without dual LoRA", "one that has it; call remove_dual_lora(model) first")
    targets = _targets(model, target_modules)
    given: dict[str, dict[str, LoraFactors]] = {}
    for side, adapter in (("pos", positive), ("neg", negative)):
        if adapter is not None:
            name = "positive" if side == "pos" else "negative"
            given[side] = read_adapter(adapter, name)
            _check_coverage(given[side], targets, name)

    layers = {}
    for path, base in targets.items():
        pos, neg = (given.get(side, {}).get(path) for side in ("pos", "neg"))
        sizes = _conv1d_sizes(base) if isinstance(base, Conv1D) else {}
        kwargs = {"rank": rank, "alpha": alpha} | sizes | options
        if pos is not None:
            kwargs |= {"rank": pos.a.shape[0], "alpha": pos.scaling * pos.a.shape[0]}
            kwargs = {"rank_neg": rank, "alpha_neg": alpha} | kwargs
        if neg is not None:
            kwargs |= {"rank_neg": neg.a.shape[0], "alpha_neg": neg.scaling * neg.a.shape[0]}
        flags = [p.requires_grad for p in base.parameters()]
        layers[path] = layer = DualLoRALinear(base, **kwargs)
        for p, flag in zip(base.parameters(), flags, strict=True):
            p.requires_grad_(flag)  # the model freezes below, where nothing can fail any more
        for side, factors in (("pos", pos), ("neg", neg)):
            if factors is not None:
                _copy_factors(layer, path, side, factors)
        layer.train(base.training)
        layer.set_mode(mode)

    setattr(model, _RESTORE, {name: p.requires_grad for name, p in model.named_parameters()})
    model.requires_grad_(False)
    for path, layer in layers.items():
        _replace(model, path, layer)
    return model


def remove_dual_lora(model: nn.Module) -> nn.Module:
    """Put the base layers back and restore every parameter's `requires_grad`. Return the model.

    Raises:
        ValueError: the model has no dual LoRA.
    """
    for path, layer in _layers(model, "remove_dual_lora").items():
        _replace(model, path, layer.base)
    flags = model.__dict__.pop(_RESTORE, {})
    for name, p in model.named_parameters():
        p.requires_grad_(flags.get(name, p.requires_grad))
    return model


def dual_lora_layers(model: nn.Module) -> dict[str, DualLoRALinear]:
    """Return the model's DualLoRALinear layers by path; empty for a model without dual LoRA."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DualLoRALinear)}


def set_dual_lora_mode(model: nn.Module, mode: str) -> nn.Module:
    """Switch every dual LoRA layer to mode "neg", "pos" or "mix" (`DualLoRALinear.set_mode`). Return the model.

    Raises:
        ValueError: the model has no dual LoRA, or an unknown mode.
    """
    for layer in _layers(model, "set_dual_lora_mode").values():
        layer.set_mode(mode)
    return model


def record_gates(model: nn.Module, on: bool = True) -> nn.Module:
    """Start recording every layer's gate from zero, or stop with `on=False`. Return the model.

    Raises:
        ValueError: the model has no dual LoRA.
    """
    for layer in _layers(model, "record_gates").values():
        layer.record_gates = on
        if on:
            layer.clear_gates()
    return model


def get_gates(model: nn.Module) -> dict[str, GateStatistics]:
    """Return every layer's gate statistics since `record_gates(model)`, by path. Synchronises.

    Raises:
        ValueError: the model has no dual LoRA.
    """
    return {path: layer.gate_statistics() for path, layer in _layers(model, "get_gates").items()}


def save_lora_adapter(
    model: nn.Module, folder: str | os.PathLike[str], which: str, *, base_model: str | None = None
) -> None:
    """Write the positive ("pos") or negative ("neg") LoRAs as a PEFT adapter that PEFT loads on the base model.

    Args:
        base_model: name or path of the base model, recorded in the adapter; by default the model's own.
    Raises:
        ValueError: `which` is neither "pos" nor "neg", or the model has no dual LoRA.
    """
    if which not in ("pos", "neg"):
        raise bad_value("save_lora_adapter", "which", "'pos' or 'neg'", repr(which))
    layers = _layers(model, "save_lora_adapter")
    factors = {
        path: LoraFactors(
            getattr(layer, f"lora_a_{which}"), getattr(layer, f"lora_b_{which}"), layer.scaling[which == "neg"]
        )
        for path, layer in layers.items()
    }
    base_model = base_model or getattr(model, "name_or_path", None) or None
    write_adapter(folder, factors, base_model, any(isinstance(layer.base, Conv1D) for layer in layers.values()))


def save_dual_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the dual LoRA layers: their parameters (safetensors) and their configuration (JSON).

    Raises:
        ValueError: the model has no dual LoRA.
    """
    layers = _layers(model, "save_dual_lora")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": FORMAT_VERSION,
        "mode": next(iter(layers.values())).mode,
        "layers": {path: _layer_config(layer) for path, layer in layers.items()},
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {
        f"{path}.{name}": p.detach().contiguous().cpu().clone()
        for path, layer in layers.items()
        for name, p in layer.named_parameters(recurse=False)
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def load_dual_lora(model: nn.Module, folder: str | os.PathLike[str], *, mode: str | None = None) -> nn.Module:
    """Add the dual LoRA layers that `save_dual_lora` wrote to a base model. Return the model.

    Args:
        model: the base model, without dual LoRA.
        mode: by default the saved one.
    Raises:
        ValueError: a file is missing, its format version is unknown, or the model lacks a layer.
    """
    folder = Path(folder)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise bad_value(
                "load_dual_lora", "folder", "one that save_dual_lora wrote", f"{folder}, and {file} is not in it"
            )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("format_version") != FORMAT_VERSION:
        raise bad_value(
            "load_dual_lora",
            "folder",
            f"of format version {FORMAT_VERSION}",
            f"{config.get('format_version')!r}; a newer calm_fast may read it",
        )
    settings = config["layers"]
    missing = sorted(set(settings) - {name for name, _ in model.named_modules()})
    if missing:
        raise bad_value(
            "load_dual_lora",
            "model",
            "the base model of the saved layers",
            f"one without {', '.join(missing[:3])} ({len(missing)} missing)",
        )
    common = next(iter(settings.values()))
    add_dual_lora(model, "|".join(re.escape(path) for path in settings), mode=mode or config["mode"], **common)
    tensors = load_file(folder / _WEIGHTS)
    for path, layer in dual_lora_layers(model).items():
        # layers may differ in rank and scaling
        if settings[path] != common:
            options = settings[path] | (_conv1d_sizes(layer.base) if isinstance(layer.base, Conv1D) else {})
            layer = DualLoRALinear(layer.base, **options).set_mode(layer.mode).train(layer.training)
            _replace(model, path, layer)
        with torch.no_grad():
            for name, p in layer.named_parameters(recurse=False):
                p.copy_(tensors[f"{path}.{name}"])
    return model


def _layer_config(layer: DualLoRALinear) -> dict[str, Any]:
    names = ("rank", "alpha", "rank_neg", "alpha_neg", "gate_dim", "value_dim", "variant", "dropout")
    return {name: getattr(layer, name) for name in names}


def _layers(model: nn.Module, function: str) -> dict[str, DualLoRALinear]:
    layers = dual_lora_layers(model)
    if not layers:
        raise bad_value(function, "model", "one with dual LoRA layers", "one without; add_dual_lora(model) adds them")
    return layers


def _check_option_names(options: dict[str, Any]) -> None:
    if unsupported := sorted(_PEFT_UNSUPPORTED & set(options)):
        name = unsupported[0]
        raise TypeError(
            f"{_ADD}: `{name}` must be left out, got {describe(options[name])}: dual LoRA does not support this "
            "argument of PEFT"
        )
    if unknown := sorted(set(options) - _OPTIONS):
        names = ", ".join(sorted(_OPTIONS))
        raise TypeError(f"{_ADD}: `**options` must be options of DualLoRALinear ({names}), got {', '.join(unknown)}")


def _one_spelling(ours: str, value: Any, peft_name: str, peft_value: Any) -> Any:
    """Return `peft_value`, or raise where our spelling of the same argument came too."""
    if value is not None:
        raise TypeError(
            f"{_ADD}: `{ours}` and `{peft_name}` must not both be given, got {value!r} and {peft_value!r}: "
            "they are one argument; leave one out"
        )
    return peft_value


def _targets(model: nn.Module, target_modules: Iterable[str] | str) -> dict[str, nn.Module]:
    """Return the linear layers that `target_modules` names, by path."""
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        wanted = [target_modules]
        found = _all_linear(model)
    elif isinstance(target_modules, str):
        matches = re.compile(target_modules).fullmatch
        wanted = [target_modules]
        found = {name: m for name, m in model.named_modules() if name and matches(name)}
    else:
        wanted = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
        if not all(isinstance(name, str) for name in wanted):
            raise bad_type(_ADD, "target_modules", "module names, or one regular expression", target_modules)
        found = {
            name: m for name, m in model.named_modules() if any(name == t or name.endswith(f".{t}") for t in wanted)
        }
    if not found:
        kind = type(model).__name__
        raise bad_value(_ADD, "target_modules", "names of linear layers", f"{wanted}, which match no module of {kind}")
    for name, module in found.items():
        if not isinstance(module, Conv1D) and not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            raise bad_value(
                _ADD, "target_modules", "names of linear layers", f"{name}, which is a {type(module).__name__}"
            )
    return found


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Return every linear layer but the LM head, by path: PEFT's "all-linear" for a causal language model."""
    modules = dict(model.named_modules())
    if any(base.__name__ == "BaseTunerLayer" for m in modules.values() for base in type(m).__mro__):
        raise bad_value(
            _ADD,
            "target_modules",
            "layer names for a model with PEFT adapters",
            "'all-linear', which would adapt the adapters; merge them first (merge_and_unload), or name the layers",
        )
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {name: m for name, m in modules.items() if name and isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def _check_coverage(adapter: dict[str, LoraFactors], targets: dict[str, nn.Module], name: str) -> None:
    """Check that an adapter has factors for the targeted layers and for no other."""
    missing, extra = sorted(set(targets) - set(adapter)), sorted(set(adapter) - set(targets))
    for expected, got, paths in (
        ("an adapter of every targeted layer", "no factors for", missing),
        ("an adapter of targeted layers only", "factors for", extra),
    ):
        if paths:
            raise bad_value(_ADD, name, expected, f"{got} {', '.join(paths[:3])} ({len(paths)} in all)")


def _copy_factors(layer: DualLoRALinear, path: str, side: str, factors: LoraFactors) -> None:
    for factor, tensor in (("a", factors.a), ("b", factors.b)):
        p = getattr(layer, f"lora_{factor}_{side}")
        if p.shape != tensor.shape:
            name = "positive" if side == "pos" else "negative"
            raise bad_value(
                _ADD,
                name,
                f"an adapter that fits {path}: lora_{factor.upper()} of shape {tuple(p.shape)}",
                f"shape {tuple(tensor.shape)}",
            )
        with torch.no_grad():
            p.copy_(tensor)


def _conv1d_sizes(base: Conv1D) -> dict[str, Any]:
    d_in, d_out = base.weight.shape
    return {"in_features": d_in, "out_features": d_out}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
