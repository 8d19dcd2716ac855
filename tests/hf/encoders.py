"""Tiny random encoders of every tested family, and compositions of a Llama with them."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES, PAD, VOCAB, randomize
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from calm_fast.hf import ComposedForCausalLM, compose

_BERT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
_MODERN = {"local_attention": 4, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16, "type_vocab_size": 0}
_KINDS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bert": (BertModel, BertConfig(**_BERT)),
    "roberta": (RobertaModel, RobertaConfig(**_BERT)),
    "modernbert": (ModernBertModel, ModernBertConfig(**_BERT | _MODERN)),
    "deberta": (DebertaV2Model, DebertaV2Config(**_BERT | _DEBERTA)),
    "t5": (T5EncoderModel, T5Config(**_T5)),
    "whole t5": (T5ForConditionalGeneration, T5Config(**_T5)),
    "bart": (BartModel, BartConfig(**_BART)),
}
KINDS = tuple(_KINDS)
ENCODERS = tuple(kind for kind in KINDS if not kind.startswith("whole"))


def encoder(kind: str, seed: int = 1, vocab: int = VOCAB) -> Any:
    """Return a randomly initialised encoder, or a model that has one, in eval mode."""
    kind_class, config = _KINDS[kind]
    config = type(config).from_dict(config.to_dict() | {"vocab_size": vocab, "pad_token_id": PAD})
    torch.manual_seed(seed)
    model = kind_class(config).eval()
    with torch.no_grad():  # the default spread of 0.02 would make every model nearly constant
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.3 / parameter.std().clamp(min=1e-3))
            elif "norm" not in name.lower():
                parameter.normal_(std=0.1)
    return model


def with_encoder(
    kind: str = "bert", mode: str = "prompt", connections: Any = ((-1, -1), (0, 1), (2, 2)), **kwargs: Any
) -> ComposedForCausalLM:
    """Compose a Llama with an encoder, with random weights."""
    pairs = [tuple(pair) for pair in connections]
    model = compose(FAMILIES["llama"].model(0), encoder(kind), pairs, bidirectional=mode, **kwargs)
    return randomize(model)
