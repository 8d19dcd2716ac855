"""Fixtures: a tiny model, its tokenizer and rows of right and wrong rationales, all made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def rows(count: int = 24) -> list[dict]:
    """a + b with one right and one systematically wrong rationale each."""
    return [
        {
            "question": f"What is {a} + {b}?",
            "answer": f"\\boxed{{{a + b}}}",
            "generated_answer": [f"We add: \\boxed{{{a + b}}}.", f"We add: \\boxed{{{a + b + 1}}}."],
        }
        for a in range(count // 4)
        for b in range(4)
    ]


def write_rows(file: Path, content: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return file


def tokenizer(texts: list[str], size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def model(vocab: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def saved_model(folder: Path) -> Path:
    """A model folder as users have it."""
    texts = [text for row in rows() for text in (row["question"], *row["generated_answer"])]
    tok = tokenizer(texts)
    tok.save_pretrained(folder)
    model(len(tok)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", rows())


@pytest.fixture(scope="session")
def tiny() -> Any:
    """(model, tokenizer, rows) builders for tests that need the parts."""
    texts = [text for row in rows() for text in (row["question"], *row["generated_answer"])]
    tok = tokenizer(texts)
    return lambda seed=0: model(len(tok), seed), tok, rows()
