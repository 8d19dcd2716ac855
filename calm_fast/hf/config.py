"""ComposedConfig: everything that a saved composition holds besides its tensors."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from calm_fast.core.checks import bad_value
from calm_fast.hf.cache_names import NAMES

FORMAT_VERSION = 1


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
    format_version: format of the saved files.

    Raises ValueError for a format version that this release cannot read.
    """

    model_type = "calm_fast_composed"
    sub_configs = {"anchor_config": AutoConfig}
    has_no_defaults_at_init = True
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
        format_version: int = FORMAT_VERSION,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            expected = f"a format that this release of calm_fast reads, 1 to {FORMAT_VERSION}"
            got = f"{format_version!r}. A newer release wrote this composition: upgrade calm_fast"
            raise bad_value("ComposedConfig", "format_version", expected, got)
        # comes first: it resets the attention implementation of sub-configs, which may belong to live models
        super().__init__(**kwargs)
        count = len(augmenter_configs or [])
        self.anchor_config = None if anchor_config is None else _as_config(anchor_config)
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
        self.format_version = format_version
        self.use_cache = use_cache

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """Return the anchor's text config: GenerationMixin and Trainer read a composed model's settings from it."""
        anchor = getattr(self, "anchor_config", None)
        return self if anchor is None else anchor.get_text_config(decoder=True)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["augmenter_configs"] = [config.to_dict() for config in self.augmenter_configs]
        output["connections"] = [[list(pair) for pair in pairs] for pairs in self.connections]
        return output
