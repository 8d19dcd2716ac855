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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.core.files import atomic_path
from calm_fast.core.fingerprint import file_checksum
from calm_fast.hf import peft_config

_ADD = "add_dual_lora"  # the function whose argument an adapter is, named by errors
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraFactors:
    """The adapter of one layer: h = scaling * B (A x), with A (R, d_in) and B (d_out, R)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def read_adapter(source: str | os.PathLike[str] | Mapping[str, torch.Tensor], name: str) -> dict[str, LoraFactors]:
    """Return the factors of every adapted module, by the module's path in the model.

    Args:
        source: the folder of a PEFT LoRA adapter, or its state dict. A state dict has no configuration: it is taken
            for one plain adapter whose scaling is 1, so B has to contain the scaling.
        name: the argument of add_dual_lora that errors name.
    Raises:
        TypeError: `source` is neither a path nor a state dict.
        ValueError: a file is missing or damaged, the adapter is not a LoRA, it uses a feature beyond a pair of factors
            (`peft_config.FIELDS`), its files contradict each other, or its factors do not pair up.
    """
    if isinstance(source, Mapping):
        return _factors_by_module(dict(source), None, name)
    if not isinstance(source, (str, os.PathLike)):
        raise bad_type(_ADD, name, "the folder of a PEFT adapter or its state dict", source)
    folder = Path(source)
    expected = "the folder of a PEFT adapter in safetensors"
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise bad_value(_ADD, name, expected, f"{folder}, and {file} is not in it")
    config = read_json(_ADD, name, expected, folder / CONFIG)
    peft_config.check_plain(_ADD, name, config)
    return _factors_by_module(read_tensors(_ADD, name, expected, folder / WEIGHTS), config, name)


def _factors_by_module(
    state: dict[str, torch.Tensor], config: dict[str, Any] | None, name: str
) -> dict[str, LoraFactors]:
    factors: dict[str, dict[str, torch.Tensor]] = {}
    adapters = set()
    for key, tensor in state.items():
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise bad_value(_ADD, name, "tensors <module>.lora_A.weight and <module>.lora_B.weight only", repr(key))
        adapters.add(match["adapter"])
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    if not factors:
        raise bad_value(_ADD, name, "an adapter with LoRA factors", "no tensors")
    if len(adapters) > 1:
        names = ", ".join(sorted(map(repr, adapters)))
        raise bad_value(
            _ADD, name, "the tensors of one adapter", f"those of {len(adapters)}: {names}. Pass one of them"
        )
    result = {}
    for module, pair in factors.items():
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            shapes = {k: tuple(t.shape) for k, t in pair.items()}
            raise bad_value(_ADD, name, f"lora_A (R, d_in) and lora_B (d_out, R) for {module}", str(shapes))
        if config is not None:
            _check_agreement(module, a.shape[0], config, name)
        result[module] = LoraFactors(a, b, 1.0 if config is None else peft_config.scaling(config, module))
    return result


def _check_agreement(module: str, rank: int, config: dict[str, Any], name: str) -> None:
    expected = f"a folder whose {CONFIG} and {WEIGHTS} are of one adapter"
    if rank != peft_config.rank(config, module):
        got = f"rank {peft_config.rank(config, module)} for {module} in the first and {rank} in the second"
        raise bad_value(_ADD, name, expected, got)
    if not peft_config.is_targeted(config, module):
        raise bad_value(_ADD, name, expected, f"factors for {module}, which the first does not target")


def read_json(where: str, name: str, expected: str, file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise the ValueError of argument `name` of `where`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:  # also bytes that are not UTF-8
        raise bad_value(where, name, expected, f"{file}, which is not JSON ({problem})") from problem
    if not isinstance(content, dict):
        raise bad_value(where, name, expected, f"{file}, which holds a {type(content).__name__}")
    return content


def read_tensors(where: str, name: str, expected: str, file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, or raise the ValueError of argument `name` of `where`."""
    try:
        return load_file(file)
    except SafetensorError as problem:
        raise bad_value(where, name, expected, f"{file}, which is damaged ({problem})") from problem


@dataclass(frozen=True)
class BaseReference:
    """The base model of an adapter, as PEFT records it.

    name, revision: a hub name or a path, and the revision on the hub. task_type: of PEFT, None for a plain module.
    """

    name: str | None
    revision: str | None
    task_type: str | None


def write_adapter(
    folder: str | os.PathLike[str],
    factors: Mapping[str, LoraFactors],
    base: BaseReference,
    transposed: bool,
    target_modules: str | list[str],
) -> None:
    """Write factors as a PEFT LoRA adapter.

    Args:
        folder: created if it does not exist.
        factors: by module path; on the CPU.
        transposed: the adapted layers store their weight as (d_in, d_out), like GPT-2's Conv1D (PEFT: fan_in_fan_out).
        target_modules: what PEFT reads as the adapted layers.
    """
    first = next(iter(factors.values()))
    r, alpha = first.a.shape[0], first.scaling * first.a.shape[0]
    others = {m: f for m, f in factors.items() if (f.a.shape[0], f.scaling * f.a.shape[0]) != (r, alpha)}
    config = {
        "peft_type": "LORA",
        "task_type": base.task_type,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": target_modules,
        # PEFT finds a pattern at the end of a path; "^" makes it the whole path
        "rank_pattern": {f"^{re.escape(m)}": f.a.shape[0] for m, f in others.items()},
        "alpha_pattern": {f"^{re.escape(m)}": f.scaling * f.a.shape[0] for m, f in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }
    tensors = {}
    for module, f in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = f.a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = f.b
    write_pair(Path(folder), CONFIG, config, WEIGHTS, tensors)


def write_pair(
    folder: Path,
    config_name: str,
    config: dict[str, Any],
    weights_name: str,
    tensors: dict[str, torch.Tensor],
    checksum_key: str | None = None,
) -> None:
    """Write a configuration and its tensors so that no crash leaves those of two different saves together.

    Both files are written beside their names first. Then the old tensors go, the configuration is put in place, and
    the tensors last: at every moment the folder holds the old pair, no tensors, or the new pair.

    checksum_key: of the configuration, for the SHA-256 of the file of tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / weights_name
    with atomic_path(weights) as new_weights:
        save_file(tensors, new_weights, metadata={"format": "pt"})
        if checksum_key:
            config = {checksum_key: file_checksum(new_weights)} | config
        with atomic_path(folder / config_name) as new_config:
            new_config.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            Path(os.path.realpath(weights)).unlink(missing_ok=True)
