"""ComposedConfig: everything that a saved composition holds besides its tensors."""

from __future__ import annotations

import copy
import inspect
from types import MappingProxyType
from typing import Any, cast

from transformers import AutoConfig, PreTrainedConfig

from calm_fast.core.checks import bad_value
from calm_fast.hf.cache_names import NAMES
from calm_fast.hf.callers import check_reference_has_folder

# 3: an augmenter is bidirectional; 2: one reads its own tokens, through an aligner; 1: all read the anchor's ids
FORMAT_VERSION = 3
# settings that from_pretrained may override; the other fields belong to the saved tensors
OVERRIDES = {"use_cache", "anchor_path", "anchor_revision", "augmenter_paths", "augmenter_revisions"}
# fields that have a meaning of their own in any config, so they are never read from the anchor's
_NOT_SHARED = {"quantization_config", "auto_map", "architectures", "text_config", "encoder", "decoder", "generator"}
# Configs of BART, Blenderbot and Whisper declare these. In any other config generate() takes them for settings in the
# wrong place; the composition's generation_config has the anchor's.
_NOT_SHARED |= {"forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"}
_NOT_SHARED |= {"encoder_no_repeat_ngram_size"}
# fields of every config that take effect in the anchor's forward
_OUTPUTS = {"output_hidden_states", "output_attentions"}


def format_of(alignment: list[Any] | None, bidirectional: list[Any] | None) -> int:
    """Return the lowest format that says how augmenters read."""
    if any(mode is not None for mode in bidirectional or []):
        return 3
    return 2 if any(settings is not None for settings in alignment or []) else 1


