"""References of a saved composition to its parts: where their weights are, and whether those are still the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from calm_fast.core.checks import bad_value
from calm_fast.core.fingerprint import is_comparable, same_values, sample_weights, sampled_positions, weights_differ
from calm_fast.core.wrapped_names import bare_name
from calm_fast.hf.encoders import load_encoder
from calm_fast.hf.layers import hidden_size
from calm_fast.hf.part_configs import configs_differ
from calm_fast.hf.quantised import is_quantised, quantised_weight
from calm_fast.hf.wrappers import is_shard, peft_layer_types
from calm_fast.modules.dual_lora import DualLoRALinear

StrPath = str | os.PathLike[str]
LOAD = "from_pretrained"
SAVE = "save_pretrained"
_COMMIT = re.compile(r"snapshots/([0-9a-f]{40})(?:/|$)")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def reference(model: PreTrainedModel) -> str:
    """Return the path or hub name that `model` was loaded from: a folder as its real path, "" if there is none."""
    path: str = getattr(model, "name_or_path", "") or ""
    return os.path.realpath(path) if os.path.isdir(path) else path


def commit(model: PreTrainedModel, hub: dict[str, Any]) -> str | None:
    """Return the commit of a model that was loaded from the hub, None for others.

    hub: the arguments of from_pretrained that located it. transformers up to 5.23 keeps the commit in the config; since
    then it is read off the cache of the hub. If it is not there, this is the revision that was asked for.
    """
    name = reference(model)
    if not name or os.path.isdir(name):
        return None
    kept = getattr(model.config, "_commit_hash", None)
    if kept:
        return str(kept)
    asked: str | None = hub.get("revision")
    where = {key: hub[key] for key in ("cache_dir", "revision") if key in hub}
    try:
        file = cached_file(name, CONFIG_NAME, local_files_only=True, **where)
    except OSError:  # not in this cache: the revision that was asked for is all that is known
        return asked
    found = _COMMIT.search(str(file).replace(os.sep, "/"))
    return found[1] if found else asked


def portable(path: str, folder: StrPath) -> str:
    """Return a reference as it is written into `folder`: relative for a folder inside or beside it."""
    if not os.path.isdir(path):
        return path
    own, part = os.path.realpath(folder), os.path.realpath(path)
    parent = os.path.dirname(own)
    if part.startswith(own + os.sep):
        return "./" + os.path.relpath(part, own).replace(os.sep, "/")
    if os.path.dirname(part) == parent and parent != os.path.dirname(parent):
        return "../" + os.path.basename(part)
    return part


def _is_path(where: StrPath) -> bool:
    """Return True if `where` can only be a folder: a name on the hub is NAME or OWNER/NAME."""
    text = os.fspath(where)
    path = not isinstance(where, str) or os.path.isabs(text) or text.count("/") > 1
    return path or text[:1] in ("", ".", "~") or text.endswith("/")


@contextlib.contextmanager
def load_errors_named(function: str, name: str, path: StrPath, expected: str) -> Iterator[None]:
    """Turn the failure to load argument `name` of `function` from `path` into a ValueError that names the argument."""
    text = os.fspath(path)
    missing = not os.path.exists(text)
    absent = "a folder that does not exist" + ("" if os.path.isabs(text) else f" in {os.getcwd()}")
    if missing and _is_path(path):
        raise bad_value(function, name, expected, f"{text!r}, {absent}")
    try:
        yield
    except OSError as problem:
        why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        if missing:
            why = f"{absent}; as the name of a model on the hub it could not be loaded either ({why})"
        raise bad_value(function, name, expected, f"{text!r}, {why}") from problem


def located(path: StrPath, folder: str) -> StrPath:
    """Return where the part lies that a composition in `folder` refers to by `path`: a folder, or a name on the hub.

    A relative path is looked up beside the composition first, and where it really lies if its folder is a link.
    """
    beside = os.path.normpath(os.path.join(folder, path))
    if not os.path.isdir(beside):
        beside = os.path.normpath(os.path.join(os.path.realpath(folder), path))
    return beside if os.path.isdir(beside) or os.fspath(path).startswith(("./", "../")) else path


def load_part(
    name: str,
    path: StrPath,
    revision: str | None,
    folder: str,
    config: PreTrainedConfig | None,
    kwargs: dict[str, Any],
    mode: str | None = None,
) -> PreTrainedModel:
    """Load the part that a composition in `folder` refers to by `path`, in the dtype in which it was saved.

    mode: how a bidirectional augmenter reads; None for the other parts, which are causal language models.

    Raises ValueError naming the argument `name` if there is no path, or nothing to load there.
    """
    if not os.fspath(path):
        expected = "passed as a loaded model, because this composition was made from one without a path"
        raise bad_value(LOAD, name, expected, "None")
    where = located(path, folder)
    if config is not None and not {"dtype", "torch_dtype", "quantization_config"} & kwargs.keys():
        if config.dtype is not None and getattr(config, "quantization_config", None) is None:
            kwargs = kwargs | {"dtype": config.dtype}
    expected = "the model that the composition refers to (or pass the loaded model)"
    with load_errors_named(LOAD, name, where, expected):
        kwargs = kwargs | {"revision": revision or "main"}
        if mode is not None:
            return load_encoder(where, LOAD, **kwargs)
        kind = AutoModelForSeq2SeqLM if config is not None and config.is_encoder_decoder else AutoModelForCausalLM
        model: PreTrainedModel = kind.from_pretrained(where, **kwargs)
    return model


def check_part(name: str, model: Any, config: PreTrainedConfig) -> None:
    """Raise ValueError unless `model` is of the family, depth and width of `config`."""
    if not isinstance(model, PreTrainedModel):
        raise bad_value(LOAD, name, "a loaded transformers model or its path", type(model).__name__)
    text = config.get_text_config(decoder=True)
    own = model.config.get_text_config(decoder=True)
    expected = (config.model_type, text.num_hidden_layers, text.hidden_size)
    got = (model.config.model_type, own.num_hidden_layers, hidden_size(model))
    if got != expected:
        raise bad_value(LOAD, name, f"a model with (family, layers, width) {expected} as saved", str(got))


def holds_shards(model: nn.Module) -> bool:
    """Return True if this process holds only a part of the weights (FSDP, tensor parallelism, DeepSpeed ZeRO-3)."""
    return any(is_shard(p) for p in model.parameters())


def check_same_part(
    name: str, model: PreTrainedModel, recorded: str, config: PreTrainedConfig, given: Iterable[str]
) -> None:
    """Raise ValueError unless a part has the weights and the config with which the composition was saved.

    recorded: the fingerprint of the weights. given: fields of the config that the caller of from_pretrained changes.
    """
    problem = weights_differ(recorded, model, partial=is_quantised(model))
    problem = problem or configs_differ(model.config, config, given)
    if problem:
        do = "Pass the right model, or accept this one with check_parts=False"
        got = f"{getattr(model, 'name_or_path', '') or type(model).__name__!r}: {problem}. {do}"
        raise bad_value(LOAD, name, "the model with which the composition was saved", got)


def adapter_in(model: nn.Module) -> str:
    """Return the name and kind of the first adapter or parametrization inside `model`, or ""."""
    peft = peft_layer_types()
    if peft:
        from peft.utils.other import AuxiliaryTrainingWrapper

        peft = (*peft, AuxiliaryTrainingWrapper)
    for name, module in model.named_modules():
        if isinstance(module, (DualLoRALinear, *peft)):
            return f"{name}, a {type(module).__name__}"
        if "parametrizations" in module._modules:
            return f"{name}, which is parametrized"
    return ""


def _snapshot(path: str, revision: str | None) -> str | None:
    """Return the local folder of a reference, or None for a hub name that is not in the default cache."""
    if not path or os.path.isdir(path):
        return path or None
    try:
        file = cached_file(path, CONFIG_NAME, revision=revision, local_files_only=True)
    except OSError:  # the weights are not at hand, so they are not compared here; loading compares them
        return None
    return None if file is None else os.path.dirname(file)


def _names_by_file(folder: str) -> dict[str, list[str]]:
    index = os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)
    files: dict[str, list[str]] = {}
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as content:
            for name, file in json.load(content)["weight_map"].items():
                files.setdefault(os.path.join(folder, file), []).append(name)
    elif os.path.isfile(whole := os.path.join(folder, SAFE_WEIGHTS_NAME)):
        with safe_open(whole, framework="pt") as opened:
            files[whole] = list(opened.keys())
    return files


def differs_from_files(model: nn.Module, folder: str) -> str:
    """Say which weight of `model` differs from the safetensors files in `folder`, or return "".

    Looks at a few values of every parameter that the files hold under the model's own name for it, or under the name in
    a model whose encoder or base model it is; what transformers renames while loading is not compared.
    """
    weights = {bare_name(n): p for n, p in model.named_parameters() if is_comparable(p)}
    samples = sample_weights(weights)
    outer = [f"{getattr(model, 'base_model_prefix', '')}.", "encoder."]
    for file, names in _names_by_file(folder).items():
        if not os.path.isfile(file):
            continue
        with safe_open(file, framework="pt") as opened:
            for stored in names:
                name = next((own for own in _own_names(stored, outer) if own in samples), None)
                part = None if name is None else opened.get_slice(stored)
                if name is None or part is None or part.get_dtype() not in _FLOATS:
                    continue
                shape = tuple(part.get_shape())
                if shape != tuple(weights[name].shape):
                    return f"{name} has shape {tuple(weights[name].shape)}, and {shape} in {folder}"
                saved = _sampled_slice(part, shape)
                rounded = torch.float16 in (weights[name].dtype, _FLOATS[part.get_dtype()])
                if not same_values(samples[name], saved, rounded):
                    return f"{name} has other values than in {folder}"
    return ""


def _own_names(stored: str, outer: list[str]) -> list[str]:
    """Return the names that a parameter stored as `stored` may have in a model inside `outer` ones, its own first."""
    base, encoder = outer
    inside = stored.removeprefix(base)
    return [stored, inside, inside.removeprefix(encoder)]


def _sampled_slice(part: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the sampled values of a slice of a safetensors file, bfloat16, reading only their neighbourhood."""
    numel = 1
    for size in shape:
        numel *= size
    values = []
    for position in sampled_positions(numel):
        index = []
        for size in reversed(shape):
            position, rest = divmod(position, size)
            index.append(slice(rest, rest + 1))
        values.append(part[tuple(reversed(index))].reshape(1))
    return torch.cat(values).to(torch.bfloat16)


