"""compose(): build a composition from loaded models or their paths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from calm_fast.core.checks import bad_value, check_bool, describe
from calm_fast.hf.alignment import StreamAligner
from calm_fast.hf.causality import check_parts
from calm_fast.hf.composed import ComposedForCausalLM
from calm_fast.hf.composition import Composition
from calm_fast.hf.config import ComposedConfig, ComposedSeq2SeqConfig
from calm_fast.hf.connections import resolve_connections
from calm_fast.hf.encoders import HINT, check_modes_given, encoder_of, load_encoder
from calm_fast.hf.inputs import Signature
from calm_fast.hf.layers import find_layers, hidden_size
from calm_fast.hf.loading import check_device_map
from calm_fast.hf.references import StrPath, commit, load_errors_named, reference
from calm_fast.hf.saving import ACCESS, LOCATION
from calm_fast.hf.seq2seq import ComposedForSeq2SeqLM
from calm_fast.hf.vocabularies import Difference, announce, check_embedded, find_differences, known_tokenizers

logger = logging.get_logger(__name__)
Model = PreTrainedModel | StrPath


def _is_seq2seq(config: PreTrainedConfig) -> bool:
    """Return True for the config of an encoder-decoder language model."""
    return bool(config.is_encoder_decoder) and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def _config_at(path: str, kwargs: dict[str, Any]) -> PreTrainedConfig | None:
    """Return the config of the model at `path`, or None where only loading the model can tell what is there."""
    if "gguf_file" in kwargs:
        return None
    hub = {name: kwargs[name] for name in (*LOCATION, *ACCESS, "trust_remote_code") if name in kwargs}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **hub)
    except (OSError, ValueError):  # an adapter's folder, a wrong path, an unknown family
        return None
    return config


def _load(name: str, model: Any, kwargs: dict[str, Any], mode: str | None = None) -> PreTrainedModel:
    """Return a loaded model. mode: how a bidirectional augmenter reads; None for a causal language model."""
    if isinstance(model, (str, os.PathLike)):
        path: str = os.fspath(model)
        with load_errors_named("compose", name, model, "a loaded model, its folder or its hub name"):
            if mode is not None:
                return load_encoder(path, "compose", **kwargs)
            config = _config_at(path, kwargs)
            seq2seq = config is not None and _is_seq2seq(config)
            if seq2seq and name != "anchor" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                got = f"{path!r}, an encoder-decoder ({type(config).__name__}). Or {HINT}"
                raise bad_value("compose", name, "decoder-only models", got)
            kind = AutoModelForSeq2SeqLM if seq2seq and name == "anchor" else AutoModelForCausalLM
            model = kind.from_pretrained(path, **kwargs)
    if not isinstance(model, PreTrainedModel):
        raise bad_value("compose", name, "a transformers model or a path", type(model).__name__)
    if isinstance(model, Composition):
        expected = "a model that is no composition"
        raise bad_value("compose", name, expected, f"a {type(model).__name__}. Give one anchor several augmenters")
    return model if mode is None else encoder_of(model, "compose")


def _check_readers(models: list[PreTrainedModel], modes: list[str | None], hint: str) -> None:
    """Raise ValueError for an augmenter that cannot read causally, token by token, and shall. hint: what else to do."""
    for model, mode in zip(models, modes, strict=True):
        if mode is None:
            try:
                Signature.of(model, where="compose", argument="augmenters")
            except ValueError as problem:
                text = str(problem)
                if "`augmenters`" not in text:
                    got = f"{type(model).__name__}: {text}"
                    text = str(bad_value("compose", "augmenters", "a causal language model", got))
                raise ValueError(f"{text.rstrip('.')}{hint}") from problem


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None) if isinstance(dtype, (str, torch.dtype)) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise bad_value("compose", "dtype", "a floating-point dtype like torch.bfloat16, or its name", repr(dtype))
    return name


def _check_options(vocab_size: Any, model_kwargs: Any) -> None:
    if vocab_size is not None and (
        isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral) or vocab_size < 1
    ):
        raise bad_value("compose", "vocab_size", "a positive integer or None", describe(vocab_size))
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        expected = "a dict of arguments of from_pretrained, like {'dtype': torch.bfloat16}"
        raise bad_value("compose", "model_kwargs", expected, describe(model_kwargs))


def _anchor_heads(anchor: PreTrainedModel, head_dim: Any) -> int:
    """Return the anchor's number of attention heads; for one without attention (Mamba), its width // `head_dim`.

    head_dim: by default the greatest divisor of the width from 16 to 64, the usual width of a head.
    """
    heads: Any
    try:
        heads = getattr(anchor.config.get_text_config(decoder=True), "num_attention_heads", None)
    except RuntimeError:  # of transformers, for a setting that varies across layers
        heads = "several"
    if isinstance(heads, int):
        return heads
    width, name = hidden_size(anchor), type(anchor).__name__
    if heads is not None:
        expected = f"given for {name}, whose layers do not have one number of attention heads"
        raise bad_value("compose", "num_heads", expected, "None")
    wanted = range(64, 15, -1) if head_dim is None else [head_dim]
    for dim in wanted:
        if isinstance(dim, int) and dim > 0 and width % dim == 0:
            return width // dim
    sizes = "16 to 64" if head_dim is None else head_dim
    expected = f"given for {name}, which has no attention heads and whose width {width} is no multiple of {sizes}"
    raise bad_value("compose", "num_heads", expected, "None")


def _alignment_settings(alignment: Any, count: int, same_ids: bool) -> list[Mapping[str, Any] | None]:
    """Return the settings of every augmenter's aligner, None for the defaults."""
    expected = f"None, a dict of commit, special and max_lag, or a list with a dict or None per augmenter ({count})"
    settings = list(alignment) if isinstance(alignment, (list, tuple)) else [alignment] * count
    if len(settings) != count or any(one is not None and not isinstance(one, Mapping) for one in settings):
        raise bad_value("compose", "alignment", expected, describe(alignment))
    if same_ids and any(one is not None for one in settings):
        raise bad_value("compose", "alignment", "None with same_ids=True, which reads the ids as they are", "settings")
    return settings


