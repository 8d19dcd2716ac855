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

from calm_fast.core.checks import bad_type

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.[^.]+)?\.weight")
# what changes the meaning of the weights in a way that a plain pair of factors cannot carry
_UNSUPPORTED = {"use_dora": False, "bias": "none", "modules_to_save": None, "use_qalora": False}


@dataclass(frozen=True)
class LoraFactors:
    """One layer's adapter: h = scaling * B (A x), A (R, d_in), B (d_out, R)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def read_adapter(source: str | os.PathLike | Mapping[str, torch.Tensor], name: str) -> dict[str, LoraFactors]:
    """The factors of every adapted module, by the module's path in the model.

    Args:
        source: the folder of a PEFT LoRA adapter, or its state dict (whose scaling is then 1: B carries it).
        name: the argument that errors name.
    Raises:
        TypeError: neither a path nor a state dict.
        ValueError: no such folder or file, not a LoRA adapter, a feature that changes what the factors mean (DoRA,
        trained biases, fully trained modules), or factors that do not pair up.
    """
    if isinstance(source, Mapping):
        return _pair(dict(source), {}, name)
    if not isinstance(source, (str, os.PathLike)):
        raise bad_type("add_dual_lora", name, "the folder of a PEFT adapter or its state dict", source)
    folder = Path(source)
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights):
        if not file.is_file():
            raise ValueError(
                f"`{name}` must be the folder of a PEFT adapter in safetensors, {file.name} is not in {folder}"
            )
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`{name}` must be a LoRA adapter, got peft_type {config.get('peft_type')!r}")
    for key, plain in _UNSUPPORTED.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(f"`{name}`: adapters with {key}={config[key]!r} are not supported, expected {plain!r}")
    return _pair(load_file(weights), config, name)


def _pair(state: dict[str, torch.Tensor], config: dict[str, Any], name: str) -> dict[str, LoraFactors]:
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(f"`{name}`: unexpected tensor {key!r}, expected <module>.lora_A.weight and .lora_B.weight")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    if not factors:
        raise ValueError(f"`{name}` holds no LoRA factors")
    result = {}
    for module, pair in factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = {k: tuple(t.shape) for k, t in pair.items()}
            raise ValueError(f"`{name}`: {module} needs lora_A (R, d_in) and lora_B (d_out, R), got {shapes}")
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
    folder: str | os.PathLike, factors: Mapping[str, LoraFactors], base_model: str | None, transposed: bool
) -> None:
    """Write factors as a PEFT LoRA adapter for a causal language model.

    Args:
        folder: created if need be. factors: by module path. base_model: recorded for PEFT's loaders.
        transposed: the adapted layers store their weight (d_in, d_out), as GPT-2's Conv1D (PEFT: fan_in_fan_out).
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
