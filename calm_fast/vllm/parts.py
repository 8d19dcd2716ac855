"""What vLLM gets from a saved composition: the configs of its parts, their files, and which compositions it can serve.

Nothing here imports vLLM.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from calm_fast.core.checks import bad_value
from calm_fast.core.fingerprint import weights_differ
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.references import located

WHERE = "vLLM"
# Families whose layers vLLM calls as layer(positions, hidden, residual) and that return (hidden, residual), where the
# state after the layer is hidden + residual. The tests run all of them.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LAYERS = "model.layers"
_LAYER = f"{LAYERS}."
_HEAD = "lm_head."


@dataclass(frozen=True)
class Part:
    """A part as vLLM builds it.

    name: of the module in vLLM, and of the weights: "anchor", "augmenters_0", ... vLLM reads the layer's index off the
        only part of a name that is a number.
    config: what vLLM's class of the family is built from. An augmenter ends with its last connected layer.
    source: a folder, or a name on the hub. revision: of the latter.
    fingerprint: of the weights with which the composition was saved.
    """

    name: str
    config: PreTrainedConfig
    source: str
    revision: str | None
    fingerprint: str

    def wants(self, weight: str) -> bool:
        """Return True if `weight`, a name in the files of the part, has a place in it."""
        if self.name != "anchor" and weight.startswith(_HEAD):
            return False
        if not weight.startswith(_LAYER):
            return True
        return int(weight.removeprefix(_LAYER).split(".")[0]) < int(self.config.num_hidden_layers)


def _check_family(argument: str, config: PreTrainedConfig, layers: str | None, positions: int) -> None:
    """Raise ValueError unless vLLM's class of this family computes what the part does, for `positions` tokens."""
    if config.model_type not in FAMILIES:
        raise bad_value(WHERE, argument, f"of a family that was tried ({', '.join(FAMILIES)})", config.model_type)
    if layers not in (None, LAYERS):
        raise bad_value(WHERE, argument, f"one whose layers are {LAYERS}", str(layers))
    if getattr(config, "quantization_config", None) is not None:
        raise bad_value(WHERE, argument, "one whose files are not quantised", "a config with a quantization_config")
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None) is not None and kinds is None
    if sliding or any(kind != "full_attention" for kind in kinds or []):
        got = "a config with sliding windows, which vLLM would take from the anchor for every layer"
        raise bad_value(WHERE, argument, "one with full attention in every layer", got)
    if config.max_position_embeddings < positions:
        expected = f"one with positions for the {positions} tokens of max_model_len"
        got = f"{config.max_position_embeddings}. Pass max_model_len={config.max_position_embeddings}"
        raise bad_value(WHERE, argument, expected, got)


def check_composition(config: ComposedConfig, positions: int) -> None:
    """Raise ValueError naming the reason if vLLM cannot serve the composition, in texts of up to `positions` tokens."""
    for name, modes in (("alignment", config.alignment), ("bidirectional", config.bidirectional)):
        if any(mode is not None for mode in modes):
            expected = "augmenters that read the anchor's tokens causally"
            raise bad_value(WHERE, name, expected, f"{modes}. Serve this composition with calm-fast serve")
    anchor = config.anchor_config
    if anchor is None:
        raise bad_value(WHERE, "anchor_config", "the config of the anchor", "None")
    _check_family("anchor", anchor, config.anchor_layers, positions)
    for own, layers in zip(config.augmenter_configs, config.augmenter_layers, strict=True):
        _check_family("augmenters", own, layers, positions)
        if own.vocab_size < anchor.vocab_size:
            expected = f"models with embeddings for the anchor's {anchor.vocab_size} tokens"
            raise bad_value(WHERE, "augmenters", expected, f"one with {own.vocab_size}")
    if any(-1 in pair for pairs in config.connections for pair in pairs):
        raise bad_value(WHERE, "connections", "pairs of layers", "a pair with -1, the embedding output")
    if not all([config.anchor_path, *config.augmenter_paths]):
        expected = "parts with a path, from which vLLM reads their weights"
        raise bad_value(
            WHERE, "anchor_path, augmenter_paths", expected, "a part without one: compose from saved models"
        )


def _truncated(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return the config of an augmenter with its first `layers` layers.

    Tying the head to the embedding spares vLLM's class of the family the memory of a head that nothing calls.
    """
    own = copy.deepcopy(config)
    own.num_hidden_layers = layers
    if getattr(own, "layer_types", None) is not None:
        own.layer_types = own.layer_types[:layers]
    own.tie_word_embeddings = True
    return own


def parts_of(config: ComposedConfig, folder: str) -> list[Part]:
    """Return the anchor and the augmenters of the composition in `folder`, which `check_composition` has passed."""
    anchor = copy.deepcopy(config.anchor_config)
    assert anchor is not None  # check_composition
    source = os.fspath(located(config.anchor_path, folder))
    parts = [Part("anchor", anchor, source, config.anchor_revision, config.anchor_fingerprint)]
    for index, pairs in enumerate(config.connections):
        own = _truncated(config.augmenter_configs[index], 1 + max(a for a, _ in pairs))
        source = os.fspath(located(config.augmenter_paths[index], folder))
        revision, fingerprint = config.augmenter_revisions[index], config.augmenter_fingerprints[index]
        parts.append(Part(f"augmenters_{index}", own, source, revision, fingerprint))
    return parts


class _Stored(nn.Module):
    """The tensors in a model's safetensors files as parameters; memory-mapped, so only what is looked at is read."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.stored: dict[str, torch.Tensor] = {}
        for file in sorted(Path(folder).glob("model*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    self.stored[name] = opened.get_tensor(name)
        if f"{_HEAD}weight" not in self.stored and "model.embed_tokens.weight" in self.stored:  # tied
            self.stored[f"{_HEAD}weight"] = self.stored["model.embed_tokens.weight"]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yield (name, tensor)."""
        yield from self.stored.items()


def check_files(part: Part) -> None:
    """Raise ValueError if the files of the part hold other weights than those with which the composition was saved.

    A part that is not in a local folder is told by its revision alone.
    """
    if not os.path.isdir(part.source):
        return
    problem = weights_differ(part.fingerprint, _Stored(part.source))
    if problem:
        expected = "the models with which the composition was saved"
        argument = "anchor" if part.name == "anchor" else "augmenters"
        raise bad_value(WHERE, argument, expected, f"{part.source!r}: {problem}")


def wanted_weights(
    parts: Iterable[Part], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield those of `weights` ("anchor.model...", "augmenters_0.model...", "connections.0...") that have a place."""
    by_name = {part.name: part for part in parts}
    for name, tensor in weights:
        first, _, rest = name.partition(".")
        if first not in by_name or by_name[first].wants(rest):
            yield name, tensor
