"""Dual LoRA on transformers models: add the layers, switch their mode, read their gates, remove them.

calm_fast.hf.dual_lora_files saves and loads them.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from calm_fast.core.checks import bad_type, bad_value, check_finite_number, describe
from calm_fast.core.prompt_record import set_prompt_record
from calm_fast.hf.adapters import LoraFactors, read_adapter
from calm_fast.hf.dual_lora_targets import conv1d_sizes, find_targets, layer_device
from calm_fast.hf.peft_config import FIELDS
from calm_fast.hf.quantised import keep_4bit_layout
from calm_fast.hf.saving import CompositionFiles
from calm_fast.hf.wrappers import distribution, inner_model, own_modules, own_path, replace_module
from calm_fast.modules.dual_lora import (
    DualLoRALinear,
    GateStatistics,
    check_dropout,
    check_mode,
    check_settings,
    check_size,
)

RESTORE = "_dual_lora_restore"  # attribute of a model: what trained before add_dual_lora
_SETTINGS = {name: p.default for name, p in inspect.signature(DualLoRALinear).parameters.items() if name != "base"}
_OPTIONS = frozenset(_SETTINGS) - {"rank", "alpha"}
# the other arguments of PEFT's LoraConfig: each changes which layers adapt or what they compute
_PEFT_UNSUPPORTED = frozenset(FIELDS) - {"r", "lora_alpha", "lora_dropout", "target_modules"}
_ADD = "add_dual_lora"
Adapter = str | os.PathLike[str] | Mapping[str, torch.Tensor]


def add_dual_lora(
    model: nn.Module,
    target_modules: Iterable[str] | str | None = None,
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
            expression for whole paths. Default, the family's projections to queries and values: q_proj and v_proj, or
            what PEFT has for the family, or a fused projection (query_key_value, c_attn, Wqkv, ...), not those of a
            vision or audio tower.
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
        ValueError: an argument is out of range, no layer matches, a match is not a linear layer or one whose weight the
            model reads without calling it, the model has dual LoRA already, or an adapter lacks a targeted layer,
            covers a layer that is not targeted, or has factors of another shape.
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
    _check_settings(rank, alpha, options)
    check_mode(_ADD, mode)
    check_addable(_ADD, model)
    targets = find_targets(model, target_modules)
    given: dict[str, dict[str, LoraFactors]] = {}
    for side, adapter in (("pos", positive), ("neg", negative)):
        if adapter is not None:
            name = "positive" if side == "pos" else "negative"
            given[side] = read_adapter(adapter, name)
            _check_coverage(given[side], targets, name)

    layers = {}
    for path, base in targets.items():
        pos, neg = (given.get(side, {}).get(path) for side in ("pos", "neg"))
        kwargs = {"rank": rank, "alpha": alpha} | options
        if pos is not None:
            kwargs |= {"rank": pos.a.shape[0], "alpha": pos.scaling * pos.a.shape[0]}
            kwargs = {"rank_neg": rank, "alpha_neg": alpha} | kwargs
        if neg is not None:
            kwargs |= {"rank_neg": neg.a.shape[0], "alpha_neg": neg.scaling * neg.a.shape[0]}
        layers[path] = layer = make_layer(_ADD, path, base, kwargs)
        for side, factors in (("pos", pos), ("neg", neg)):
            if factors is not None:
                _copy_factors(layer, path, side, factors)
        layer.set_mode(mode)
    put_layers(model, layers)
    return model


def check_addable(where: str, model: nn.Module) -> None:
    """Check that dual LoRA layers can be added to `model`: it has none, and is not spread over processes yet."""
    if dual_lora_layers(model):
        raise bad_value(where, "model", "without dual LoRA", "one that has it; call remove_dual_lora(model) first")
    if by := distribution(model):
        raise bad_value(
            where, "model", "one that is not distributed yet", f"one under {by}; add dual LoRA first, then distribute"
        )
    keep_4bit_layout(where, "model", model)


def make_layer(where: str, path: str, base: nn.Module, settings: dict[str, Any]) -> DualLoRALinear:
    """Return a dual LoRA layer over `base`, whose own parameters keep their `requires_grad`."""
    flags = [p.requires_grad for p in base.parameters()]
    layer = DualLoRALinear(base, **(conv1d_sizes(base) | layer_device(where, path, base) | settings))
    for p, flag in zip(base.parameters(), flags, strict=True):
        p.requires_grad_(flag)  # put_layers freezes the model, where nothing can fail any more
    return layer.train(base.training)


def put_layers(model: nn.Module, layers: dict[str, DualLoRALinear]) -> None:
    """Put layers into the model by path, freeze the rest of it, and keep what remove_dual_lora restores."""
    own = inner_model(model)
    trains = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False) if p.requires_grad}
    setattr(own, RESTORE, {own_path(name): p.requires_grad for name, p in own.named_parameters()})
    own.requires_grad_(False)
    for path, layer in layers.items():
        replace_module(own, path, layer)
        layer._tied_weights_keys = RefusesSaving()
        for p in layer.parameters(recurse=False):
            p.requires_grad_(id(p) in trains)
    for module in own.modules():
        # a composition holds references to its parts, and itself refuses one that is not what its reference leads to
        if isinstance(module, PreTrainedModel) and not isinstance(module, CompositionFiles):
            # what transformers writes reloads without the layers and with new random weights in their place
            module.save_pretrained = functools.partial(_save_pretrained, module)  # type: ignore[method-assign]
            if getattr(module, "is_quantized", False):
                module._hf_peft_config_loaded = True  # Trainer refuses quantised models without adapters


def _save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """Stand in for `save_pretrained` of a model with dual LoRA, which Trainer and push_to_hub call too."""
    if not dual_lora_layers(model):  # the layers were removed by hand
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)
    raise _not_saved(repr(os.fspath(save_directory)))


def _not_saved(folder: str) -> ValueError:
    return bad_value(
        "save_pretrained",
        "model",
        "one without dual LoRA, because from_pretrained would load it without the layers and with random weights in "
        "their place",
        f"one with it. Call save_dual_lora(model, {folder}), which load_dual_lora(base, folder) "
        "reads. With a Trainer use calm_fast.nat.trainer.DualLoRATrainer, whose checkpoints hold the layers, or "
        'save_strategy="no"',
    )


class RefusesSaving(dict[str, str]):
    """Raises ValueError where transformers' save_pretrained asks a layer for the names of its tied weights.

    The layer may be inside a model that add_dual_lora has not seen, whose own save_pretrained it cannot replace. PEFT
    asks for the items, of which there are none.
    """

    def __bool__(self) -> bool:
        return True  # an empty mapping would be passed over

    def keys(self) -> NoReturn:
        raise _not_saved("folder")

    def __iter__(self) -> NoReturn:
        raise _not_saved("folder")


def remove_dual_lora(model: nn.Module) -> nn.Module:
    """Put the base layers back and restore every parameter's `requires_grad`. Return the model.

    Raises:
        ValueError: the model has no dual LoRA.
    """
    layers = layers_of(model, "remove_dual_lora")
    _check_not_ddp("remove_dual_lora", model)
    own = inner_model(model)
    for path, layer in layers.items():
        replace_module(own, path, layer.base)
    for module in own.modules():
        # add_dual_lora may have been called for a part of this model
        flags = module.__dict__.pop(RESTORE, {})
        for name, p in module.named_parameters() if flags else ():
            # PEFT puts a layer that it adapts one level deeper
            name = own_path(name).replace(".base_layer.", ".")
            p.requires_grad_(flags.get(name, p.requires_grad))
        if isinstance(saving := module.__dict__.get("save_pretrained"), functools.partial):
            if saving.func is _save_pretrained:
                del module.__dict__["save_pretrained"]
                if not hasattr(module, "peft_config"):  # which adapters of transformers leave
                    module.__dict__.pop("_hf_peft_config_loaded", None)
    set_prompt_record(own, None)
    return model


def dual_lora_layers(model: nn.Module) -> dict[str, DualLoRALinear]:
    """Return the model's DualLoRALinear layers by path; empty for a model without dual LoRA.

    Paths are those of the model itself, also inside DDP, FSDP, torch.compile and PeftModel.
    """
    modules = ((path, inner_model(m)) for path, m in own_modules(model).items())
    return {path: m for path, m in modules if isinstance(m, DualLoRALinear)}


def set_dual_lora_mode(model: nn.Module, mode: str) -> nn.Module:
    """Switch every dual LoRA layer to mode "neg", "pos" or "mix" (`DualLoRALinear.set_mode`). Return the model.

    Raises:
        ValueError: the model has no dual LoRA, or an unknown mode.
    """
    layers = layers_of(model, "set_dual_lora_mode")
    check_mode("set_dual_lora_mode", mode)
    _check_not_ddp("set_dual_lora_mode", model)
    for layer in layers.values():
        layer.set_mode(mode)
    return model


def record_gates(model: nn.Module, on: bool = True) -> nn.Module:
    """Start recording every layer's gate from zero, or stop with `on=False`. Return the model.

    Raises:
        ValueError: the model has no dual LoRA.
    """
    for layer in layers_of(model, "record_gates").values():
        layer.record_gates = on
        if on:
            layer.clear_gates()
    return model


def get_gates(model: nn.Module) -> dict[str, GateStatistics]:
    """Return every layer's gate statistics since `record_gates(model)`, by path. Synchronises.

    Raises:
        ValueError: the model has no dual LoRA.
    """
    return {path: layer.gate_statistics() for path, layer in layers_of(model, "get_gates").items()}


def layers_of(model: nn.Module, function: str) -> dict[str, DualLoRALinear]:
    """Return the model's dual LoRA layers by path, or raise the ValueError of `function` where it has none."""
    if not isinstance(model, nn.Module):
        raise bad_type(function, "model", "a model with dual LoRA layers (an nn.Module)", model)
    layers = dual_lora_layers(model)
    if not layers:
        raise bad_value(function, "model", "one with dual LoRA layers", "one without; add_dual_lora(model) adds them")
    return layers


def _check_not_ddp(where: str, model: nn.Module) -> None:
    if distribution(model) == "DistributedDataParallel":
        raise bad_value(
            where,
            "model",
            "the model before it is wrapped",
            "a DistributedDataParallel, which averages the gradients of only those parameters that trained when it was "
            "built. Call this on its `module`, and wrap that anew to train",
        )


def _check_settings(rank: Any, alpha: Any, options: dict[str, Any]) -> None:
    settings = _SETTINGS | {"rank": rank, "alpha": alpha} | options
    settings["rank_neg"] = rank if settings["rank_neg"] is None else settings["rank_neg"]
    settings["alpha_neg"] = alpha if settings["alpha_neg"] is None else settings["alpha_neg"]
    for name in ("in_features", "out_features", "dtype", "device"):
        del settings[name]
    check_settings(_ADD, **settings)


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