def check_reference(name: str, model: PreTrainedModel, path: str, revision: str | None, recorded: str) -> None:
    """Raise ValueError if the model that `path` leads back to is another one than `model`.

    recorded: the fingerprint of the part when it became one. A part without a path may hold adapters: it is passed when
    the composition is loaded, and compared then.
    """
    do = (
        f"Save the {name.removesuffix('s')} with its own save_pretrained() (merge adapters first) and compose it from "
        "there; or write the composition all the same with check_parts=False and pass this very model when loading"
    )
    expected = f"as it can be loaded from {path!r}" if path else "as it was when it was composed"
    whole = not holds_shards(model)
    quantised = quantised_weight(model)
    problem = weights_differ(recorded, model) if whole else ""
    if problem and quantised:
        problem = f"one that was quantised after it was composed ({quantised})"
    if path and (adapter := adapter_in(model)):
        problem = f"one with an adapter ({adapter})"
    quantizer = getattr(model, "hf_quantizer", None)
    if path and not problem and quantizer is not None and not getattr(quantizer, "pre_quantized", False):
        problem = "one that was quantised while it was loaded"
    if path and not problem and quantizer is None and quantised:
        problem = f"one that was quantised after it was loaded ({quantised})"
    folder = _snapshot(path, revision)
    if not problem and folder is not None and quantizer is None and whole:
        problem = differs_from_files(model, folder)
    if not problem and folder is not None and os.path.isfile(os.path.join(folder, CONFIG_NAME)):
        problem = configs_differ(model.config, type(model.config).from_pretrained(folder))
    if problem:
        raise bad_value(SAVE, name, expected, f"{problem}. {do}")
