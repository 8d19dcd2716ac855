"""Files of dual LoRA layers: all of a layer in our own format, or one of its LoRAs as a PEFT adapter.

Models inside DDP, FSDP, torch.compile and PeftModel are saved under their own paths. Where the parameters are DTensors
(fully_shard, tensor parallelism), every process calls the function, the parameters are gathered, and rank 0 writes.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.core.files import check_folder
from calm_fast.core.fingerprint import file_checksum
from calm_fast.core.prompt_record import read_prompt_record, set_prompt_record, write_prompt_record
from calm_fast.hf.adapters import BaseReference, LoraFactors, read_json, read_tensors, write_adapter, write_pair
from calm_fast.hf.dual_lora import check_addable, layers_of, make_layer, put_layers
from calm_fast.hf.dual_lora_targets import conv1d_sizes
from calm_fast.hf.references import reference
from calm_fast.hf.wrappers import has_peft_layers, inner_model, is_sharded, own_modules, whole, writes_files
from calm_fast.modules.dual_lora import DualLoRALinear, check_mode

FORMAT_VERSION = 2  # 1: without checksum, sizes, and modes of single layers
CONFIG, WEIGHTS = "dual_lora_config.json", "dual_lora.safetensors"
_CHECKSUM = "tensors_sha256"
_SETTINGS = ("rank", "alpha", "rank_neg", "alpha_neg", "gate_dim", "value_dim", "variant", "dropout")
_SAMPLE = 8  # elements of each base weight that tell models apart
# two roundings of one weight, to bfloat16 and to float16, differ by less
_SAMPLE_TOLERANCE = 2.0**-6
_SAVE_ADAPTER, _SAVE, _LOAD = "save_lora_adapter", "save_dual_lora", "load_dual_lora"
StrPath = str | os.PathLike[str]


def save_lora_adapter(
    model: nn.Module, folder: StrPath, which: str, *, base_model: str | None = None, revision: str | None = None
) -> None:
    """Write the positive ("pos") or negative ("neg") LoRAs as a PEFT adapter that PEFT loads on the base model.

    Under fully_shard every process calls this, and rank 0 writes.

    Args:
        base_model: name or path of the base model, recorded in the adapter; by default the model's own.
        revision: of the base model on the hub, recorded in the adapter.
    Raises:
        TypeError: `model` or `folder` is of the wrong kind.
        ValueError: `which` is neither "pos" nor "neg", the model has no dual LoRA, or its parameters are not whole.
    """
    check_folder(_SAVE_ADAPTER, "folder", folder)
    if which not in ("pos", "neg"):
        raise bad_value(_SAVE_ADAPTER, "which", "'pos' or 'neg'", repr(which))
    layers = layers_of(model, _SAVE_ADAPTER)
    if under := [path for path, layer in layers.items() if has_peft_layers(layer.base)]:
        raise bad_value(
            _SAVE_ADAPTER,
            "model",
            "one whose dual LoRA layers are over no PEFT adapters",
            f"one that has in {under[0]}, so this adapter would not fit the plain base; merge them first "
            "(merge_and_unload), and save that base",
        )
    names = (f"lora_a_{which}", f"lora_b_{which}")
    tensors, writes = _gather(_SAVE_ADAPTER, layers, names)
    if not writes:
        return
    factors = {
        path: LoraFactors(
            tensors[f"{path}.lora_a_{which}"], tensors[f"{path}.lora_b_{which}"], layer.scaling[which == "neg"]
        )
        for path, layer in layers.items()
    }
    own = inner_model(model)
    generates = hasattr(own, "prepare_inputs_for_generation")  # PEFT wraps it for this task
    base = BaseReference(base_model or _reference(own), revision, "CAUSAL_LM" if generates else None)
    # PEFT also adapts every layer whose path ends in one of these names
    taken = [m for path in factors for m in own_modules(own) if m.endswith(f".{path}")]
    names_of_layers = "|".join(sorted(map(re.escape, factors))) if taken else sorted(factors)
    write_adapter(folder, factors, base, any(isinstance(m.base, Conv1D) for m in layers.values()), names_of_layers)
    write_prompt_record(own, folder)


def save_dual_lora(model: nn.Module, folder: StrPath) -> None:
    """Write the dual LoRA layers: their parameters (safetensors) and their configuration (JSON).

    Under fully_shard every process calls this, and rank 0 writes.

    Raises:
        TypeError: `model` or `folder` is of the wrong kind.
        ValueError: the model has no dual LoRA, or its parameters are not whole (FSDP 1 and DeepSpeed ZeRO-3: gather
            them around the call).
    """
    check_folder(_SAVE, "folder", folder)
    layers = layers_of(model, _SAVE)
    tensors, writes = _gather(_SAVE, layers)
    if not writes:
        return
    config = {
        "format_version": FORMAT_VERSION,
        "base_model": _reference(inner_model(model)),
        "layers": {path: _layer_config(layer) for path, layer in layers.items()},
    }
    write_pair(Path(folder), CONFIG, config, WEIGHTS, tensors, _CHECKSUM)
    write_prompt_record(inner_model(model), folder)


def load_dual_lora(model: nn.Module, folder: StrPath, *, mode: str | None = None) -> nn.Module:
    """Add the dual LoRA layers that `save_dual_lora` wrote to a base model. Return the model.

    Parameters get the dtype they were saved in. The layers take the base layers' devices and training flags.

    Args:
        model: the base model, without dual LoRA and not distributed yet.
        mode: by default the saved mode of each layer, with the `requires_grad` of each saved parameter.
    Raises:
        TypeError: `model` or `folder` is of the wrong kind.
        ValueError: a file is missing or damaged, its format version is unknown, the two files are of different saves,
            the tensors are not those of the configuration, or the model lacks a layer or has one of another shape.
    Warns:
        UserWarning: the weights of the model are not those of the base that the layers were saved with.
    """
    check_folder(_LOAD, "folder", folder)
    if not isinstance(model, nn.Module):
        raise bad_type(_LOAD, "model", "the base model (an nn.Module)", model)
    if mode is not None:
        check_mode(_LOAD, mode)
    check_addable(_LOAD, model)
    config, tensors = read_dual_lora(_LOAD, "folder", folder)
    prompt = read_prompt_record(folder, _LOAD, "folder")
    modules = own_modules(model)
    layers = {}
    for path, saved in config["layers"].items():
        if path not in modules:
            missing = sorted(set(config["layers"]) - set(modules))
            got = f"one without {', '.join(missing[:3])} ({len(missing)} missing)"
            raise bad_value(_LOAD, "model", "the base model of the saved layers", got)
        _check_sizes(path, modules[path], tensors)
        layers[path] = layer = _load_layer(path, modules[path], saved, tensors)
        layer.set_mode(mode or saved.get("mode") or config["mode"])
        if mode is None and (trains := saved.get("trains")) is not None:
            for name, p in layer.named_parameters(recurse=False):
                p.requires_grad_(name in trains)
    _warn_of_another_base(config, layers)
    put_layers(model, layers)
    set_prompt_record(model, prompt)
    return model


def read_dual_lora(where: str, name: str, folder: StrPath) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the tensors that `save_dual_lora` wrote, or raise the ValueError of `name`."""
    folder, expected = Path(folder), f"a folder that {_SAVE} wrote"
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise bad_value(where, name, expected, f"{folder}, and {file} is not in it")
    config = read_json(where, name, expected, folder / CONFIG)
    version = config.get("format_version")
    if version not in range(1, FORMAT_VERSION + 1):
        raise bad_value(
            where, name, f"of format version 1 to {FORMAT_VERSION}", f"{version!r}; a newer calm_fast may read it"
        )
    if _CHECKSUM in config and config[_CHECKSUM] != file_checksum(folder / WEIGHTS):
        got = f"{folder}, whose {CONFIG} and {WEIGHTS} are of different saves. Save anew"
        raise bad_value(where, name, expected, got)
    tensors = read_tensors(where, name, expected, folder / WEIGHTS)
    wanted = {
        f"{path}.{parameter}": _shape_of_saved(path, saved, tensors, parameter)
        for path, saved in config["layers"].items()
        for parameter in _parameter_names(saved["value_dim"])
    }
    for key in sorted(set(wanted) ^ set(tensors)):
        raise bad_value(where, name, expected, f"{folder}, {'without' if key in wanted else 'with the unknown'} {key}")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            got = f"{folder}, with {key} of shape {tuple(tensors[key].shape)} instead of {shape}"
            raise bad_value(where, name, expected, got)
    return config, tensors


