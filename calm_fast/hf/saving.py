"""Saving and loading of a composition: its own tensors, and references to the models that it composes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from calm_fast.core.checks import bad_value
from calm_fast.core.files import atomic_path, check_folder
from calm_fast.core.fingerprint import weight_fingerprint
from calm_fast.core.wrapped_names import bare_name
from calm_fast.hf.causality import check_parts as try_parts
from calm_fast.hf.config import ComposedConfig, format_of
from calm_fast.hf.hub_upload import upload
from calm_fast.hf.loading import config_of_tensors, keep_token_ids, load_parts, read_config, saved_generation_config
from calm_fast.hf.model_card import write_card
from calm_fast.hf.own_tensors import (
    PREFIX,
    check_tensors,
    check_undamaged,
    checksum,
    expected_shapes,
    load_tensors,
    own_tensors,
    read_metadata,
    read_tensors,
    write_tensors,
)
from calm_fast.hf.references import (
    LOAD,
    SAVE,
    StrPath,
    check_reference,
    check_same_part,
    holds_shards,
    load_errors_named,
    portable,
)
from calm_fast.hf.save_arguments import check_save_arguments
from calm_fast.hf.tokenizer_files import alignment_fields, load_tokenizers, save_tokenizers

# arguments that locate the composition itself; the second group says how to reach the hub and goes to the parts as well
LOCATION = ("force_download", "revision", "subfolder")
ACCESS = ("cache_dir", "proxies", "local_files_only", "token")
# arguments that transformers' Auto classes pass along and that mean nothing here
IGNORED = ("adapter_kwargs", "_from_auto", "_commit_hash")
# arguments that the Auto classes always pass; they need no part to apply to
ALWAYS_PASSED = ("trust_remote_code", *ACCESS)
Part = PreTrainedModel | StrPath


def _json_texts(model: CompositionFiles) -> tuple[dict[str, Any], str]:
    """Return (config as a dict, generation config as text) as transformers writes and validates them."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        assert model.generation_config is not None  # a composition always has one
        model.generation_config.save_pretrained(folder)
        with open(os.path.join(folder, CONFIG_NAME), encoding="utf-8") as config:
            with open(os.path.join(folder, GENERATION_CONFIG_NAME), encoding="utf-8") as generation:
                return json.load(config), generation.read()


