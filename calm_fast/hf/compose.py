"""compose(): build a ComposedForCausalLM from loaded models or their paths."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from calm_fast.core.checks import describe
from calm_fast.hf.composed import ComposedForCausalLM
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.connections import resolve_connections
from calm_fast.hf.inputs import Signature
from calm_fast.hf.layers import find_layers
from calm_fast.hf.saving import named, reference

Model = PreTrainedModel | str | os.PathLike


def _load(name: str, model: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    if isinstance(model, (str, os.PathLike)):
        with named(name, model, "a loaded model, its folder or its hub name"):
            model = AutoModelForCausalLM.from_pretrained(os.fspath(model), **kwargs)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name}: expected a transformers model or a path, got {type(model).__name__}")
    return model


def _embedding_rows(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _check_vocabulary(anchor: PreTrainedModel, augmenters: list[PreTrainedModel], vocab_size: int | None) -> None:
    needed = _embedding_rows(anchor) if vocab_size is None else vocab_size
    for index, augmenter in enumerate(augmenters):
        rows = _embedding_rows(augmenter)
        if rows < needed:
            raise ValueError(
                f"augmenters: augmenter {index} ({type(augmenter).__name__}) embeds {rows} token ids, the "
                f"anchor's go up to {needed - 1}; expected a shared tokenizer "
                "(vocab_size: how many ids are in use)"
            )


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    found = getattr(torch, name, None)
    known = isinstance(dtype, (str, torch.dtype)) and isinstance(found, torch.dtype)
    if not known or not found.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype like torch.bfloat16, or its name, got {dtype!r}")
    return name


def _check_options(vocab_size: Any, model_kwargs: Any) -> None:
    if vocab_size is not None and (
        isinstance(vocab_size, bool) or not isinstance(vocab_size, Integral) or vocab_size < 1
    ):
        raise ValueError(f"vocab_size: expected a positive integer or None, got {describe(vocab_size)}")
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise ValueError(
            "model_kwargs: expected a dict of arguments of from_pretrained, like {'dtype': torch.bfloat16}, "
            f"got {describe(model_kwargs)}"
        )


def _anchor_heads(anchor: PreTrainedModel) -> int:
    heads = getattr(anchor.config.get_text_config(decoder=True), "num_attention_heads", None)
    if not isinstance(heads, int):
        raise ValueError(f"num_heads: required, {type(anchor).__name__} has no single number of attention heads")
    return heads


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
    model_kwargs: dict[str, Any] | None = None,
) -> ComposedForCausalLM:
    """Compose a frozen anchor with one or more frozen augmenters that share its tokenizer (CALM, 2401.02412).

    After anchor layer b of each connection (a, b):  H_B <- H_B + W_o Attention(W_q n(H_B), W_k P(H_A), W_v
    P(H_A)), with W_o = 0 at first: until it is trained the composed model is the anchor, bit for bit.

    anchor, augmenters: loaded models or paths; both get requires_grad False and eval mode, and are shared,
    not copied. connections: "uniform:n" or [(a, b), ...] for every augmenter, or a list with one of these per
    augmenter; -1 is the embedding output (the hidden state that enters layer 0) on either side. num_heads:
    the anchor's by default; head_dim: anchor width // num_heads. dtype of the composition tensors: the
    anchor's by default (float32 is the usual choice for training). anchor_layers, augmenter_layers: dotted
    paths of the decoder layers where the generic finder cannot tell. vocab_size: how many token ids are in
    use, by default the anchor's embedding rows. model_kwargs: for loading from paths (revision, dtype, ...).

    Raises ValueError naming the argument: models that cannot be composed, connections out of range, repeated
    or of the wrong type, an augmenter that embeds too few token ids, a model that cannot be loaded.
    """
    _check_options(vocab_size, model_kwargs)
    composition_dtype = None if dtype is None else _dtype_name(dtype)
    kwargs = dict(model_kwargs or {})
    anchor = _load("anchor", anchor, kwargs)
    given = list(augmenters) if isinstance(augmenters, (list, tuple)) else [augmenters]
    if not given:
        raise ValueError("augmenters: expected at least one model, got none")
    models = [_load("augmenters", model, kwargs) for model in given]
    if not anchor.can_generate():
        raise ValueError(f"anchor: expected a causal language model, got {type(anchor).__name__}")
    for model in (anchor, *models):
        Signature.of(model)
    _check_vocabulary(anchor, models, vocab_size)

    paths = list(augmenter_layers) if isinstance(augmenter_layers, (list, tuple)) else [augmenter_layers] * len(models)
    if len(paths) != len(models):
        raise ValueError(f"augmenter_layers: expected {len(models)} paths, got {len(paths)}")
    depths = [len(find_layers(model, path)[1]) for model, path in zip(models, paths, strict=True)]
    pairs = resolve_connections(connections, depths, len(find_layers(anchor, anchor_layers)[1]))

    num_heads = _anchor_heads(anchor) if num_heads is None else num_heads
    config = ComposedConfig(
        anchor.config,
        [model.config for model in models],
        anchor_path=reference(anchor),
        anchor_revision=kwargs.get("revision"),
        anchor_layers=anchor_layers,
        augmenter_paths=[reference(model) for model in models],
        augmenter_revisions=[kwargs.get("revision")] * len(models),
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
        composition_dtype=composition_dtype or str(anchor.dtype).removeprefix("torch."),
        use_cache=getattr(anchor.config.get_text_config(decoder=True), "use_cache", True),
    )
    return ComposedForCausalLM(config, anchor, models).eval()
