"""Tiny tokenizers of three kinds, trained on the spot, and compositions of models that read them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from families import FAMILIES, OTHERS, randomize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.alignment import StreamAligner

TEXTS = [
    "the cat sat on the mat and the dog ran after the cat",
    "a small model reads what a large model has read before",
    "der Hund läuft über die Straße, und die Katze schläft",
    "print(x + 1)  # adds one\nfor i in range(10):\n    y = i * 2",
    "one two three four five six seven eight nine ten",
    "ein zwei drei vier fünf sechs sieben acht neun zehn",
]
KINDS = ("bytes", "metaspace", "wordpiece")


@functools.cache
def tokenizer(kind: str, size: int = 320) -> PreTrainedTokenizerFast:
    """Return a tokenizer: byte-level BPE (as GPT-2's), Metaspace with byte fallback (Gemma's), WordPiece (BERT's)."""
    special = ["<pad>", "<s>", "</s>"]
    if kind == "bytes":
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(TEXTS, trainer)
    elif kind == "metaspace":
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
        inner.normalizer = normalizers.Replace(" ", "▁")
        bytes_ = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=size + 80, special_tokens=[*special, *bytes_], show_progress=False)
        inner.train_from_iterator(TEXTS, trainer)
        layout = inner.to_str()
        inner = Tokenizer.from_str(_plain_bytes(layout))
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    else:
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer(lowercase=True)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*special, "[UNK]"], show_progress=False)
        inner.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _plain_bytes(layout: str) -> str:
    """Return the layout of a tokenizer whose byte tokens are no special tokens: training keeps only special ones."""
    import json

    parts = json.loads(layout)
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(parts)


def model_of(family: str, kind: str, seed: int, depth: int = 3) -> Any:
    """Return a tiny model that embeds the ids of a tokenizer."""
    known = FAMILIES | OTHERS
    model = known[family].model(seed, depth=depth, vocab=len(tokenizer(kind)))
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    return model


def aligned_model(
    anchor: tuple[str, str] = ("llama", "bytes"),
    *augmenters: tuple[str, str],
    connections: Any = ((-1, -1), (0, 1), (2, 2)),
    depth: int = 3,
    **settings: Any,
) -> ComposedForCausalLM:
    """Return a composition of (family, tokenizer) pairs, with random weights. A kind is one tokenizer."""
    augmenters = augmenters or (("llama", "metaspace"),)
    parts = [model_of(family, kind, seed, depth) for seed, (family, kind) in enumerate((anchor, *augmenters))]
    pairs = [tuple(pair) for pair in connections]
    composed = randomize(compose(parts[0], parts[1:], pairs, num_heads=4, same_ids=True, vocab_size=3))
    composed.aligners = [
        None if kind == anchor[1] else StreamAligner(tokenizer(anchor[1]), tokenizer(kind), **settings)
        for _, kind in augmenters
    ]
    return composed


def rows(*texts: str, kind: str = "bytes", side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, mask) of texts, padded on one side."""
    made = [tokenizer(kind)(text)["input_ids"] for text in texts]
    longest = max(map(len, made))
    ids, mask = torch.zeros(len(made), longest, dtype=torch.int64), torch.zeros(len(made), longest, dtype=torch.int64)
    for r, row in enumerate(made):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[r, place], mask[r, place] = torch.tensor(row), 1
    return ids, mask
