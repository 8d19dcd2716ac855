"""Checksums and samples that tell models and data apart, so that one is never taken for another.

A model has three of them, for three questions:

- `model_fingerprint`: are these exactly the weights of that run, in the same dtype?
- `model_folder_fingerprint`: are these the same files? It needs no loaded model.
- `weight_fingerprint` with `weights_differ`: is this the same model, in whatever dtype and on whatever device?
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calm_fast.core.wrapped_names import bare_name

SAMPLED_TENSORS = 128
SAMPLED_VALUES = 4
_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ENTRY = struct.Struct(f"<I{SAMPLED_VALUES}h")  # checksum of name and shape, values as bfloat16


def model_fingerprint(model: nn.Module, edge: int = 64) -> str:
    """Return a checksum of a loaded model: name, shape and the first `edge` elements of every parameter."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        first = p.detach().flatten()[:edge].double().cpu().tolist()
        digest.update(f"{name} {tuple(p.shape)} {first}".encode())
    return digest.hexdigest()


def model_folder_fingerprint(folder: str | os.PathLike[str], edge: int = 1 << 20) -> str:
    """Return a checksum of a model that need not be loaded for it, so it differs from `model_fingerprint`.

    It covers config.json, and name, size and the first and last `edge` bytes of every weight file.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*")):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(edge))
                content.seek(max(0, file.stat().st_size - edge))
                digest.update(content.read(edge))
    return digest.hexdigest()


def sampled_positions(numel: int) -> list[int]:
    """Return the flat indices that are sampled of a tensor with `numel` elements, evenly spread."""
    return [numel * (2 * i + 1) // (2 * SAMPLED_VALUES) for i in range(SAMPLED_VALUES)]


def is_comparable(tensor: torch.Tensor) -> bool:
    """Return True if the values of `tensor` can be sampled: a plain floating-point tensor with data of its own.

    Sharded, quantised and offloaded (meta) tensors are not.
    """
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.dtype in _COMPARABLE and not tensor.is_meta and tensor.numel() > 0


def sample_weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return SAMPLED_VALUES elements of every comparable tensor, (SAMPLED_VALUES,) bfloat16 on the CPU, by name.

    Synchronises each device once.
    """
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if is_comparable(tensor):
            places = torch.tensor(sampled_positions(tensor.numel()), device=tensor.device)
            values = tensor.detach().take(places).to(torch.bfloat16)
            by_device.setdefault(tensor.device, {})[name] = values
    samples: dict[str, torch.Tensor] = {}
    for found in by_device.values():
        samples |= dict(zip(found, torch.cat(list(found.values())).cpu().split(SAMPLED_VALUES), strict=True))
    return samples


def same_values(first: torch.Tensor, second: torch.Tensor, rounded: bool) -> bool:
    """Return True if two bfloat16 samples come from one tensor.

    A bfloat16 value is the same whether it was rounded from float32 or was bfloat16 all along. rounded: one of the two
    was float16 in between, so the last bit of bfloat16 may differ, and so may values below float16's smallest one.
    """
    if not rounded:
        return torch.equal(first.view(torch.int16), second.view(torch.int16))
    return torch.allclose(first.float(), second.float(), rtol=2.0**-7, atol=2.0**-24, equal_nan=True)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters by name without wrappers; a tied one appears under each of its names."""
    return {bare_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def _key(name: str, shape: Iterable[int]) -> int:
    return zlib.crc32(f"{name} {tuple(shape)}".encode())


def weight_fingerprint(model: nn.Module) -> str:
    """Return a few values of up to 128 parameters as a short text, or "" if no parameter can be read.

    `weights_differ` compares it with a model in another dtype, on another device, or with more parameters.
    """
    weights = {name: p for name, p in sorted(_weights(model).items()) if is_comparable(p)}
    names = list(weights)
    count = min(len(names), SAMPLED_TENSORS)
    chosen = [names[i * len(names) // count] for i in range(count)]
    samples = sample_weights({name: weights[name] for name in chosen})
    entries = [
        _ENTRY.pack(_key(name, weights[name].shape), *values.view(torch.int16).tolist())
        for name, values in samples.items()
    ]
    if not entries:
        return ""
    half = any(weights[name].dtype == torch.float16 for name in samples)
    return f"{'half' if half else 'full'}:{base64.b64encode(b''.join(entries)).decode()}"


def weights_differ(recorded: str, model: nn.Module, partial: bool = False) -> str:
    """Say how `model` differs from the one that gave `recorded`, or return "".

    partial: `model` may lack recorded parameters, because some of its weights are quantised.
    Raises ValueError if `recorded` is no text of `weight_fingerprint`.
    """
    if not recorded:
        return ""
    half, _, text = recorded.partition(":")
    try:
        if half not in ("half", "full") or not text:
            raise binascii.Error("no values")
        content = list(_ENTRY.iter_unpack(base64.b64decode(text, validate=True)))
    except (struct.error, binascii.Error) as problem:
        raise ValueError(f"weights_differ: `recorded` must be a fingerprint, got {recorded[:60]!r}") from problem
    weights = _weights(model)
    by_key = {_key(name, p.shape): name for name, p in weights.items()}
    absent = sum(key not in by_key for key, *_ in content)
    if absent and not partial:
        return f"{absent} of {len(content)} parameters that were looked at are missing or have another shape"
    names = [by_key[key] for key, *_ in content if key in by_key]
    samples = sample_weights({name: weights[name] for name in names})
    before = {
        by_key[key]: torch.tensor(v, dtype=torch.int16).view(torch.bfloat16) for key, *v in content if key in by_key
    }
    rounded = half == "half" or any(weights[name].dtype == torch.float16 for name in samples)
    changed = [name for name, values in samples.items() if not same_values(values, before[name], rounded)]
    if not changed:
        return ""
    return (
        f"{len(changed)} of {len(samples)} parameters that were compared have other values, for instance {changed[0]}"
    )


def file_checksum(file: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def json_checksum(content: Any) -> str:
    """Return the SHA-256 of `content` as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