def _aligners(
    models: list[PreTrainedModel],
    differences: list[Difference | None],
    settings: list[Mapping[str, Any] | None],
    known: list[Any],
) -> list[StreamAligner | None]:
    """Return an aligner for every augmenter whose tokenizer differs; put the loaded tokenizers into `known`."""
    aligners: list[StreamAligner | None] = []
    for index, (model, difference, own) in enumerate(zip(models, differences, settings, strict=True)):
        label = f"augmenter {index} ({type(model).__name__})"
        if difference is None:
            if own is not None and (known[0] is None or known[index + 1] is None):
                expected = f"given for the anchor and {label}, because `alignment` has settings for it"
                raise bad_value("compose", "tokenizers", expected, "none that is known")
            aligners.append(None)
            continue
        known[0], known[index + 1] = difference.anchor, difference.augmenter
        try:
            aligners.append(StreamAligner.from_settings(difference.anchor, difference.augmenter, own or {}))
        except (TypeError, ValueError) as problem:
            if "_tokenizer`" not in str(problem):
                raise bad_value(
                    "compose", "alignment", "settings of an aligner", f"for {label}: {problem}"
                ) from problem
            expected = "the same for every part, or such that can be aligned"
            do = "Take another model, or pass same_ids=True if the ids mean the same to both"
            got = f"for {label} one that {difference}; {problem}. {do}"
            raise bad_value("compose", "tokenizers", expected, got) from problem
        announce(label, difference)
        logger.info(f"compose: the tokenizer of {label} {difference}, so it reads the text through an aligner.")
    return aligners


