"""Saving and loading of a composition: its own tensors, and references to the models that it composes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from calm_fast.core.checks import bad_value
from calm_fast.hf.config import FORMAT_VERSION, ComposedConfig
from calm_fast.hf.layers import hidden_size

PREFIX = "connections."
VERSION_KEY = "calm_fast_format"
_LOAD = "from_pretrained"
StrPath = str | os.PathLike[str]
# arguments that locate the composition itself; they do not apply to the parts
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
# arguments that transformers' Auto classes pass along and that mean nothing here
IGNORED = ("adapter_kwargs", "_from_auto", "_commit_hash", "state_dict")


def reference(model: PreTrainedModel) -> str:
    """Return the path or hub name that `model` was loaded from: a folder as an absolute path, "" if there is none."""
    path: str = getattr(model, "name_or_path", "") or ""
    return os.path.abspath(path) if os.path.isdir(path) else path


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


def _read_config(folder: str, hub: dict[str, Any]) -> ComposedConfig:
    file = os.path.join(folder, hub.get("subfolder") or "", CONFIG_NAME)
    if os.path.isdir(folder) and not os.path.isfile(file):  # transformers would silently take a config's defaults
        raise OSError(f"a folder without {CONFIG_NAME}")
    return ComposedConfig.from_pretrained(folder, **hub)


def _load_part(name: str, path: str, revision: str | None, folder: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    if not path:
        expected = "passed as a loaded model, because this composition was made from one without a path"
        raise bad_value(_LOAD, name, expected, "None")
    beside = os.path.join(folder, path)  # a relative path is looked up beside the composition first
    where = beside if os.path.isdir(beside) else path
    expected = "the model that the composition refers to (or pass the loaded model)"
    with load_errors_named(_LOAD, name, where, expected):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(where, revision=revision or "main", **kwargs)
    return model


def _check_part(name: str, model: Any, config: PreTrainedConfig) -> None:
    if not isinstance(model, PreTrainedModel):
        raise bad_value(_LOAD, name, "a loaded transformers model", type(model).__name__)
    text = config.get_text_config(decoder=True)
    own = model.config.get_text_config(decoder=True)
    expected = (config.model_type, text.num_hidden_layers, text.hidden_size)
    got = (model.config.model_type, own.num_hidden_layers, hidden_size(model))
    if got != expected:
        raise bad_value(_LOAD, name, f"a model with (family, layers, width) {expected} as saved", str(got))


class CompositionFiles(PreTrainedModel):
    """The methods save_pretrained and from_pretrained of ComposedForCausalLM."""

    config_class = ComposedConfig
    config: ComposedConfig
    connections: nn.ModuleList

    def save_pretrained(  # type: ignore[override]  # transformers' sharding options come in **kwargs
        self,
        save_directory: StrPath,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json, generation_config.json and model.safetensors (the composition tensors only).

        state_dict: the full or the composition's state dict, if the caller has gathered it. Further arguments of
        transformers' save_pretrained have no meaning here and are ignored. Raises ValueError for push_to_hub.
        """
        if push_to_hub:
            raise bad_value("save_pretrained", "push_to_hub", "False", "True. Save to a folder and upload that")
        if not is_main_process:
            return
        os.makedirs(save_directory, exist_ok=True)
        state_dict = self.state_dict() if state_dict is None else state_dict
        # a clone each: safetensors refuses tensors that share memory
        own = {name: t.detach().cpu().contiguous().clone() for name, t in state_dict.items() if name.startswith(PREFIX)}
        metadata = {"format": "pt", VERSION_KEY: str(FORMAT_VERSION)}
        save_file(own, os.path.join(save_directory, SAFE_WEIGHTS_NAME), metadata=metadata)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the parts are arguments, and further positional ones are refused
        cls,
        pretrained_model_name_or_path: StrPath,
        *,
        anchor: PreTrainedModel | None = None,
        augmenters: PreTrainedModel | list[PreTrainedModel] | None = None,
        config: ComposedConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a composition and, unless they are passed, the models that it refers to.

        Remaining arguments (dtype, device_map, ...) go to from_pretrained of the parts. The composition tensors keep
        the dtype in which they were saved. Returns the model in eval mode. Raises ValueError for a format version that
        this release cannot read, a part that differs from the one composed, or a missing folder or reference.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in IGNORED}
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = os.fspath(pretrained_model_name_or_path)
        argument = "pretrained_model_name_or_path"
        with load_errors_named(_LOAD, argument, pretrained_model_name_or_path, "a composition (folder, hub name)"):
            if config is None:
                config = _read_config(folder, hub)
            weights = cached_file(folder, SAFE_WEIGHTS_NAME, **hub)
        assert weights is not None  # cached_file raises OSError for a missing file
        if config.anchor_config is None:
            raise bad_value(_LOAD, "config", "the config of a composition, with an `anchor_config`", "none")
        if anchor is None:
            anchor = _load_part("anchor", config.anchor_path, config.anchor_revision, folder, kwargs)
        if augmenters is None:
            references = zip(config.augmenter_paths, config.augmenter_revisions, strict=True)
            augmenters = [_load_part("augmenters", path, rev, folder, kwargs) for path, rev in references]
        augmenters = list(augmenters) if isinstance(augmenters, (list, tuple)) else [augmenters]
        _check_part("anchor", anchor, config.anchor_config)
        if len(augmenters) != len(config.augmenter_configs):
            raise bad_value(_LOAD, "augmenters", f"{len(config.augmenter_configs)} models", str(len(augmenters)))
        for model, sub in zip(augmenters, config.augmenter_configs, strict=True):
            _check_part("augmenters", model, sub)

        config.anchor_config, config.augmenter_configs = anchor.config, [model.config for model in augmenters]
        composed = cls(config, anchor, augmenters)
        composed.load_composition(weights)
        composed.config.name_or_path = composed.name_or_path = folder
        return composed.eval()

    def load_composition(self, file: str) -> None:
        """Load the composition tensors of a safetensors file.

        Raises ValueError if the file has a format that this release cannot read.
        """
        with safe_open(file, framework="pt") as opened:
            version = (opened.metadata() or {}).get(VERSION_KEY, "none")
            if version not in {str(v) for v in range(1, FORMAT_VERSION + 1)}:
                expected = f"composition tensors of format 1 to {FORMAT_VERSION}, which this release reads"
                raise bad_value(_LOAD, "pretrained_model_name_or_path", expected, f"format {version} in {file}")
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}
        self.connections.load_state_dict(tensors)
