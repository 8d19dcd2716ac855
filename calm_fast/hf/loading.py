"""What from_pretrained of a composition reads besides its tensors: configs, and the parts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from calm_fast.core.checks import bad_value
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.encoders import encoder_of
from calm_fast.hf.part_configs import from_json
from calm_fast.hf.references import LOAD, check_part, commit, load_part, reference

logger = logging.get_logger(__name__)
# the tensors mean something else under other values of these fields
_OF_TENSORS = "connections cross_attention anchor_layers augmenter_layers bidirectional".split()


def read_config(kind: type[ComposedConfig], folder: str, hub: dict[str, Any]) -> ComposedConfig:
    """Return the config of a composition, of the class `kind`. Raises OSError if there is none."""
    file = os.path.join(folder, hub.get("subfolder") or "", CONFIG_NAME)
    if os.path.isdir(folder) and not os.path.isfile(file):  # transformers would silently take a config's defaults
        raise OSError(f"a folder without {CONFIG_NAME}")
    return kind.from_pretrained(folder, **hub)


def config_of_tensors(
    config: ComposedConfig, metadata: dict[str, str], file: str, given: bool
) -> ComposedConfig | None:
    """Return the config that a file of tensors carries if `config` belongs to an earlier or another save, else None.

    given: the caller passed `config`, so one with other connections than the tensors is refused.
    """
    one_save = not config.tensors_checksum or config.tensors_checksum == metadata.get("checksum", "")
    if "config" not in metadata:
        if one_save:
            return None
        expected = "a folder whose config.json was written together with its tensors"
        got = f"{file}, whose tensors are of another save. Save the composition again"
        raise bad_value(LOAD, "pretrained_model_name_or_path", expected, got)
    found = from_json(type(config), metadata["config"])
    other = [name for name in _OF_TENSORS if getattr(config, name) != getattr(found, name)]
    if one_save and not other:
        return None
    if given and one_save:
        got = f"one with other {', '.join(other)}. Compose the models anew instead"
        raise bad_value(LOAD, "config", f"the config that was saved with the tensors in {file}", got)
    logger.warning(f"{file}: config.json beside it is of another save; the config was read from the tensors' file.")
    return found


def saved_generation_config(folder: str, hub: dict[str, Any], metadata: dict[str, str]) -> GenerationConfig | None:
    """Return the generation config that was saved with the composition, or None."""
    if "generation_config" in metadata:
        own: GenerationConfig = GenerationConfig.from_dict(json.loads(metadata["generation_config"]))
        return own
    inside = os.path.join(folder, hub.get("subfolder") or "", GENERATION_CONFIG_NAME)
    if os.path.isdir(folder) and not os.path.isfile(inside):
        return None
    try:
        saved: GenerationConfig = GenerationConfig.from_pretrained(folder, **hub)
    except OSError:  # a repository on the hub without this file, which is optional
        return None
    return saved


def check_device_map(where: str, argument: str, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError if a device_map in `kwargs` names the parts of a composition: each part gets the whole map."""
    given = kwargs.get("device_map")
    names = [str(name) for name in given] if isinstance(given, Mapping) else []
    if found := next((name for name in names if name.split(".")[0] in ("anchor", "augmenters", "connections")), None):
        got = f"one with {found!r}. Load each part with a map of its own, and pass the loaded models"
        raise bad_value(where, argument, "a map of the modules of a part, because every part gets it", got)


def load_parts(
    config: ComposedConfig, anchor: Any, augmenters: Any, folder: str, kwargs: dict[str, Any]
) -> tuple[list[PreTrainedModel], list[bool]]:
    """Return the anchor and the augmenters, and which of them were loaded; write their references into `config`."""
    check_device_map(LOAD, "device_map", kwargs)
    count = len(config.augmenter_configs)
    if augmenters is None:
        augmenters = [None] * count
    augmenters = list(augmenters) if isinstance(augmenters, (list, tuple)) else [augmenters]
    if len(augmenters) != count:
        raise bad_value(LOAD, "augmenters", f"{count} models", str(len(augmenters)))
    given = [anchor, *augmenters]
    paths = [config.anchor_path, *config.augmenter_paths]
    revisions = [config.anchor_revision, *config.augmenter_revisions]
    subs = [config.anchor_config, *config.augmenter_configs]
    modes = [None, *config.bidirectional]
    models, from_path = [], []
    for index, part in enumerate(given):
        name = "anchor" if index == 0 else "augmenters"
        sub = subs[index]
        assert sub is not None  # the caller has checked it
        from_path.append(part is None or isinstance(part, (str, os.PathLike)))
        if part is None:
            part = load_part(name, paths[index], revisions[index], folder, sub, kwargs, modes[index])
        elif from_path[-1]:
            revisions[index] = None
            where = os.path.abspath(part) if os.path.isdir(part) else part
            part = load_part(name, where, None, folder, sub, kwargs, modes[index])
        elif modes[index] is not None and isinstance(part, PreTrainedModel):
            part = encoder_of(part, LOAD)
        check_part(name, part, sub)
        if reference(part):
            paths[index] = reference(part)
            hub = {"cache_dir": kwargs.get("cache_dir"), "revision": revisions[index]}
            revisions[index] = commit(part, hub if from_path[-1] else {})
        models.append(part)
    config.anchor_path, *config.augmenter_paths = paths
    config.anchor_revision, *config.augmenter_revisions = revisions
    return models, from_path


def keep_token_ids(own: PreTrainedConfig, saved: PreTrainedConfig, given: Iterable[str]) -> None:
    """Set the special token ids of a loaded anchor to those of its config in the composition.

    `model.config.pad_token_id = ...` of a composition sets the anchor's. given: fields that the caller asked for.
    """
    text, kept = own, saved
    if not own.is_encoder_decoder:  # whose config of the decoder is made anew at every call
        text, kept = own.get_text_config(decoder=True), saved.get_text_config(decoder=True)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if name not in given and hasattr(kept, name):
            setattr(text, name, getattr(kept, name))
