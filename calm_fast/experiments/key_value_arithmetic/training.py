"""The models of the key-value arithmetic experiment and the loop that trains each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from calm_fast.experiments.key_value_arithmetic.data import EOS, IGNORE, PAD, ROW, Batch, Mixture, World, draw


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
    """Every number of the experiment; connections are (A's layer, B's layer), -1 = the embedding output."""

    keys: int = 2000
    max_value: int = 19
    train_fraction: float = 0.2
    width: int = 64
    layers: int = 2
    heads: int = 4
    a: Schedule = Schedule(steps=500, rows=256, weight_decay=0.01)
    b: Schedule = Schedule(steps=1000, rows=256, weight_decay=0.01)
    composition: Schedule = Schedule(steps=2500, rows=128, weight_decay=0.1)
    connections: tuple[tuple[int, int], ...] = ((1, -1), (1, 0), (1, 1))
    eval_rows: int = 2000


def tiny_llama(recipe: Recipe, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A small untied Llama with weights drawn from `seed`; torch's global generator is left as it was."""
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
def add_tokens(model: PreTrainedModel, vocab_size: int) -> None:
    """Grow `model` to `vocab_size` tokens, every new row the mean of the old ones.

    B is trained before anybody shows it a key, so it cannot tell one key from another. With random rows it could,
    and the composition would learn its training keys by heart (unseen arithmetic 70 % instead of 99 %).
    """
    old = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        table[old:] = table[:old].mean(dim=0)


def answer_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens; logits only for columns in which some row has one."""
    targets = batch.labels[:, 1:]
    answered = targets != IGNORE
    columns = answered.any(dim=0).nonzero().squeeze(1)
    logits = model(input_ids=batch.input_ids[:, :-1], logits_to_keep=columns, use_cache=False).logits
    chosen = answered[:, columns]
    return F.cross_entropy(logits[chosen], targets[:, columns][chosen])


def train(
    model: nn.Module,
    mixture: Mixture,
    schedule: Schedule,
    seed: int,
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[float]:
    """Train the parameters of `model` that require grad; returns the loss of every step.

    Batches come from `seed` alone. progress: wraps the range of steps, for a progress bar.
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
        loss = answer_loss(model, draw(mixture, schedule.rows, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def seeds(seed: int) -> dict[str, int]:
    """An own stream for everything drawn, so that changing one part of the recipe leaves the others alone."""
    names = ("world", "init_a", "init_b", "init_ab", "train_a", "train_b", "train_ab", "eval")
    return {name: seed * len(names) + i for i, name in enumerate(names)}


def token_world(recipe: Recipe, seed: int) -> World:
    """The keys, values and split of this recipe and seed."""
    return World.create(
        seeds(seed)["world"],
        keys=recipe.keys,
        max_value=recipe.max_value,
        train_fraction=recipe.train_fraction,
    )
