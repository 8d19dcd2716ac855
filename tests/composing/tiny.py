"""Tiny models with tokenizers, as folders, and files of rows, all made here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [f"key {a} {b} opens door {(a * 7 + b) % 10}." for a in range(8) for b in range(5)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(size: int = 290, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE without a beginning token. chat: with a chat template and its markers."""
    markers = ["<|user|>", "<|assistant|>", "<|system|>"] if chat else []
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>", *markers],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator(SENTENCES, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    if chat:
        made.chat_template = TEMPLATE
    return made


def sentencepiece() -> PreTrainedTokenizerFast:
    """A Metaspace BPE with byte fallback that adds a beginning token, like those of Llama 2 and Gemma."""
    specials = ["<pad>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    bpe = Tokenizer(models.BPE(unk_token=None, byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=340, special_tokens=specials[:3]))
    vocab = json.loads(bpe.to_str())
    known = vocab["model"]["vocab"]
    for piece in specials[3:]:
        known[piece] = len(known)
    bpe = Tokenizer.from_str(json.dumps(vocab))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_model(folder: Path, tokenizer: Any, seed: int, width: int = 32, layers: int = 2, **config: Any) -> Path:
    """A model folder as users have it."""
    torch.manual_seed(seed)
    settings = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **config,
    )  # fmt: skip
    LlamaForCausalLM(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: Iterable[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def completions(sentences: Iterable[str] = SENTENCES) -> list[dict[str, str]]:
    """Prompts that name a key, with the door as completion."""
    split = [sentence.split(" opens") for sentence in sentences]
    return [{"prompt": prompt, "completion": " opens" + rest} for prompt, rest in split]
