"""LoRA adapters in PEFT's on-disk format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from calm_fast.core.checks import bad_type, bad_value

_ADD = "add_dual_lora"  # the function whose argument an adapter is, named by errors
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")
# settings that a plain pair of factors cannot express, with the value that switches each of them off
_UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "use_qalora": False}


@dataclass(frozen=True)
class LoraFactors:
    """The adapter of one layer: h = scaling * B (A x), with A (R, d_in) and B (d_out, R)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def read_adapter(source: str | os.PathLike[str] | Mapping[str, torch.Tensor], name: str) -> dict[str, LoraFactors]:
    """Return the factors of every adapted module, by the module's path in the model.

    Args:
        source: the folder of a PEFT LoRA adapter, or its state dict. The scaling of a state dict is 1: B contains it.
        name: the argument of add_dual_lora that errors name.
    Raises:
        TypeError: `source` is neither a path nor a state dict.
        ValueError: a file is missing, the adapter is not a LoRA, it uses a feature beyond a pair of factors (DoRA,
            trained biases, fully trained modules), or its factors do not pair up.
    """
    if isinstance(source, Mapping):
        return _factors_by_module(dict(source), {}, name)
    if not isinstance(source, (str, os.PathLike)):
        raise bad_type(_ADD, name, "the folder of a PEFT adapter or its state dict", source)
    folder = Path(source)
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights):
        if not file.is_file():
            raise bad_value(
                _ADD, name, "the folder of a PEFT adapter in safetensors", f"{folder}, and {file.name} is not in it"
            )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise bad_value(_ADD, name, "a LoRA adapter", f"peft_type {config.get('peft_type')!r}")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key, plain) not in (plain, None):
            raise bad_value(_ADD, name, f"an adapter with {key}={plain!r}", f"{key}={config[key]!r}, not supported")
    return _factors_by_module(load_file(weights), config, name)


def _factors_by_module(state: dict[str, torch.Tensor], config: dict[str, Any], name: str) -> dict[str, LoraFactors]:
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise bad_value(_ADD, name, "tensors <module>.lora_A.weight and <module>.lora_B.weight only", repr(key))
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    if not factors:
        raise bad_value(_ADD, name, "an adapter with LoRA factors", "no tensors")
    result = {}
    for module, pair in factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = {k: tuple(t.shape) for k, t in pair.items()}
            raise bad_value(_ADD, name, f"lora_A (R, d_in) and lora_B (d_out, R) for {module}", str(shapes))
        result[module] = LoraFactors(a, b, _scaling(module, a.shape[0], config))
    return result


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    if not config:
        return 1.0
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def write_adapter(
    folder: str | os.PathLike[str], factors: Mapping[str, LoraFactors], base_model: str | None, transposed: bool
) -> None:
    """Write factors as a PEFT LoRA adapter for a causal language model.

    Args:
        folder: created if it does not exist.
        factors: by module path.
        base_model: name or path of the base model, which PEFT's loaders read.
        transposed: the adapted layers store their weight as (d_in, d_out), like GPT-2's Conv1D (PEFT: fan_in_fan_out).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(factors.values()))
    rank, alpha = first.a.shape[0], first.scaling * first.a.shape[0]
    others = {m: f for m, f in factors.items() if (f.a.shape[0], f.scaling * f.a.shape[0]) != (rank, alpha)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(factors),
        "rank_pattern": {re.escape(m): f.a.shape[0] for m, f in others.items()},
        "alpha_pattern": {re.escape(m): f.scaling * f.a.shape[0] for m, f in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module, f in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = f.a.detach().contiguous().cpu().clone()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = f.b.detach().contiguous().cpu().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
