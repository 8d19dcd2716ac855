"""What pages take as given: tiny random models and a tokenizer made from a few words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def llama(width: int = 32, layers: int = 4, vocabulary: int = 300) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def byte_tokenizer(first: str = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer of bytes. Another `first` special token makes another vocabulary."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([first, "<eos>", *letters])}
    bytes_ = Tokenizer(models.BPE(vocabulary, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, pad_token=first, eos_token="<eos>")


def save(folder: str, tokenizer: PreTrainedTokenizerFast, width: int = 32, layers: int = 4) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    llama(width, layers).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
