"""Saving and loading a composition: its own tensors, and references to the models it composes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

from calm_fast.hf.config import FORMAT_VERSION, ComposedConfig
from calm_fast.hf.layers import hidden_size

PREFIX = "connections."
VERSION_KEY = "calm_fast_format"
# arguments that say where the composition itself is, not how to load its parts
HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)
IGNORED = ("adapter_kwargs", "_from_auto", "_commit_hash", "state_dict")


def reference(model: PreTrainedModel) -> str:
    """Where a model was loaded from; a local folder as an absolute path, "" for a model built in memory."""
    path = getattr(model, "name_or_path", "") or ""
    return os.path.abspath(path) if os.path.isdir(path) else path


def _is_path(where: str | os.PathLike) -> bool:
    """Whether this can only be a folder: a name on the hub is NAME or OWNER/NAME."""
    text = os.fspath(where)
    path = not isinstance(where, str) or os.path.isabs(text) or text.count("/") > 1
    return path or text[:1] in ("", ".", "~") or text.endswith("/")


@contextlib.contextmanager
def named(name: str, where: str | os.PathLike, expected: str) -> Iterator[None]:
    """Around what loads `where`: a folder that is not there, or cannot be read, is a ValueError about `name`."""
    text = os.fspath(where)
    missing = not os.path.exists(text)
    start = f"{name}: expected {expected}, got {text!r}"
    absent = "a folder that does not exist" + ("" if os.path.isabs(text) else f" in {os.getcwd()}")
    if missing and _is_path(where):
        raise ValueError(f"{start}, {absent}")
    try:
        yield
    except OSError as problem:
        why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        if missing:
            why = f"{absent}; as the name of a model on the hub it could not be loaded either ({why})"
        raise ValueError(f"{start}, {why}") from problem


def _read_config(folder: str, hub: dict[str, Any]) -> ComposedConfig:
    file = os.path.join(folder, hub.get("subfolder") or "", CONFIG_NAME)
    if os.path.isdir(folder) and not os.path.isfile(file):  # transformers would go on with a config's defaults
        raise OSError(f"a folder without {CONFIG_NAME}")
    return ComposedConfig.from_pretrained(folder, **hub)


def _load_part(name: str, path: str, revision: str | None, folder: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    if not path:
        raise ValueError(f"{name}: this composition was made from a model without a path; pass the loaded model")
    beside = os.path.join(folder, path)  # a relative path means "beside the composition" before "where I stand"
    where = beside if os.path.isdir(beside) else path
    with named(name, where, "the model that the composition refers to (or pass the loaded model)"):
        return AutoModelForCausalLM.from_pretrained(where, revision=revision or "main", **kwargs)


def _check_part(name: str, model: Any, config: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name}: expected a loaded transformers model, got {type(model).__name__}")
    text = config.get_text_config(decoder=True)
    own = model.config.get_text_config(decoder=True)
    expected = (config.model_type, text.num_hidden_layers, text.hidden_size)
    got = (model.config.model_type, own.num_hidden_layers, hidden_size(model))
    if got != expected:
        raise ValueError(f"{name}: expected (family, layers, width) {expected} as saved, got {got}")


class CompositionFiles:
    """save_pretrained / from_pretrained of ComposedForCausalLM."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write config.json, generation_config.json and model.safetensors (the composition tensors only).

        ``state_dict``: the full or the composition's state dict where the caller gathered it; further
        arguments of transformers' save_pretrained have no meaning here and are not used.
        """
        if push_to_hub:
            raise ValueError("push_to_hub: not supported; save to a folder and upload that")
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
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        anchor: PreTrainedModel | None = None,
        augmenters: PreTrainedModel | list[PreTrainedModel] | None = None,
        config: ComposedConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a composition and, unless they are passed, the models it refers to.

        Remaining arguments (dtype, device_map, ...) go to the parts' own from_pretrained; the composition
        tensors keep the dtype they were saved in. Raises ValueError for a format version this release does
        not know, a part that is not the one composed, or a folder or reference that is missing.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in IGNORED}
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = os.fspath(pretrained_model_name_or_path)
        with named("pretrained_model_name_or_path", pretrained_model_name_or_path, "a composition (folder, hub name)"):
            if config is None:
                config = _read_config(folder, hub)
            weights = cached_file(folder, SAFE_WEIGHTS_NAME, **hub)
        if anchor is None:
            anchor = _load_part("anchor", config.anchor_path, config.anchor_revision, folder, kwargs)
        if augmenters is None:
            references = zip(config.augmenter_paths, config.augmenter_revisions, strict=True)
            augmenters = [_load_part("augmenters", path, rev, folder, kwargs) for path, rev in references]
        augmenters = list(augmenters) if isinstance(augmenters, (list, tuple)) else [augmenters]
        _check_part("anchor", anchor, config.anchor_config)
        if len(augmenters) != len(config.augmenter_configs):
            raise ValueError(f"augmenters: expected {len(config.augmenter_configs)} models, got {len(augmenters)}")
        for model, sub in zip(augmenters, config.augmenter_configs, strict=True):
            _check_part("augmenters", model, sub)

        config.anchor_config, config.augmenter_configs = anchor.config, [model.config for model in augmenters]
        composed = cls(config, anchor, augmenters)
        composed.load_composition(weights)
        composed.config.name_or_path = composed.name_or_path = folder
        return composed.eval()

    def load_composition(self, file: str) -> None:
        """Load the composition tensors of a safetensors file; ValueError if its format is not known."""
        with safe_open(file, framework="pt") as opened:
            version = (opened.metadata() or {}).get(VERSION_KEY, "none")
            if version not in {str(v) for v in range(1, FORMAT_VERSION + 1)}:
                raise ValueError(
                    f"{file}: this release of calm_fast reads tensors of format 1 to {FORMAT_VERSION}, got {version}"
                )
            tensors = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}
        self.connections.load_state_dict(tensors)