class CompositionFiles(PreTrainedModel):
    """The methods of a composition that write and read its files."""

    config_class = ComposedConfig
    config: ComposedConfig
    where: ClassVar[str]
    encoder_decoder: ClassVar[bool]
    anchor: PreTrainedModel
    augmenters: nn.ModuleList
    connections: nn.ModuleList
    aligners: Any  # the property of CompositionGeneration
    # the anchor's, then the augmenters': objects, TokenizerFolders, or None for not known
    tokenizers: list[Any]

    def record_parts(self) -> None:
        """Note the fingerprints of the parts, so that a change of their weights is seen when saving."""
        self.config.anchor_fingerprint = weight_fingerprint(self.anchor)
        self.config.augmenter_fingerprints = [weight_fingerprint(model) for model in self.augmenters]

    def _check_parts(self) -> None:
        """Raise ValueError if loading would give other parts than these."""
        config = self.config
        anchor = (config.anchor_path, config.anchor_revision, config.anchor_fingerprint)
        check_reference("anchor", self.anchor, *anchor)
        rows = zip(config.augmenter_paths, config.augmenter_revisions, config.augmenter_fingerprints, strict=True)
        for model, row in zip(self.augmenters, rows, strict=True):
            check_reference("augmenters", model, *row)  # type: ignore[arg-type]  # from a ModuleList

    def _texts_for(self, folder: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Return the texts of the config and the generation config that go into `folder` together with `tensors`."""
        self.config.architectures = [type(self).__name__]
        fields = alignment_fields(self.aligners, self.tokenizers)
        self.config.alignment = fields.get("alignment", [None] * len(self.aligners))
        self.config.tokenizer_fingerprints = fields.get("tokenizer_fingerprints", [])
        self.config.format_version = format_of(self.config.alignment, self.config.bidirectional)
        content, generation = _json_texts(self)
        content["anchor_path"] = portable(self.config.anchor_path, folder)
        content["augmenter_paths"] = [portable(path, folder) for path in self.config.augmenter_paths]
        content["tensors_checksum"] = checksum(tensors)
        dtypes = {tensor.dtype for tensor in tensors.values()}
        content["composition_dtype"] = str(max(dtypes, key=lambda d: d.itemsize)).removeprefix("torch.")
        parts = [
            (content["anchor_config"], self.anchor),
            *zip(content["augmenter_configs"], self.augmenters, strict=True),
        ]
        for part, model in parts:
            if "quantization_config" not in part:
                part["dtype"] = str(model.dtype).removeprefix("torch.")
        if not holds_shards(self):
            content["anchor_fingerprint"] = weight_fingerprint(self.anchor)
            content["augmenter_fingerprints"] = [weight_fingerprint(model) for model in self.augmenters]
        return {"config": json.dumps(content, indent=2, sort_keys=True) + "\n", "generation_config": generation}

    def save_pretrained(  # type: ignore[override]  # transformers' sharding options come in **kwargs
        self,
        save_directory: StrPath,
        is_main_process: bool | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        check_parts: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write config.json, generation_config.json, model.safetensors (the composition tensors only) and tokenizers.

        README.md, the model card, is written too, unless one of the user's own is there.

        The anchor's tokenizer, if it is known, goes into the folder itself, that of an augmenter which reads through an
        aligner into augmenter_0_tokenizer/ and so on.

        The files are complete or not there: a process that is killed leaves the previous composition or this one. If it
        is killed while tokenizers are replaced by others, loading says so.

        Args:
            save_directory: created if it does not exist; not the folder of a part.
            is_main_process: False writes nothing. Default, True; for sharded tensors, True in the process of rank 0.
                Sharded tensors (FSDP2) are gathered, so every process has to call this.
            state_dict: the full or the composition's state dict, if the caller has gathered it. Wrappers in its names
                (module, _orig_mod, base_model.model, ...) are dropped.
            check_parts: refuse if the references would lead to other models than the parts are now.
            kwargs: the other arguments of transformers' save_pretrained. The composition is one safetensors file.
        Raises:
            ValueError: the tensors are not exactly those of this composition (an adapter in a connection, a tensor
                missing), a part differs from the model that its reference leads to (an adapter, a resized embedding,
                trained or quantised weights), or an argument that would not be honoured.
            TypeError: an unknown argument.
        """
        if push_to_hub:
            raise bad_value(SAVE, "push_to_hub", "False", "True. Save, then call push_to_hub() of the composition")
        folder = os.fspath(check_folder(SAVE, "save_directory", save_directory))
        given = self.state_dict() if state_dict is None else state_dict
        tensors, gathered = own_tensors(given)
        if is_main_process is None:
            is_main_process = not gathered or torch.distributed.get_rank() == 0
        if not is_main_process:
            return
        for name, path in (
            ("anchor", self.config.anchor_path),
            *(("augmenters", p) for p in self.config.augmenter_paths),
        ):
            if os.path.isdir(path) and os.path.realpath(path) == os.path.realpath(folder):
                got = f"{folder}, the folder of its {name}, whose files would be overwritten"
                raise bad_value(SAVE, "save_directory", "a folder of the composition's own", got)
        check_tensors(SAVE, "state_dict" if state_dict is not None else "connections", tensors, expected_shapes(self))
        check_save_arguments(kwargs, sum(t.nbytes for t in tensors.values()))
        if check_parts:
            self._check_parts()
        # a clone each: safetensors refuses tensors that share memory
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        os.makedirs(folder, exist_ok=True)
        save_tokenizers(folder, self.tokenizers, self.aligners)
        texts = self._texts_for(folder, tensors)
        metadata = texts | {"checksum": json.loads(texts["config"])["tensors_checksum"]}
        # All are written before the first is replaced. The tensors are replaced first; they carry both configs, which
        # count until config.json with the same checksum is in place.
        with (
            atomic_path(os.path.join(folder, CONFIG_NAME)) as partial_config,
            atomic_path(os.path.join(folder, GENERATION_CONFIG_NAME)) as partial_generation,
            atomic_path(os.path.join(folder, SAFE_WEIGHTS_NAME)) as partial_tensors,
        ):
            partial_config.write_text(texts["config"], encoding="utf-8")
            partial_generation.write_text(texts["generation_config"], encoding="utf-8")
            write_tensors(partial_tensors, tensors, metadata, self.config.format_version)
        write_card(folder, json.loads(texts["config"]), sum(tensor.numel() for tensor in tensors.values()))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]  # its options come in **kwargs
        """Upload the composition to the hub, with its model card, and return the CommitInfo of huggingface_hub.

        repo_id: name of the repository, which is made if it does not exist. A model card of somebody's own that is
        there stays. kwargs: private, token, revision, create_pr, commit_message, commit_description, max_shard_size and
        tags, as of transformers' push_to_hub.
        Raises:
            ValueError: a part is not on the hub itself, because nobody else could load the composition.
            TypeError: an unknown argument.
        """
        paths = {"anchor": self.config.anchor_path}
        paths |= {f"augmenters[{i}]": path for i, path in enumerate(self.config.augmenter_paths)}
        for name, path in paths.items():
            if not path or os.path.isdir(path):
                got = f"{path!r}. Upload that model first, and compose it by its hub name"
                raise bad_value("push_to_hub", name, "a model on the hub", got)
        return upload(self.save_pretrained, repo_id, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the parts are arguments, and further positional ones are refused
        cls,
        pretrained_model_name_or_path: StrPath,
        *,
        anchor: Part | None = None,
        augmenters: Part | list[Part] | None = None,
        config: ComposedConfig | StrPath | None = None,
        state_dict: dict[str, torch.Tensor] | None = None,
        output_loading_info: bool = False,
        generation_config: GenerationConfig | None = None,
        tokenizers: Any = None,
        check_parts: bool = True,
        probe: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a composition and, unless they are passed, the models that it refers to.

        Args:
            pretrained_model_name_or_path: folder or hub name of the composition.
            anchor, augmenters: the parts as loaded models or as paths, instead of those that the composition refers to.
            config: read this one instead (a ComposedConfig, or the folder of one).
            state_dict: composition tensors to take instead of those in the file; checked as strictly.
            output_loading_info: also return a dict of missing and unexpected keys; they are empty, because a
                composition loads as a whole or not at all.
            generation_config: use this one instead of the saved one.
            tokenizers: instead of the saved ones, one for the anchor and one per augmenter: objects, folders, or None
                for the saved one.
            check_parts: compare the config and a few weights of each part, and the tokenizers of augmenters that read
                through an aligner, with those when the composition was saved. Pass False to accept others.
            probe: try each part once, as compose() does.
            kwargs: use_cache and other settings of the composition's config override it. All others (dtype, device_map,
                attn_implementation, quantization_config, trust_remote_code, ...) go to from_pretrained of the parts
                that are loaded here.
        The composition tensors keep the dtype in which they were saved, and so do the parts unless `dtype` is given,
        which casts the parts and leaves the composition tensors alone.
        Returns:
            the model in eval mode, or (model, info).
        Raises:
            ValueError: a format version that this release cannot read, a part that differs from the one composed, a
                missing folder or reference, tensors that are not exactly those of the composition, a missing or another
                tokenizer, or an argument for the parts if all parts are passed as loaded models.
        """
        kwargs = {name: value for name, value in kwargs.items() if name not in IGNORED}
        hub = {name: kwargs.pop(name) for name in (*LOCATION, *ACCESS) if name in kwargs}
        folder = os.fspath(pretrained_model_name_or_path)
        argument = "pretrained_model_name_or_path"
        with load_errors_named(LOAD, argument, pretrained_model_name_or_path, "a composition (folder, hub name)"):
            given = config is not None
            if not isinstance(config, ComposedConfig):
                config = read_config(cls.config_class, os.fspath(config or folder), {} if config else hub)
            weights = cached_file(folder, SAFE_WEIGHTS_NAME, **hub)
        assert weights is not None  # cached_file raises OSError for a missing file
        metadata = read_metadata(weights)
        embedded = config_of_tensors(config, metadata, weights, given)
        config, kwargs = (embedded or config).overridden(kwargs)
        kwargs |= {name: hub[name] for name in ACCESS if name in hub}
        if config.anchor_config is None:
            raise bad_value(LOAD, "config", "the config of a composition, with an `anchor_config`", "none")
        if config.anchor_config.is_encoder_decoder != cls.encoder_decoder:
            other = "ComposedForCausalLM" if cls.encoder_decoder else "ComposedForSeq2SeqLM"
            got = f"one whose anchor is a {config.anchor_config.model_type}. Load it with {other}.from_pretrained"
            raise bad_value(LOAD, argument, f"a composition that {cls.where} can run", got)

        remote_code = bool(kwargs.get("trust_remote_code"))
        read = load_tokenizers(config, folder, tokenizers, hub, remote_code, check=check_parts)
        base = os.path.dirname(weights)
        models, from_path = load_parts(config, anchor, augmenters, base, kwargs)
        if not any(from_path) and (left := sorted(set(kwargs) - set(ALWAYS_PASSED))):
            got = "a value, but all parts are loaded models. Set it when loading them"
            raise bad_value(LOAD, left[0], "left out, because it goes to from_pretrained of the parts", got)
        if check_parts:
            names = ["anchor", *["augmenters"] * (len(models) - 1)]
            recorded = [config.anchor_fingerprint, *config.augmenter_fingerprints]
            configs = [config.anchor_config, *config.augmenter_configs]
            for name, model, fingerprint, saved in zip(names, models, recorded, configs, strict=True):
                check_same_part(name, model, fingerprint, saved, given=kwargs)
        if from_path[0]:
            keep_token_ids(models[0].config, config.anchor_config, kwargs)
        config.anchor_config, config.augmenter_configs = models[0].config, [model.config for model in models[1:]]
        composed: Any = cls(config, models[0], models[1:])
        composed.tokenizers, composed.aligners = read
        composed.record_parts()
        composed._load_own(weights if state_dict is None else state_dict, keep_dtype=True)
        config.tensors_checksum = ""  # the tensors may change from here on
        if generation_config is None:
            generation_config = saved_generation_config(folder, hub, metadata if embedded else {})
        composed.generation_config = generation_config or composed.generation_config
        composed.config.name_or_path = composed.name_or_path = folder
        composed.eval()
        if probe:
            try_parts(composed, LOAD, defer=True)
        info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (composed, info | {"error_msgs": []}) if output_loading_info else composed

    def _load_own(self, source: str | dict[str, torch.Tensor], keep_dtype: bool) -> None:
        argument = "pretrained_model_name_or_path" if isinstance(source, str) else "state_dict"
        tensors = read_tensors(source) if isinstance(source, str) else own_tensors(source)[0]
        check_tensors(LOAD, argument, tensors, expected_shapes(self))
        if isinstance(source, str):
            check_undamaged(source, tensors)
        load_tensors(self, tensors, keep_dtype)

    def load_composition(self, file: str) -> None:
        """Load the composition tensors of a safetensors file into the parameters, which keep their dtype.

        Raises ValueError if the file has a format that this release cannot read, or not exactly the tensors of this
        composition.
        """
        read_metadata(file)
        self._load_own(file, keep_dtype=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as torch does; wrappers in its names (module, _orig_mod, ...) are dropped.

        The tensors of the connections are loaded as a whole: ValueError if some of them are missing or unknown, also
        with strict=False, which only lets a state dict leave out the parts. Trainer resumes with strict=False.
        """
        own = {bare_name(name): name for name in self.state_dict()}
        given = {own.get(bare_name(name), name): tensor for name, tensor in state_dict.items()}
        if len(given) != len(state_dict):
            raise bad_value(
                "load_state_dict", "state_dict", "one tensor per name", "names that differ only in wrappers"
            )
        mine = {name for name in own.values() if name.startswith(PREFIX)}
        theirs = {name for name in given if bare_name(name).startswith(PREFIX)}
        if given and (theirs != mine if theirs else not given.keys() & set(own.values())):
            missing, unknown = sorted(mine - theirs), sorted(set(given) - set(own.values()))
            got = f"missing {missing[:4] or 'none'}, unknown {unknown[:4] or 'none'}. Is it of another composition?"
            raise bad_value("load_state_dict", "state_dict", "the tensors of this composition's connections", got)
        return super().load_state_dict(given, strict=strict, assign=assign)
