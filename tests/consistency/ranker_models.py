"""Tiny random backbones with a tokenizer, and rows whose right rationales can be told from the wrong ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["what", "is", "so", "the", "sum", "then", "surely", "maybe", "because", "?", "\\boxed", "{", "}", "+"]
WORDS += [str(i) for i in range(20)]
FAMILIES = ("bert", "t5", "llama", "gpt2")


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token per word; special tokens as the family has them."""
    special = {
        "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]"},
        "t5": {"eos_token": "</s>"},
        "llama": {"bos_token": "<s>", "eos_token": "</s>"},
        "gpt2": {"eos_token": "</s>"},
    }[family]
    words = ["<pad>", "<unk>", *special.values(), *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", **special)


def backbone(family: str, vocab: int, seed: int = 0) -> PreTrainedModel:
    """A random model of width 32, positions for 64 tokens where the family counts them."""
    torch.manual_seed(seed)
    if family == "bert":
        return BertModel(
            BertConfig(
                vocab_size=vocab, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                max_position_embeddings=64, initializer_range=0.2,
            )
        ).eval()  # fmt: skip
    if family == "t5":
        return T5EncoderModel(
            T5Config(vocab_size=vocab, d_model=32, d_kv=16, num_heads=2, num_layers=2, d_ff=64, is_gated_act=False)
        ).eval()
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=64, initializer_range=0.2,
            )
        ).eval()  # fmt: skip
    return GPT2Model(GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def saved(folder: Path, family: str) -> Path:
    """A model folder as users have it."""
    tok = tokenizer(family)
    tok.save_pretrained(folder)
    backbone(family, len(tok)).save_pretrained(folder)
    return folder


def rows(count: int, samples: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    """a + b; right rationales tend to say "surely", wrong ones "maybe": a ranker can learn that on any question."""
    rng, out = random.Random(seed), []
    for _ in range(count):
        a, b = rng.randrange(1, 10), rng.randrange(1, 10)
        said = []
        for k in range(samples):
            right = k == 0 or (k > 1 and rng.random() < 0.5)  # at least one of each kind
            word = ("surely" if right else "maybe") if rng.random() < 0.9 else rng.choice(["surely", "maybe"])
            total = a + b if right else a + b + rng.choice([-1, 1])
            said.append(
                " ".join(["so", "then"][: rng.randrange(3)] + [word, "the", "sum", f"is \\boxed {{ {total} }}"])
            )
        rng.shuffle(said)
        out.append({"question": f"what is {a} + {b} ?", "answer": f"\\boxed{{{a + b}}}", "generated_answer": said})
    return out


def truth(content: list[dict[str, Any]]) -> list[torch.Tensor]:
    """(K,) bool per row, read off the text without the code under test."""
    return [torch.tensor([r.split()[-2] == row["answer"][7:-1] for r in row["generated_answer"]]) for row in content]
