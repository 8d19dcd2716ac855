"""Models inside wrappers (DDP, FSDP, torch.compile, PEFT): the model itself, its own paths, and whole tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from calm_fast.core.wrapped_names import SEGMENTS


def _unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Yield `model`, the model in it, and so on, down to the model itself."""
    while True:
        yield model
        inside = dict(model.named_children())
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif len(inside) == 1 and (segment := next(iter(inside))) in SEGMENTS:
            model = inside[segment]
        elif _is_peft_model(model):
            model = model.get_base_model()  # type: ignore[operator]  # a method of PeftModel
        else:
            return


def _is_peft_model(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")  # a model can be one only if PEFT is imported
    return peft is not None and isinstance(model, peft.PeftModel)


def peft_layer_types() -> tuple[type[nn.Module], ...]:
    """Return the base class of the layers that PEFT puts into a model; nothing while PEFT is not imported."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # no layer of PEFT's exists before
    return () if tuners is None else (tuners.BaseTunerLayer,)


def has_peft_layers(model: nn.Module) -> bool:
    """Return True if PEFT has put adapters into the model."""
    kinds = peft_layer_types()
    return bool(kinds) and any(isinstance(module, kinds) for module in model.modules())


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel, FSDP 1, torch.compile and PeftModel, in any order; else itself."""
    return list(_unwrapped(model))[-1]


def own_path(path: str) -> str:
    """Return the path of a module or parameter as it is without the wrappers inside a model."""
    return ".".join(segment for segment in path.split(".") if segment not in SEGMENTS)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the unwrapped model by path, a module at each of its paths.

    Paths are those without wrappers. A wrapper inside the model stands for the module that it wraps.
    """
    found: dict[str, nn.Module] = {}
    for path, module in inner_model(model).named_modules(remove_duplicate=False):
        found.setdefault(own_path(path), module)
    return found


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` (without wrappers) of the unwrapped model, in place of what is there and its wrapper."""
    outer, _, name = path.rpartition(".")
    parent = inner_model(own_modules(model)[outer])
    setattr(parent, name, module)


def distribution(model: nn.Module) -> str | None:
    """Return the name of what spreads the model over processes, None for a model of one process."""
    for wrapper in _unwrapped(model):
        if isinstance(wrapper, DistributedDataParallel):
            return "DistributedDataParallel"
    if any("_fsdp_wrapped_module" in path for path, _ in model.named_modules()):
        return "FullyShardedDataParallel"
    if any(is_sharded(t) for t in (*model.parameters(), *model.buffers())):
        return "fully_shard or tensor parallelism"
    return None


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return True for a DTensor, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def is_shard(tensor: torch.Tensor) -> bool:
    """Return True if this process holds only a part of a parameter (FSDP, tensor parallelism, DeepSpeed ZeRO-3)."""
    return any(hasattr(tensor, mark) for mark in ("full_tensor", "_fsdp_flattened", "ds_id"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` on the CPU. For a DTensor every process has to call this."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]  # a method of DTensor
    return tensor.cpu().contiguous().clone()


def writes_files(tensors: list[torch.Tensor]) -> bool:
    """Return True if this process writes what all hold: every process, or for DTensors the one of rank 0."""
    return not any(is_sharded(t) for t in tensors) or torch.distributed.get_rank() == 0
