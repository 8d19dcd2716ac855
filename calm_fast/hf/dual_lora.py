"""Dual LoRA on transformers models: put the layers in, switch them, read and write adapters, take them out."""

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
from transformers.pytorch_utils import Conv1D

from calm_fast.core.checks import bad_type
from calm_fast.hf.adapters import LoraFactors, read_adapter, write_adapter
from calm_fast.modules.dual_lora import DualLoRALinear, GateStatistics

FORMAT_VERSION = 1
_CONFIG, _WEIGHTS = "dual_lora_config.json", "dual_lora.safetensors"
_RESTORE = "_dual_lora_restore"
_OPTIONS = frozenset(inspect.signature(DualLoRALinear).parameters) - {"base", "rank", "alpha"}
Adapter = str | os.PathLike | Mapping[str, torch.Tensor]


def add_dual_lora(
    model: nn.Module,
    target_modules: Iterable[str] | str = ("q_proj", "v_proj"),
    negative: Adapter | None = None,
    *,
    positive: Adapter | None = None,
    rank: int = 8,
    alpha: float = 16.0,
    mode: str = "mix",
    **options: Any,
) -> nn.Module:
    """Replace linear layers of a model by DualLoRALinear layers over them, in place; the rest of the model freezes.

    Args:
        model: any module tree with linear layers, usually a transformers model.
        target_modules: module names, each the last part(s) of a path ("q_proj", "self_attn.q_proj"); or one string,
            a regular expression for whole paths (both as PEFT reads them).
        negative, positive: an adapter to start from: the folder of a PEFT LoRA adapter, or its state dict (its
            scaling is then taken as 1). Rank and scaling come from it; it must cover every targeted layer.
        rank, alpha: of the LoRAs that no adapter gives; scaling is alpha / rank.
        mode: "neg", "pos" or "mix", see `DualLoRALinear.set_mode`.
        **options: passed to DualLoRALinear (variant, gate_dim, value_dim, dropout, ...).
    Returns:
        the same model. `remove_dual_lora` brings it back exactly.
    Raises:
        TypeError: an argument of the wrong type, or an option that DualLoRALinear does not have.
        ValueError: no layer matches, a match is not a linear layer, the model has dual LoRA already, an adapter lacks
        a targeted layer, covers a layer that is not targeted, or has factors of another shape.
    Source: NAT (arXiv 2312.12832) section 3.2.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("add_dual_lora", "model", "a loaded model (an nn.Module)", model)
    if unknown := sorted(set(options) - _OPTIONS):
        raise TypeError(
            f"add_dual_lora: unknown option {', '.join(unknown)}; options are {', '.join(sorted(_OPTIONS))}"
        )
    if dual_lora_layers(model):
        raise ValueError("add_dual_lora: `model` has dual LoRA layers already; remove_dual_lora(model) first")
    targets = _targets(model, target_modules)
    given = {}
    for side, adapter in (("pos", positive), ("neg", negative)):
        if adapter is not None:
            name = "positive" if side == "pos" else "negative"
            given[side] = _matched(read_adapter(adapter, name), targets, name)

    layers = {}
    for path, base in targets.items():
        pos, neg = (given.get(side, {}).get(path) for side in ("pos", "neg"))
        sizes = {"in_features": None, "out_features": None} if not isinstance(base, Conv1D) else _conv1d_sizes(base)
        kwargs = {"rank": rank, "alpha": alpha} | sizes | options
        if pos is not None:
            kwargs |= {"rank": pos.a.shape[0], "alpha": pos.scaling * pos.a.shape[0]}
            kwargs = {"rank_neg": rank, "alpha_neg": alpha} | kwargs
        if neg is not None:
            kwargs |= {"rank_neg": neg.a.shape[0], "alpha_neg": neg.scaling * neg.a.shape[0]}
        flags = [p.requires_grad for p in base.parameters()]
        layers[path] = layer = DualLoRALinear(base, **kwargs)
        for p, flag in zip(base.parameters(), flags, strict=True):
            p.requires_grad_(flag)  # recorded with the rest below, and only changed once nothing can fail any more
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
    """Put the base layers back and give every parameter its old `requires_grad`; returns the model.

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
    """The model's DualLoRALinear layers by path; empty where it has none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DualLoRALinear)}


def set_dual_lora_mode(model: nn.Module, mode: str) -> nn.Module:
    """Switch every dual LoRA layer to "neg", "pos" or "mix" (what it computes and what trains); returns the model."""
    for layer in _layers(model, "set_dual_lora_mode").values():
        layer.set_mode(mode)
    return model


def record_gates(model: nn.Module, on: bool = True) -> nn.Module:
    """Start afresh (or stop) counting how much of the negative LoRA every layer uses; returns the model."""
    for layer in _layers(model, "record_gates").values():
        layer.record_gates = on
        if on:
            layer.clear_gates()
    return model


def get_gates(model: nn.Module) -> dict[str, GateStatistics]:
    """Gate statistics of every layer since `record_gates(model)`: mean, spread and histogram of p_neg."""
    return {path: layer.gate_statistics() for path, layer in _layers(model, "get_gates").items()}


def save_lora_adapter(
    model: nn.Module, folder: str | os.PathLike, which: str, *, base_model: str | None = None
) -> None:
    """Write the positive ("pos") or negative ("neg") LoRAs as a PEFT adapter, which PEFT loads on the base model.

    Raises:
        ValueError: `which` is neither, or the model has no dual LoRA.
    """
    if which not in ("pos", "neg"):
        raise ValueError(f"save_lora_adapter: `which` must be 'pos' or 'neg', got {which!r}")
    layers = _layers(model, "save_lora_adapter")
    factors = {
        path: LoraFactors(
            getattr(layer, f"lora_a_{which}"), getattr(layer, f"lora_b_{which}"), layer.scaling[which == "neg"]
        )
        for path, layer in layers.items()
    }
    base_model = base_model or getattr(model, "name_or_path", None) or None
    write_adapter(folder, factors, base_model, any(isinstance(layer.base, Conv1D) for layer in layers.values()))


def save_dual_lora(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write all trained tensors of the dual LoRA layers (safetensors) and what rebuilds the layers (JSON)."""
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


