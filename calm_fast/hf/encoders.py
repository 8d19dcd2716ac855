"""Augmenters that read a text in full, both ways: which module of a model that is, how it is loaded, what it takes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from calm_fast.core.checks import bad_value, describe
from calm_fast.hf.cache_names import generate_argument
from calm_fast.hf.inputs import Signature
from calm_fast.hf.layers import shallow_copy

MODES = ("prompt", "reencode")
HINT = 'pass bidirectional="prompt" for an augmenter that reads the prompt in full'
# arguments of from_pretrained that locate a model: its config is read with them first
_LOCATION = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token", "trust_remote_code",
)  # fmt: skip
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # names of tables of learned positions


class Encoder(NamedTuple):
    """How a bidirectional augmenter is called.

    mode: "prompt" or "reencode". use_cache: its forward takes this argument. longest: the most tokens that its learned
    positions reach, None if it has none. pad: the id that fills shorter rows. masked: its forward takes an attention
    mask. padded: it reads a padded text as it reads the text alone, so that texts of different lengths can be read
    together; None until `try_encoders` has tried it.
    """

    mode: str
    use_cache: bool
    longest: int | None
    pad: int
    masked: bool
    padded: bool | None = None

    def inputs(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of its forward. ids (S, n), padded on the right; mask (S, n), 1 = real."""
        inputs: dict[str, Any] = {"input_ids": ids} | ({"attention_mask": mask} if self.masked else {})
        return inputs | {"use_cache": False} if self.use_cache else inputs


def check_modes_given(bidirectional: Any, count: int) -> list[str | None]:
    """Return the argument `bidirectional` of compose() as a list with an entry per augmenter, after checking it."""
    expected = f'None, "prompt" or "reencode", or a list with one of them per augmenter ({count})'
    modes = list(bidirectional) if isinstance(bidirectional, (list, tuple)) else [bidirectional] * count
    if len(modes) != count or any(mode is not None and mode not in MODES for mode in modes):
        raise bad_value("compose", "bidirectional", expected, describe(bidirectional))
    return modes


def encoder_of(model: PreTrainedModel, where: str) -> PreTrainedModel:
    """Return the model inside `model` that reads token ids in full: without heads, pooling and decoder.

    It is the encoder of an encoder-decoder (T5, BART), else the base model. It shares all weights with `model`.
    Raises ValueError if there is none.
    """
    base: Any = model.base_model
    encoder = base.get_encoder() if hasattr(base, "get_encoder") else base
    # BERT's own encoder is no model: it does not embed
    found = encoder if isinstance(encoder, PreTrainedModel) else base
    name = type(model).__name__
    parameters = inspect.signature(found.forward).parameters
    whole = found is base and model.config.is_encoder_decoder and hasattr(base, "decoder")
    if whole or "input_ids" not in parameters:
        expected = "models with an encoder that reads token ids, because `bidirectional` is given"
        raise bad_value(where, "augmenters", expected, name)
    view: PreTrainedModel = shallow_copy(found)  # type: ignore[assignment]  # of the same class
    if "add_pooling_layer" in inspect.signature(type(found).__init__).parameters and hasattr(view, "pooler"):
        view.pooler = None  # type: ignore[assignment]  # as the class builds it without one
    view.name_or_path = found.name_or_path or model.name_or_path
    return view


def load_encoder(path: str | os.PathLike[str], where: str, **kwargs: Any) -> PreTrainedModel:
    """Load the encoder of the model at `path`. kwargs: of from_pretrained."""
    config = kwargs.get("config")
    if config is None:
        located = {name: kwargs[name] for name in _LOCATION if name in kwargs}
        config = AutoConfig.from_pretrained(path, **located)
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if known and _pools(MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]):
        kwargs = kwargs | {"add_pooling_layer": False}  # checkpoints without it would get random weights
    auto: Any = AutoModelForTextEncoding if known else AutoModel
    return encoder_of(auto.from_pretrained(path, **kwargs), where)


def encoder_from_config(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Return the encoder of a new model with this config, with random weights. kwargs: of from_config."""
    auto: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    return encoder_of(auto.from_config(config, **kwargs), "ComposedForCausalLM")


def _pools(model_class: Any) -> bool:
    return "add_pooling_layer" in inspect.signature(model_class.__init__).parameters


def encoder_signature(model: PreTrainedModel) -> Signature:
    """Return the Signature of a bidirectional augmenter, which has no cache."""
    home = next(((m, name) for m in model.modules() for name, _ in m.named_parameters(recurse=False)), None)
    # of its own text, whatever the anchor's positions are
    return Signature("", "", generate_argument(), True, False, home=home)


def describe_encoder(model: PreTrainedModel, called: nn.Module, mode: str) -> Encoder:
    """Return how a bidirectional augmenter is called. called: the module inside `model` that has its layers."""
    parameters: Mapping[str, Any] = inspect.signature(called.forward).parameters
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    return Encoder(mode, "use_cache" in parameters, _longest(called), pad, "attention_mask" in parameters)


def _longest(called: nn.Module) -> int | None:
    """Return the most tokens that the table of learned positions inside `called` reaches, None if there is none."""
    for name, module in called.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # RoBERTa counts from behind its padding id, BART from an offset
            unused = module.padding_idx + 1 if module.padding_idx is not None else getattr(module, "offset", 0)
            return module.num_embeddings - int(unused)
    return None
