"""The composition's own tensors: taken from a state dict, checked, written and read.

A file is written only if loading would accept it: exactly the names and shapes that the config of the composition asks
for, whatever wrappers the model or its state dict went through.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from calm_fast.core.checks import bad_value
from calm_fast.core.wrapped_names import bare_name
from calm_fast.hf.config import FORMAT_VERSION
from calm_fast.hf.layers import hidden_size
from calm_fast.hf.wrappers import is_sharded
from calm_fast.modules.cross_attention import CrossAttention

if TYPE_CHECKING:
    from calm_fast.hf.saving import CompositionFiles

PREFIX = "connections."
PARTS = ("anchor.", "augmenters.")
VERSION_KEY = "calm_fast_format"
_ADAPTER = re.compile(r"\.(base_layer|lora_\w+|modules_to_save|original_module|parametrizations)\.")
_LOAD = "from_pretrained"
_OFFLOADED = ". Take accelerate's hooks off first: accelerate.hooks.remove_hook_from_module(model, recurse=True)"
_QUANTISED = ". Quantised connections are not saved: save the composition before they are quantised"


def expected_shapes(model: CompositionFiles) -> dict[str, tuple[int, ...]]:
    """Return the shape of every composition tensor by name, as the config defines them."""
    shapes: dict[str, tuple[int, ...]] = {}
    width, settings = hidden_size(model.anchor), model.config.cross_attention
    owners = [i for i, pairs in enumerate(model.config.connections) for _ in pairs]
    with torch.device("meta"):
        for index, augmenter in enumerate(owners):
            layer = CrossAttention(width, hidden_size(model.augmenters[augmenter]), **settings)  # type: ignore[arg-type]  # from a ModuleList
            shapes |= {f"{PREFIX}{index}.{name}": tuple(t.shape) for name, t in layer.state_dict().items()}
    return shapes


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def own_tensors(state_dict: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """Return (composition tensors by their bare names, True if one of them was gathered from several processes).

    Every process of a sharded model must call this, because gathering is collective. Names of the parts are left out,
    unknown ones are kept for `check_tensors` to name.
    """
    own: dict[str, torch.Tensor] = {}
    gathered = False
    for name, tensor in state_dict.items():
        bare = bare_name(name)
        if bare.startswith(PARTS):
            continue
        if not isinstance(tensor, torch.Tensor):
            raise bad_value(
                "save_pretrained", "state_dict", "tensors", f"{name}, a {type(tensor).__name__}{_QUANTISED}"
            )
        if is_sharded(tensor):
            gathered, tensor = True, tensor.full_tensor()  # type: ignore[attr-defined]  # of a DTensor
        if bare in own and own[bare].data_ptr() != tensor.data_ptr():
            raise bad_value("save_pretrained", "state_dict", "one tensor per name", f"{bare} twice, also as {name}")
        own[bare] = tensor.detach()
    return own, gathered


def check_tensors(where: str, argument: str, tensors: Mapping[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless `tensors` has exactly the names and shapes of `expected`, all plain tensors."""
    adapters = [name for name in tensors if _ADAPTER.search(name)]
    if adapters:
        what = "the composition's own tensors, without adapters or parametrizations"
        do = (
            "Merge them (merge_and_unload() of PEFT, remove_parametrizations() of torch), or save the adapter alone "
            "with PeftModel.save_pretrained()"
        )
        raise bad_value(where, argument, what, f"{_listed(adapters)}. {do}")
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    what = f"the {len(expected)} tensors of this composition ({_listed(expected)})"
    if missing or unknown:
        found = [f"{kind} {_listed(names)}" for kind, names in (("missing", missing), ("unknown", unknown)) if names]
        raise bad_value(where, argument, what, "; ".join(found))
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise bad_value(where, argument, f"{name} of shape {shape}", str(tuple(tensors[name].shape)))
        plain = type(tensors[name]) in (torch.Tensor, torch.nn.Parameter) and tensors[name].is_floating_point()
        if not plain or tensors[name].is_meta:
            hint = _OFFLOADED if tensors[name].is_meta else _QUANTISED
            got = f"a {type(tensors[name]).__name__} on {tensors[name].device}{hint}"
            raise bad_value(where, argument, f"{name} as a plain tensor that holds data", got)


def checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a checksum of names, dtypes, shapes and values of CPU tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def write_tensors(
    file: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str], version: int
) -> None:
    """Write CPU tensors with the format `version` of their config and `metadata` into a safetensors file."""
    save_file(tensors, file, metadata={"format": "pt", VERSION_KEY: str(version)} | metadata)


def read_metadata(file: str) -> dict[str, str]:
    """Return the metadata of a file of composition tensors.

    Raises ValueError if the file is damaged, or has a format that this release cannot read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except SafetensorError as problem:
        raise _damaged(file, str(problem)) from problem
    version = metadata.get(VERSION_KEY, "none")
    if version not in {str(v) for v in range(1, FORMAT_VERSION + 1)}:
        expected = f"composition tensors of format 1 to {FORMAT_VERSION}, which this release reads"
        got = f"format {version} in {file}. Write a composition with its own save_pretrained()"
        raise bad_value(_LOAD, "pretrained_model_name_or_path", expected, got)
    return metadata


def read_tensors(file: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file by name, on the CPU."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}


def check_undamaged(file: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless `tensors` have the checksum in `file`. Files of earlier releases have none."""
    written = read_metadata(file).get("checksum")
    if written and checksum(tensors) != written:
        raise _damaged(file, "its tensors are not those that were saved")


def _damaged(file: str, problem: str) -> ValueError:
    got = f"{file}, which is damaged ({problem}). Copy or save the composition again"
    return bad_value(_LOAD, "pretrained_model_name_or_path", "a folder of a composition whose files are whole", got)


def load_tensors(model: CompositionFiles, tensors: dict[str, torch.Tensor], keep_dtype: bool) -> None:
    """Put checked composition tensors into `model`, wrapped or not.

    keep_dtype: the parameters take the dtype of the tensors; otherwise the tensors are cast to the parameters'.
    """
    own = {bare_name(name): (name, value) for name, value in model.connections.state_dict(keep_vars=True).items()}
    state = {}
    for name, tensor in tensors.items():
        path, value = own[name.removeprefix(PREFIX)]
        if keep_dtype and not value.is_meta:
            tensor = tensor.to(value.device)
        if is_sharded(value):
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor.to(value.device), value.device_mesh, value.placements)
        state[path] = tensor
    model.connections.load_state_dict(state, assign=keep_dtype)