def compose(
    anchor: Model,
    augmenters: Model | list[Model],
    connections: Any = "uniform:4",
    num_heads: int | None = None,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    *,
    pre_norm: bool = True,
    post_norm: bool = False,
    bias: bool = False,
    proj: bool = True,
    dtype: torch.dtype | None = None,
    anchor_layers: str | None = None,
    augmenter_layers: str | list[str | None] | None = None,
    vocab_size: int | None = None,
    tokenizers: Any = None,
    same_ids: bool = False,
    alignment: Any = None,
    bidirectional: Any = None,
    probe: bool = True,
    model_kwargs: dict[str, Any] | None = None,
) -> ComposedForCausalLM | ComposedForSeq2SeqLM:
    """Compose a frozen anchor with one or more frozen augmenters.

    After anchor layer b of each connection (a, b):

        H_B <- H_B + W_o Attention(W_q n(H_B), W_k P(H_A), W_v P(H_A))

    W_o starts at zero: until it is trained, the composed model is the anchor, bit for bit. An augmenter whose tokenizer
    differs from the anchor's reads the same text in its own tokens, through a `StreamAligner`. Over an encoder-decoder
    anchor the layers b are those of its decoder, and the augmenters read the text of its encoder.

    Args:
        anchor, augmenters: loaded models or paths. The models are shared, not copied; they are put into eval mode and
            get requires_grad False.
        connections: "uniform:n" or [(a, b), ...] for every augmenter, or a list with one of these per augmenter. -1 is
            the embedding output (the hidden state that enters layer 0) on either side.
        num_heads: default, the anchor's; for one without attention heads, its width // head_dim (by default the
            greatest divisor from 16 to 64).
        head_dim: default, anchor width // num_heads.
        num_kv_heads: default, num_heads.
        pre_norm, post_norm, bias, proj: see `CrossAttention`.
        dtype: of the composition tensors; default float32 (float64 over a float64 anchor), because an optimizer's small
            steps vanish in bfloat16. They compute in the dtype of the anchor's states, or in autocast's.
        anchor_layers, augmenter_layers: dotted paths of the decoder layers, where `find_layers` does not find one list.
        vocab_size: number of token ids in use; default, the rows of the anchor's embedding.
        tokenizers: one for the anchor and one per augmenter (objects, folders, or None for not known). Where the ids of
            the anchor's mean other tokens for an augmenter's, this one gets an aligner. Default, those beside the
            models in local folders and in the hub's local cache.
        same_ids: True reads the ids as they are, without this comparison.
        alignment: settings of the aligners, {"commit": ..., "special": ..., "max_lag": ...}, or a list with one dict or
            None per augmenter. Default, those of `StreamAligner`.
        bidirectional: None for augmenters that read causally, as language models do. "prompt" for one that reads the
            prompt in full, such as BERT or the encoder of T5; the anchor's tokens from the prompt's last one on read
            all of it, those before read nothing. "reencode": it reads all text anew at each of these tokens. A list has
            one entry per augmenter. `prompt_length` of forward says where the prompt ends. Over an encoder-decoder
            "prompt" reads the source in full, and every token of the decoder reads all of it.
        probe: run each part once on eight tokens, and refuse parts that read future tokens and connected layers that do
            not run exactly once or whose state is not (batch, tokens, width). A part that cannot run on its device yet
            is tried at the first forward. False skips it.
        model_kwargs: arguments of from_pretrained for models given as paths (revision, dtype, ...).
    Returns:
        the ComposedForCausalLM, in eval mode; over an encoder-decoder anchor (T5, BART, ...) a ComposedForSeq2SeqLM.
    Raises:
        ValueError naming the argument: a model that cannot be loaded or composed, connections that are out of range,
        repeated or of the wrong type, an augmenter that embeds too few token ids, tokenizers that cannot be aligned, a
        part that reads future tokens, a connected layer that does not run once.

    Runs on the devices of the parts. Source: CALM (arXiv 2401.02412) section 3.
    """
    _check_options(vocab_size, model_kwargs)
    check_bool("compose", "same_ids", same_ids)
    check_bool("compose", "probe", probe)
    composition_dtype = None if dtype is None else _dtype_name(dtype)
    kwargs = dict(model_kwargs or {})
    check_device_map("compose", "model_kwargs", kwargs)
    given = list(augmenters) if isinstance(augmenters, (list, tuple)) else [augmenters]
    by_path = [isinstance(model, (str, os.PathLike)) for model in (anchor, *given)]
    anchor = _load("anchor", anchor, kwargs)
    if not given:
        raise bad_value("compose", "augmenters", "at least one model", "none")
    modes = check_modes_given(bidirectional, len(given))
    models = [_load("augmenters", model, kwargs, mode) for model, mode in zip(given, modes, strict=True)]
    if not anchor.can_generate():
        expected = "a causal language model, or an encoder-decoder that writes text"
        raise bad_value("compose", "anchor", expected, type(anchor).__name__)
    seq2seq = _is_seq2seq(anchor.config)
    Signature.of(anchor, where="compose", argument="anchor", encoder_decoder=seq2seq)
    if seq2seq and "reencode" in modes:
        expected = 'None or "prompt" over an encoder-decoder, whose source is known in full and does not grow'
        raise bad_value("compose", "bidirectional", expected, describe(bidirectional))
    _check_readers(models, modes, f". Or {HINT}")
    settings = _alignment_settings(alignment, len(models), same_ids)
    known = known_tokenizers(anchor, models, tokenizers, kwargs)
    differences: list[Difference | None] = [None] * len(models)
    if not same_ids:
        differences = find_differences(anchor, models, known, vocab_size, explicit=tokenizers is not None)
    check_embedded(anchor, models, vocab_size, differences, known)
    aligners = _aligners(models, differences, settings, known)

    paths = list(augmenter_layers) if isinstance(augmenter_layers, (list, tuple)) else [augmenter_layers] * len(models)
    if len(paths) != len(models):
        expected = f"one path, or a list with one path or None per augmenter ({len(models)})"
        raise bad_value("compose", "augmenter_layers", expected, f"{len(paths)} paths")
    depths = [
        len(find_layers(model, path, where="compose", argument="augmenter_layers")[1])
        for model, path in zip(models, paths, strict=True)
    ]
    found = find_layers(anchor, anchor_layers, where="compose", argument="anchor_layers")[1]
    pairs = resolve_connections(connections, depths, len(found))

    num_heads = _anchor_heads(anchor, head_dim) if num_heads is None else num_heads
    config = (ComposedSeq2SeqConfig if seq2seq else ComposedConfig)(
        anchor.config,
        [model.config for model in models],
        anchor_path=reference(anchor),
        anchor_revision=commit(anchor, kwargs if by_path[0] else {}),
        anchor_layers=anchor_layers,
        augmenter_paths=[reference(model) for model in models],
        augmenter_revisions=[
            commit(model, kwargs if path else {}) for model, path in zip(models, by_path[1:], strict=True)
        ],
        augmenter_layers=paths,
        connections=pairs,
        cross_attention={
            "num_heads": num_heads,
            "head_dim": head_dim,
            "num_kv_heads": num_kv_heads,
            "pre_norm": pre_norm,
            "post_norm": post_norm,
            "bias": bias,
            "proj": proj,
        },
        composition_dtype=composition_dtype or ("float64" if anchor.dtype == torch.float64 else "float32"),
        bidirectional=modes,
        use_cache=getattr(anchor.config.get_text_config(decoder=True), "use_cache", True),
    )
    composed = (ComposedForSeq2SeqLM if seq2seq else ComposedForCausalLM)(config, anchor, models)
    composed.aligners, composed.tokenizers = aligners, known
    composed.record_parts()
    composed.eval()
    if probe:
        check_parts(composed, "compose", defer=True)
    return composed
