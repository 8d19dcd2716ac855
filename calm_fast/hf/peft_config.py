"""How a LoRA adapter's adapter_config.json is read: one row for each field of PEFT's LoraConfig (0.21).

A plain adapter is a pair of factors for each layer and a scaling. A field that says more is refused, unless its value
switches it off. A field that no row names, from a newer PEFT, is refused unless its value is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from calm_fast.core.checks import bad_value


@dataclass(frozen=True)
class Field:
    """Treatment of one field.

    use: "read"; "no effect" on what a trained adapter computes; or "refused" unless its value is in `plain`.
    plain: the values with which the adapter is a plain one; the first is named by errors.
    why: what else the field means, for errors.
    """

    use: str
    plain: tuple[Any, ...] = ()
    why: str = ""


_READ, _NO_EFFECT = Field("read"), Field("no effect")
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


def _refused(why: str, *plain: Any) -> Field:
    return Field("refused", plain or _EMPTY, why)


FIELDS: dict[str, Field] = {
    "peft_type": _READ,
    "r": _READ,
    "lora_alpha": _READ,
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "use_rslora": _READ,
    # which layers adapt: the tensors say it, and have to agree
    "target_modules": _READ,
    "exclude_modules": _READ,
    "layers_to_transform": _READ,
    "layers_pattern": _READ,
    # where the adapter comes from
    "task_type": _NO_EFFECT,
    "auto_mapping": _NO_EFFECT,
    "peft_version": _NO_EFFECT,
    "base_model_name_or_path": _NO_EFFECT,
    "revision": _NO_EFFECT,
    # only while training; add_dual_lora has its own lora_dropout
    "inference_mode": _NO_EFFECT,
    "lora_dropout": _NO_EFFECT,
    # only for merging: how the base stores its weight
    "fan_in_fan_out": _NO_EFFECT,
    # only with init_lora_weights, which is checked
    "loftq_config": _NO_EFFECT,
    "eva_config": _NO_EFFECT,
    "corda_config": _NO_EFFECT,
    "lora_ga_config": _NO_EFFECT,
    # only with megatron_config and use_qalora, which are checked
    "megatron_core": _NO_EFFECT,
    "qalora_group_size": _NO_EFFECT,
    "runtime_config": _NO_EFFECT,  # where DoRA computes
    "init_lora_weights": _refused(
        "it was trained on a base whose weights this initialisation changed; write it with PEFT's "
        "save_pretrained(path_initial_model_for_weight_conversion=...), which makes it a plain one",
        True,
        False,
        None,
        "gaussian",
        "eva",
        "orthogonal",
    ),
    "bias": _refused("it also trains biases", "none", None),
    "lora_bias": _refused("it adds a bias", False, None),
    "modules_to_save": _refused("it replaces whole modules"),
    "trainable_token_indices": _refused("it replaces rows of the embedding"),
    "target_parameters": _refused("it adapts parameters, not layers"),
    "layer_replication": _refused("it changes the number of layers"),
    "ensure_weight_tying": _refused("it ties the adapters of several layers", False, None),
    "use_dora": _refused("it rescales the base's weight; merge it into the base instead", False, None),
    "use_qalora": _refused("it pools the input", False, None),
    "use_bdlora": _refused("its factors are block-diagonal"),
    "alora_invocation_tokens": _refused("it acts only from these tokens on"),
    "arrow_config": _refused("it mixes several adapters"),
    "kasa_config": _refused("it changes the base's weight and scales the factors"),
    "monteclora_config": _refused("it samples its factors"),
    "velora_config": _refused("it changes how gradients flow"),
    "megatron_config": _refused("its factors are spread over processes"),
}


def check_plain(where: str, name: str, config: dict[str, Any]) -> None:
    """Check that `config`, the content of an adapter_config.json, describes a plain LoRA adapter.

    name: the argument of `where` that the adapter is.
    """
    if config.get("peft_type") != "LORA":
        raise bad_value(where, name, "a LoRA adapter", f"peft_type {config.get('peft_type')!r}")
    for key, value in config.items():
        field = FIELDS.get(key)
        if field is None and not _among(value, _EMPTY):
            raise bad_value(
                where, name, f"an adapter without {key}", f"{key}={value!r}, which this release does not know"
            )
        if field is not None and field.use == "refused" and not _among(value, field.plain):
            got = f"{key}={value!r}, not supported: {field.why}"
            raise bad_value(where, name, f"an adapter with {key}={field.plain[0]!r}", got)


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in values)


def rank(config: dict[str, Any], module: str) -> int:
    """Return the rank that `config` gives the layer `module`."""
    found: int = _for_module(config.get("rank_pattern"), module, config.get("r", 8))
    return found


def scaling(config: dict[str, Any], module: str) -> float:
    """Return the factor of B A x that `config` gives the layer `module`."""
    alpha, r = _for_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)), rank(config, module)
    return float(alpha / (r**0.5 if config.get("use_rslora") else r))


def _for_module(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT's get_pattern_key
            return value
    return default


def is_targeted(config: dict[str, Any], module: str) -> bool:
    """Return True if PEFT adapts the layer `module` by `config` (as PEFT's check_target_module_exists)."""
    if (excluded := config.get("exclude_modules")) and _named(excluded, module):
        return False
    wanted = config.get("target_modules")
    if wanted is None or wanted == "all-linear":  # PEFT chooses by the kind of model
        return True
    if not _named(wanted, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or layers is None or layers == []:
        return True
    names = config.get("layers_pattern") or []
    names = [names] if isinstance(names, str) else names
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for m in (re.match(pattern, module) for pattern in patterns) if m), None)
    return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def _named(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
