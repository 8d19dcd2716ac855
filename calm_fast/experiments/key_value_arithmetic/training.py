"""The models of the key-value arithmetic experiment and the loop that trains each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from calm_fast import ComposedForCausalLM
from calm_fast.experiments.key_value_arithmetic.data import (
    ANSWER_START,
    EOS,
    IGNORE,
    PAD,
    ROW,
    Batch,
    Mixture,
    World,
    draw,
)

Causal = LlamaForCausalLM | ComposedForCausalLM


@dataclass(frozen=True)
class Schedule:
    """One training run: AdamW with linear warmup, then cosine decay to `floor` of the peak rate."""

    steps: int
    rows: int
    weight_decay: float
    rate: float = 3e-3
    warmup: int = 50
    floor: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        progress = min(1.0, max(0.0, (step - self.warmup) / max(1, self.steps - self.warmup)))
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cosine


@dataclass(frozen=True)
class Recipe:
    """All numbers of the experiment. Connections are (layer of A, layer of B); -1 is the embedding output."""

    keys: int = 2000
    max_value: int = 19
    train_fraction: float = 0.2
    width: int = 64
    layers: int = 2
    heads: int = 4
    a: Schedule = Schedule(steps=500, rows=256, weight_decay=0.01)
    b: Schedule = Schedule(steps=1000, rows=256, weight_decay=0.01)
    encoder: Schedule = Schedule(steps=500, rows=256, weight_decay=0.01)
    composition: Schedule = Schedule(steps=2500, rows=128, weight_decay=0.1)
    connections: tuple[tuple[int, int], ...] = ((1, -1), (1, 0), (1, 1))
    eval_rows: int = 2000


def tiny_llama(recipe: Recipe, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """Return a small untied Llama with weights drawn from `seed`; torch's global generator keeps its state."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=4 * ROW,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def add_tokens(model: LlamaForCausalLM, vocab_size: int) -> None:
    """Grow `model` to `vocab_size` tokens; every new row is the mean of the old ones.

    B never sees a key in its training, and with equal rows it cannot tell one key from another. With random rows it
    could, and the composition would learn its training keys by heart (arithmetic on unseen keys 70 % instead of 99 %).
    """
    old = model.config.vocab_size
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        table[old:] = table[:old].mean(dim=0)


def reading(model: Any) -> dict[str, Any]:
    """Return the arguments that say where a model's prompt ends, for a composition with a bidirectional augmenter.

    An augmenter that reads the prompt reads all that precedes the answer; one that re-encodes reads with every token.
    """
    modes = model.config.bidirectional if isinstance(model, ComposedForCausalLM) else []
    if not any(modes):
        return {}
    return {"prompt_length": ANSWER_START if "prompt" in modes else 1}


def answer_loss(model: Causal, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy of the answer tokens; only columns with an answer token get logits."""
    targets = batch.labels[:, 1:]
    answered = targets != IGNORE
    columns = answered.any(dim=0).nonzero().squeeze(1)
    ids = batch.input_ids[:, :-1]
    logits = model(input_ids=ids, logits_to_keep=columns, use_cache=False, **reading(model)).logits
    chosen = answered[:, columns]
    return F.cross_entropy(logits[chosen], targets[:, columns][chosen])


def train(
    model: Any,
    mixture: Mixture,
    schedule: Schedule,
    seed: int,
    progress: Callable[[range], Iterable[int]] = iter,
    loss_of: Callable[[Any, Batch], torch.Tensor] = answer_loss,
) -> list[float]:
    """Train the parameters of `model` that require grad; return the loss of every step.

    seed: decides the batches. progress: wraps the range of steps, for a progress bar. loss_of: the loss of a batch.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.rate, betas=schedule.betas, weight_decay=schedule.weight_decay, fused=True
    )
    rng = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for step in progress(range(schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        loss = loss_of(model, draw(mixture, schedule.rows, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def seeds(seed: int) -> dict[str, int]:
    """Return a separate seed for everything that is drawn, so that a change of one part leaves the others alone."""
    names = ("world", "init_a", "init_b", "init_ab", "train_a", "train_b", "train_ab", "eval")
    return {name: seed * len(names) + i for i, name in enumerate(names)}


def token_world(recipe: Recipe, seed: int) -> World:
    """Return the keys, values and split of this recipe and seed."""
    return World.create(
        seeds(seed)["world"],
        keys=recipe.keys,
        max_value=recipe.max_value,
        train_fraction=recipe.train_fraction,
    )
