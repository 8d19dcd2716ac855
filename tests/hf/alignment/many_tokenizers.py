"""Tiny tokenizers of eight kinds, trained on the spot, and random texts."""

from __future__ import annotations

import functools
import json
import random

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The cat sat on the mat, and the dog ran after it. It's a nice day; isn't it?",
    "Der Hund läuft über die Straße, und die Katze schläft heute länger als gestern.",
    "def add(x, y):\n    return x + y\n\nfor i in range(10):\n\tprint(add(i, 2))\n",
    "오늘은 날씨가 아주 좋습니다. 우리는 공원에 갑니다.",
    "今天天气很好，我们去公园散步。语言模型可以读很多文字！",
    "今日は天気がいいですね。公園を散歩しましょう、カステラを食べながら。",
    "วันนี้อากาศดีมากเราไปเดินเล่นที่สวนสาธารณะกัน",
    "Numbers: 3.14159, 1,000,000 and 2026-11-30; 50% of $12.50.",
    "Family 👩‍👩‍👧 and thumbs 👍🏽 and flags 🇩🇪🇰🇷 all night 🎉🎉",
    "cafe\u0301 and café, e\u0301te\u0301, n\u0303, \u1112\u1161\u11ab",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "[UNK]"]
_CL100K = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
KINDS = ("gpt2", "llama3", "gemma", "llama2", "unigram", "wordpiece", "words", "suffix")
BETWEEN = [" ", "  ", "\n", "\n\n", " \t", "", "\u0301", "👩‍👧", "ß", "\x00", "<s>", "ﬁ", "漢", "'s"]
LOSSLESS = ("gpt2", "gemma", "llama2")  # a text comes back as it was


def _bpe(inner: Tokenizer, size: int, alphabet: bool, **how: str) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        special_tokens=SPECIAL,
        show_progress=False,
        **how,
    )
    inner.train_from_iterator(TEXTS, trainer)


def _with_bytes(inner: Tokenizer) -> Tokenizer:
    """Return the tokenizer with a token for each byte, which stands for what the vocabulary lacks."""
    layout = json.loads(inner.to_str())
    model, names = layout["model"], [f"<0x{byte:02X}>" for byte in range(256)]
    if model["type"] == "Unigram":
        model["vocab"] += [[name, -20.0] for name in names]
    else:
        model["vocab"] |= {name: len(model["vocab"]) + i for i, name in enumerate(names)}
    model["byte_fallback"] = True
    return Tokenizer.from_str(json.dumps(layout))


def _byte_level(kind: str, size: int) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    inner.pre_tokenizer = byte_level
    if kind == "llama3":
        inner.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_CL100K), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = decoders.ByteLevel()
    _bpe(inner, size, alphabet=True)
    return inner


def _sentencepiece(kind: str, size: int) -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token=None))
    space = normalizers.Replace(" ", "▁")
    inner.normalizer = space if kind == "gemma" else normalizers.Sequence([normalizers.Prepend("▁"), space])
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")  # merges stay inside words
    _bpe(inner, size, alphabet=False)
    inner.pre_tokenizer = None  # type: ignore[assignment]  # the setter takes None
    inner = _with_bytes(inner)
    stages: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(stages if kind == "gemma" else [*stages, decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return inner


@functools.cache
def tokenizer(kind: str, size: int = 420) -> Tokenizer:
    """Return a tokenizer: two byte-level BPE, two SentencePiece BPE, unigram, WordPiece, whole words, and </w>."""
    if kind in ("gpt2", "llama3"):
        return _byte_level(kind, size)
    if kind in ("gemma", "llama2"):
        return _sentencepiece(kind, size)
    if kind == "unigram":
        inner = Tokenizer(models.Unigram())
        inner.normalizer = normalizers.NFKC()
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>")
        trainer.show_progress = False
        inner.train_from_iterator(TEXTS, trainer)
        return _with_bytes(inner)
    if kind == "wordpiece":
        inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        inner.normalizer = normalizers.BertNormalizer(lowercase=True)
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(cleanup=True)
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
        inner.train_from_iterator(TEXTS, trainer)
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return inner
    if kind == "words":
        inner = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
        inner.train_from_iterator(TEXTS, trainer)
        return inner
    inner = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.BPEDecoder(suffix="</w>")
    _bpe(inner, size, alphabet=False, end_of_word_suffix="</w>")
    return inner


def random_text(source: random.Random) -> str:
    """Return pieces of the texts, white space, emoji, marks and rare characters in random order."""
    parts = []
    for _ in range(source.randrange(1, 6)):
        text = source.choice(TEXTS)
        start = source.randrange(len(text))
        parts.append(text[start : start + source.randrange(1, 14)])
        if source.random() < 0.5:
            parts.append(
                source.choice(
                    [" ", "  ", "\n", "\n\n", " \t", "", "\u0301", "👩‍👧", "ß", "\x00", "<s>", "ﬁ", "漢", "'s"]
                )
            )
    return "".join(parts)


def random_ids(source: random.Random, kind: str) -> list[int]:
    """Return ids of a random text, or ids that are no text: broken characters, special tokens, unused ids."""
    inner = tokenizer(kind)
    if source.random() < 0.6:
        return inner.encode(random_text(source)).ids
    return [source.randrange(inner.get_vocab_size() + 2) for _ in range(source.randrange(1, 25))]
