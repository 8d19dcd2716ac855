"""An encoder that knows keys, as another augmenter of the key-value arithmetic experiment: a small BERT.

It reads `x op y <mark>` in full, and learns to name the value of every key in place. A composition reads it with
bidirectional="prompt" or "reencode" (docs/composition.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from calm_fast.experiments.key_value_arithmetic.data import (
    ANSWER_START,
    EOS,
    IGNORE,
    PAD,
    ROW,
    Batch,
    Mixture,
    World,
    kv_arithmetic,
    mixed_arithmetic,
    substitution,
)
from calm_fast.experiments.key_value_arithmetic.training import Recipe


def tiny_bert(recipe: Recipe, vocab_size: int, seed: int) -> BertForMaskedLM:
    """Return a small BERT with weights drawn from `seed`; torch's global generator keeps its state."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=4 * ROW,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config)


def named_values(world: World, batch: Batch) -> Batch:
    """Return the prompts of `batch`, (n, ANSWER_START), with the value of each key as its label."""
    ids = batch.input_ids[:, :ANSWER_START]
    keys = ids - world.key_offset
    values = world.number(world.values[keys.clamp(min=0)])
    return Batch(ids, torch.where(keys >= 0, values, IGNORE))


def mixture_encoder(world: World) -> Mixture:
    """Return the encoder's training data: expressions of keys and numbers, over all keys, because it knows them all."""
    everything = torch.arange(len(world.values))

    def named(make: Callable[..., Batch], *pool: torch.Tensor) -> Callable[[int, torch.Generator], Batch]:
        return lambda n, rng: named_values(world, make(world, *pool, n, rng))

    tasks = [(0.4, kv_arithmetic), (0.4, substitution), (0.2, mixed_arithmetic)]
    return [(share, named(make, everything)) for share, make in tasks]


def naming_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy of the values of keys, each at its key."""
    logits = model(input_ids=batch.input_ids).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)


@torch.no_grad()
def named_right(model: Any, world: World, pool: torch.Tensor, rows: int, seed: int) -> float:
    """Return the percentage of keys whose value an encoder names, in `rows` expressions of keys from `pool`."""
    batch = named_values(world, kv_arithmetic(world, pool, rows, torch.Generator().manual_seed(seed)))
    found = model(input_ids=batch.input_ids).logits.argmax(-1)
    asked = batch.labels != IGNORE
    return round(100 * (found == batch.labels)[asked].double().mean().item(), 2)