def load_dual_lora(model: nn.Module, folder: str | os.PathLike, *, mode: str | None = None) -> nn.Module:
    """Put the dual LoRA layers that `save_dual_lora` wrote into a base model; returns the model.

    Args:
        model: the base model, without dual LoRA. mode: default the saved one.
    Raises:
        ValueError: a file is missing, its format version is unknown, or the model lacks a layer.
    """
    folder = Path(folder)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise ValueError(
                f"load_dual_lora: `folder` must be one that save_dual_lora wrote, {file} is not in {folder}"
            )
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"load_dual_lora: `folder` has format version {config.get('format_version')!r}, expected {FORMAT_VERSION}; "
            "a newer calm_fast may read it"
        )
    settings = config["layers"]
    missing = sorted(set(settings) - {name for name, _ in model.named_modules()})
    if missing:
        raise ValueError(f"load_dual_lora: `model` has no layer {', '.join(missing[:3])} ({len(missing)} missing)")
    common = next(iter(settings.values()))
    add_dual_lora(model, "|".join(re.escape(path) for path in settings), mode=mode or config["mode"], **common)
    tensors = load_file(folder / _WEIGHTS)
    for path, layer in dual_lora_layers(model).items():
        if settings[path] != common:  # layers may differ in rank and scaling
            sizes = _conv1d_sizes(layer.base) if isinstance(layer.base, Conv1D) else {}
            mode_now, training = layer.mode, layer.training
            layer = DualLoRALinear(layer.base, **settings[path], **sizes).set_mode(mode_now).train(training)
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
        raise ValueError(f"{function}: `model` has no dual LoRA layers; add_dual_lora(model, ...) puts them in")
    return layers


def _targets(model: nn.Module, target_modules: Iterable[str] | str) -> dict[str, nn.Module]:
    if isinstance(target_modules, str):
        matches = re.compile(target_modules).fullmatch
        wanted = [target_modules]
        found = {name: m for name, m in model.named_modules() if name and matches(name)}
    else:
        wanted = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
        if not all(isinstance(name, str) for name in wanted):
            raise bad_type("add_dual_lora", "target_modules", "module names, or one regular expression", target_modules)
        found = {
            name: m for name, m in model.named_modules() if any(name == t or name.endswith(f".{t}") for t in wanted)
        }
    if not found:
        raise ValueError(f"add_dual_lora: `target_modules` {wanted} match no module of {type(model).__name__}")
    for name, module in found.items():
        if not isinstance(module, Conv1D) and not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            raise ValueError(
                f"add_dual_lora: `target_modules` must match linear layers, {name} is a {type(module).__name__}"
            )
    return found


def _matched(adapter: dict[str, LoraFactors], targets: dict[str, nn.Module], name: str) -> dict[str, LoraFactors]:
    missing, extra = sorted(set(targets) - set(adapter)), sorted(set(adapter) - set(targets))
    for what, paths in (("has no factors for targeted layers", missing), ("covers layers not targeted", extra)):
        if paths:
            raise ValueError(f"add_dual_lora: `{name}` {what}: {', '.join(paths[:3])} ({len(paths)} in all)")
    return adapter


def _copy_factors(layer: DualLoRALinear, path: str, side: str, factors: LoraFactors) -> None:
    for factor, tensor in (("a", factors.a), ("b", factors.b)):
        p = getattr(layer, f"lora_{factor}_{side}")
        if p.shape != tensor.shape:
            name = "positive" if side == "pos" else "negative"
            raise ValueError(
                f"add_dual_lora: `{name}` must fit {path}: lora_{factor.upper()} of shape {tuple(p.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        with torch.no_grad():
            p.copy_(tensor)


def _conv1d_sizes(base: Conv1D) -> dict[str, int]:
    d_in, d_out = base.weight.shape
    return {"in_features": d_in, "out_features": d_out}


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