def _parameter_names(value_dim: int | None) -> tuple[str, ...]:
    value = ("value_full",) if value_dim is None else ("value_down", "value_up")
    return ("lora_a_pos", "lora_b_pos", "lora_a_neg", "lora_b_neg", "gate_q", "gate_k", *value)


def _shapes(settings: Mapping[str, Any], d_in: int, d_out: int) -> dict[str, tuple[int, int]]:
    """Return the shape of each parameter of a layer."""
    value_dim = settings["value_dim"]
    shapes = {
        "lora_a_pos": (settings["rank"], d_in),
        "lora_b_pos": (d_out, settings["rank"]),
        "lora_a_neg": (settings["rank_neg"], d_in),
        "lora_b_neg": (d_out, settings["rank_neg"]),
        "gate_q": (settings["gate_dim"], d_in),
        "gate_k": (settings["gate_dim"], d_out),
        "value_full": (d_out, d_out),
        "value_down": (value_dim, d_out),
        "value_up": (d_out, value_dim),
    }
    return {name: shapes[name] for name in _parameter_names(value_dim)}


def _shape_of_saved(
    path: str, saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], parameter: str
) -> tuple[int, int]:
    a, b = tensors.get(f"{path}.lora_a_pos"), tensors.get(f"{path}.lora_b_pos")
    d_in, d_out = (0 if a is None else a.shape[-1]), (0 if b is None else b.shape[0])
    return _shapes(saved, d_in, d_out)[parameter]


