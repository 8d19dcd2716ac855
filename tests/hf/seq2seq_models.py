"""Tiny random encoder-decoders, and compositions of them with a causal LM that have non-zero random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from families import EOS, FAMILIES, PAD, VOCAB, randomize
from transformers import AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calm_fast.hf import ComposedForSeq2SeqLM, compose

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 4}
_T5 |= {"decoder_start_token_id": PAD, "tie_word_embeddings": False}
_BART = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
_BART |= {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_BART |= {"init_std": 0.3, "decoder_start_token_id": EOS, "forced_eos_token_id": None}
_SPARSE = {"num_experts": 3, "expert_capacity": 64}
ANCHORS: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "bart": _BART,
    "switch_transformers": _T5 | _SPARSE | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
}
OTHERS: dict[str, dict[str, Any]] = {
    "umt5": _T5,
    "mbart": _BART,
    "pegasus": _BART,
    "nllb-moe": _BART | _SPARSE | {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
}
PAIRS = [(-1, -1), (0, 1), (2, 2)]


def anchor(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return a randomly initialised encoder-decoder in eval mode."""
    torch.manual_seed(seed)
    ids = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
    config = CONFIG_MAPPING[name](**(ids | (ANCHORS | OTHERS)[name] | changes))
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def composed_model(name: str, pairs: Any = PAIRS, augmenter: str = "llama", **kwargs: Any) -> ComposedForSeq2SeqLM:
    """Compose an encoder-decoder with a causal LM, with random weights."""
    composed = compose(anchor(name), FAMILIES[augmenter].model(1, width=24), list(pairs), **kwargs)
    assert isinstance(composed, ComposedForSeq2SeqLM)
    return randomize(composed)


@functools.cache
def shared(name: str) -> ComposedForSeq2SeqLM:
    """Return a composition that tests do not change."""
    return composed_model(name)


def texts(batch: int = 2, source: int = 7, target: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a source (batch, source) and a target (batch, target) without special tokens."""
    generator = torch.Generator().manual_seed(3)
    shapes = (batch, source), (batch, target)
    first, second = (torch.randint(2, EOS, shape, generator=generator) for shape in shapes)
    return first, second


def padded(source: torch.Tensor, pads: slice, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the source with padding at `pads` of one row, and its mask."""
    mask = torch.ones_like(source)
    mask[row, pads] = 0
    return source.masked_fill(mask == 0, PAD), mask
