"""Tiny models for the tests of this folder: the families of tests/hf, and a tokenizer of single characters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))

from families import EOS, FAMILIES, OTHERS, PAD, VOCAB, composed_model  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from calm_fast import add_dual_lora  # noqa: E402

__all__ = ["EOS", "FAMILIES", "OTHERS", "PAD", "VOCAB", "composed_model"]


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Token ids of these lengths, without padding and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, EOS, (n,), generator=generator).tolist() for n in lengths]


def dual_lora_model(seed: int = 0) -> Any:
    """A Llama with dual LoRA whose factors are far from zero."""
    model = add_dual_lora(FAMILIES["llama"].model(seed), ("q_proj", "v_proj"), rank=4, gate_dim=8, value_dim=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "neg" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model.eval()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, without the rare ones; 96 tokens and the end token, as VOCAB has."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = ["\n", *map(chr, range(32, 126))]
    vocabulary = {"<pad>": PAD} | {letter: i for i, letter in enumerate(letters, 1)} | {"<eos>": EOS}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