def _as_config(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    if not isinstance(config, dict):
        return config
    fields = {name: value for name, value in config.items() if name != "model_type"}
    own: PreTrainedConfig = AutoConfig.for_model(config["model_type"], **fields)
    return own


class ComposedConfig(PreTrainedConfig):
    """Configuration of a composed model.

    anchor_config, augmenter_configs: the configs of the parts.
    anchor_path, anchor_revision, augmenter_paths, augmenter_revisions: where the weights of the parts are.
    anchor_layers, augmenter_layers: dotted paths of their decoder layers.
    connections: per augmenter a list of (augmenter layer, anchor layer); -1 is the embedding output.
    cross_attention: the keyword arguments of every ``CrossAttention``.
    composition_dtype: name of the dtype of the composition tensors.
    anchor_fingerprint, augmenter_fingerprints: a few weights of each part, compared when the composition is loaded.
    tensors_checksum: of the tensors that were saved with this config; "" in memory.
    alignment: per augmenter the settings of its StreamAligner, None if it reads the anchor's token ids.
    bidirectional: per augmenter "prompt" or "reencode" if it reads its text in full, None if it reads causally.
    tokenizer_fingerprints: of the anchor's tokenizer and those of the augmenters, "" for one without an aligner; empty
        if there is no aligner.
    format_version: format of the saved files. Default, the lowest that says all of this.

    Fields that only a language model has (vocab_size, hidden_size, pad_token_id, tie_word_embeddings, ...) are read
    from the anchor's text config, and setting one sets it there. They are saved once, with the anchor's config.

    Raises ValueError for a format version that this release cannot read.
    """

    model_type = "calm_fast_composed"
    sub_configs = {"anchor_config": AutoConfig}
    has_no_defaults_at_init = True
    # a folder holds no code; TRL reads the attribute of every model type that is not transformers' own
    auto_map = cast(dict[str, str], MappingProxyType({}))
    keys_to_ignore_at_inference = list(NAMES)  # Trainer would gather the cache as a prediction

    def __init__(
        self,
        anchor_config: PreTrainedConfig | dict[str, Any] | None = None,
        augmenter_configs: list[PreTrainedConfig | dict[str, Any]] | None = None,
        *,
        anchor_path: str = "",
        anchor_revision: str | None = None,
        anchor_layers: str | None = None,
        augmenter_paths: list[str] | None = None,
        augmenter_revisions: list[str | None] | None = None,
        augmenter_layers: list[str | None] | None = None,
        connections: list[list[tuple[int, int]]] | None = None,
        cross_attention: dict[str, Any] | None = None,
        composition_dtype: str = "float32",
        anchor_fingerprint: str = "",
        augmenter_fingerprints: list[str] | None = None,
        tensors_checksum: str = "",
        alignment: list[dict[str, Any] | None] | None = None,
        bidirectional: list[str | None] | None = None,
        tokenizer_fingerprints: list[str] | None = None,
        format_version: int | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if format_version is None:
            format_version = format_of(alignment, bidirectional)
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            expected = f"a format that this release of calm_fast reads, 1 to {FORMAT_VERSION}"
            got = f"{format_version!r}. A newer release wrote this composition: upgrade calm_fast"
            raise bad_value("ComposedConfig", "format_version", expected, got)
        # comes first: it resets the attention implementation of sub-configs, which may belong to live models
        anchor_config = None if anchor_config is None else _as_config(anchor_config)
        text = None if anchor_config is None else self._shared_config(anchor_config)
        shared = {name: kwargs.pop(name) for name in list(kwargs) if text is not None and self._is_shared(name, text)}
        super().__init__(**kwargs)
        count = len(augmenter_configs or [])
        self.anchor_config = anchor_config
        self.augmenter_configs = [_as_config(config) for config in augmenter_configs or []]
        self.anchor_path = anchor_path
        self.anchor_revision = anchor_revision
        self.anchor_layers = anchor_layers
        self.augmenter_paths = list(augmenter_paths or [""] * count)
        self.augmenter_revisions = list(augmenter_revisions or [None] * count)
        self.augmenter_layers = list(augmenter_layers or [None] * count)
        self.connections = [[tuple(pair) for pair in pairs] for pairs in connections or []]
        self.cross_attention = dict(cross_attention or {})
        self.composition_dtype = composition_dtype
        self.anchor_fingerprint = anchor_fingerprint
        self.augmenter_fingerprints = list(augmenter_fingerprints or [""] * count)
        self.tensors_checksum = tensors_checksum
        self.alignment = list(alignment or [None] * count)
        self.bidirectional = list(bidirectional or [None] * count)
        self.tokenizer_fingerprints = list(tokenizer_fingerprints or [])
        self.format_version = format_version
        self.use_cache = use_cache
        for name, value in shared.items():
            setattr(text, name, value)

    @property
    def _name_or_path(self) -> str:
        """The folder or name that the composition was loaded from; "" if there is none.

        Raises ValueError if a trainer of TRL wants to load its reference model from there and there is none.
        """
        name: str = self.__dict__.get("_name_or_path", "")
        if not name:
            check_reference_has_folder()
        return name

    @_name_or_path.setter
    def _name_or_path(self, name: str) -> None:
        self.__dict__["_name_or_path"] = name

    @classmethod
    def _is_shared(cls, name: str, text: PreTrainedConfig) -> bool:
        """Return True if `name` is a field of a language model, which the anchor's text config holds."""
        own = name.startswith("_") or name in _NOT_SHARED or name in _FIELDS or hasattr(cls, name)
        try:
            return not own and hasattr(text, name)
        except RuntimeError:  # a field with a value per layer (head_dim of Gemma 4) has no value of its own
            return True

    def _text(self) -> PreTrainedConfig | None:
        # copying and unpickling ask for attributes before there is an anchor_config
        anchor: PreTrainedConfig | None = self.__dict__.get("anchor_config")
        return None if anchor is None else self._shared_config(anchor)

    @classmethod
    def _shared_config(cls, anchor: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config in which the anchor keeps the fields of a language model."""
        return anchor.get_text_config(decoder=True)

    def __getattr__(self, name: str) -> Any:
        """Return a field that only the anchor's text config has. Called where normal look-up fails."""
        text = None if name.startswith("_") else self._text()
        if text is None or not self._is_shared(name, text):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(text, name)
        except RuntimeError as problem:  # hasattr must answer
            raise AttributeError(str(problem)) from problem

    def __setattr__(self, name: str, value: Any) -> None:
        text = self._text()
        shared = text is not None and self._is_shared(name, text)
        if shared or (text is not None and name in _OUTPUTS):
            setattr(text, name, value)
        if not shared:
            super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config as transformers does; of `kwargs` only OVERRIDES are applied, the others are left over."""
        unused = kwargs.pop("return_unused_kwargs", False)
        config, rest = cls(**config_dict).overridden(kwargs)
        return (config, rest) if unused else config

    def overridden(self, settings: dict[str, Any]) -> tuple[ComposedConfig, dict[str, Any]]:
        """Return (a copy with those of `settings` that may change, the settings that are not of this config).

        Raises ValueError for a field that belongs to the saved tensors.
        """
        config = copy.deepcopy(self)
        for name in settings:
            if name in OVERRIDES:
                setattr(config, name, settings[name])
            elif name in vars(self) and name in _FIELDS:
                expected = "as it was saved, because the composition's tensors belong to it"
                raise bad_value(
                    "from_pretrained", name, expected, f"{settings[name]!r}. Compose the models anew instead"
                )
        return config, {name: value for name, value in settings.items() if name not in OVERRIDES}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the anchor's text config: GenerationMixin and Trainer read a composed model's settings from it."""
        anchor = getattr(self, "anchor_config", None)
        return self if anchor is None else anchor.get_text_config(decoder=True)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["augmenter_configs"] = [config.to_dict() for config in self.augmenter_configs]
        output["connections"] = [[list(pair) for pair in pairs] for pairs in self.connections]
        if all(settings is None for settings in self.alignment):  # format 1, which earlier releases read
            del output["alignment"], output["tokenizer_fingerprints"]
        if all(mode is None for mode in self.bidirectional):
            del output["bidirectional"]
        return output


class ComposedSeq2SeqConfig(ComposedConfig):
    """Configuration of a composed model whose anchor is an encoder-decoder.

    The fields are those of ComposedConfig; connections name layers of the anchor's decoder. Fields that only a language
    model has are read from the anchor's whole config, and setting one sets it there.
    """

    model_type = "calm_fast_composed_seq2seq"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"is_encoder_decoder": True})

    @classmethod
    def _shared_config(cls, anchor: PreTrainedConfig) -> PreTrainedConfig:
        return anchor  # the config of its decoder is made anew at every call

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the anchor's config, or that of its decoder or encoder."""
        anchor = getattr(self, "anchor_config", None)
        return self if anchor is None else anchor.get_text_config(decoder=decoder, encoder=encoder)


_FIELDS = set(inspect.signature(ComposedConfig.__init__).parameters) - {"self", "kwargs"}