def _reference(model: nn.Module) -> str | None:
    return (reference(model) or None) if isinstance(model, PreTrainedModel) else None


def _layer_config(layer: DualLoRALinear) -> dict[str, Any]:
    trains = [name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]
    own = {name: getattr(layer, name) for name in _SETTINGS}
    return own | {"mode": layer.mode, "trains": trains, "base_weight": _sample(layer.base)}


def _sample(base: nn.Module) -> list[float] | None:
    """Return the first elements of a plain weight of floats, None for another one (quantised, sharded, offloaded)."""
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.is_meta or is_sharded(weight):
        return None
    if type(weight) not in (torch.Tensor, nn.Parameter):
        return None
    found: list[float] = weight.detach().flatten()[:_SAMPLE].double().cpu().tolist()
    return found


def _gather(
    where: str, layers: Mapping[str, DualLoRALinear], names: tuple[str, ...] | None = None
) -> tuple[dict[str, torch.Tensor], bool]:
    """Return whole copies of the layers' parameters by their path and name, and if this process writes them."""
    parameters = {
        f"{path}.{name}": (p, shape)
        for path, layer in layers.items()
        for name, shape in _shapes(vars(layer), layer.in_features, layer.out_features).items()
        if (names is None or name in names) and (p := getattr(layer, name)) is not None
    }
    for key, (p, shape) in parameters.items():
        if p.is_meta or tuple(p.shape) != shape:
            got = f"{key} {'without data' if p.is_meta else f'of shape {tuple(p.shape)} instead of {shape}'}"
            raise bad_value(
                where,
                "model",
                "one whose parameters are whole",
                f"{got}. Gather them around the call: FSDP.summon_full_params, deepspeed.zero.GatheredParameters",
            )
    writes = writes_files([p for p, _ in parameters.values()])
    tensors = {}
    for key, (p, _) in parameters.items():
        tensor = whole(p)  # a collective call for a DTensor
        if writes:
            tensors[key] = tensor
    return tensors, writes


def _check_sizes(path: str, base: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    sizes = conv1d_sizes(base)
    own = tuple(sizes.get(name, getattr(base, name, None)) for name in ("in_features", "out_features"))
    saved = tensors[f"{path}.lora_a_pos"].shape[1], tensors[f"{path}.lora_b_pos"].shape[0]
    if own != saved:
        got = f"one whose {path} has (d_in, d_out) {own} instead of {saved}"
        raise bad_value(_LOAD, "model", "the base model of the saved layers", got)


def _load_layer(
    path: str, base: nn.Module, saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> DualLoRALinear:
    settings = {name: saved[name] for name in _SETTINGS} | {"dtype": tensors[f"{path}.lora_a_pos"].dtype}
    layer = make_layer(_LOAD, path, base, settings)
    for name, p in list(layer.named_parameters(recurse=False)):
        tensor = tensors[f"{path}.{name}"]
        if tensor.dtype == p.dtype:
            with torch.no_grad():
                p.copy_(tensor)
        else:
            setattr(layer, name, nn.Parameter(tensor.to(p.device)))
    return layer


def _warn_of_another_base(config: Mapping[str, Any], layers: Mapping[str, DualLoRALinear]) -> None:
    other = []
    for path, layer in layers.items():
        saved, own = config["layers"][path].get("base_weight"), _sample(layer.base)
        pairs = zip(saved or (), own or (), strict=saved is not None and own is not None)
        if any(abs(a - b) > _SAMPLE_TOLERANCE * max(abs(a), abs(b)) for a, b in pairs):
            other.append(path)
    if other:
        base = config.get("base_model") or "the base that the layers were saved with"
        warnings.warn(
            f"{_LOAD}: the weights of `model` are not those of {base} in {other[0]} ({len(other)} of {len(layers)} "
            "layers). Load the base model that the layers were trained on.",
            stacklevel=3,
        )
