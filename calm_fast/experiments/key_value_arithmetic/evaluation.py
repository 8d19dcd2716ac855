"""Exact-match accuracy of A, B and the composition on the three tasks, over keys never seen in composition."""

from __future__ import annotations

from collections.abc import Callable

import torch

from calm_fast.experiments.key_value_arithmetic.data import (
    ANSWER_START,
    EOS,
    IGNORE,
    PAD,
    Batch,
    World,
    kv_arithmetic,
    numeric,
    substitution,
)
from calm_fast.experiments.key_value_arithmetic.training import Causal, reading

TASKS: dict[str, Callable[[World, torch.Tensor, int, torch.Generator], Batch]] = {
    "substitution": substitution,
    "numeric": lambda world, pool, n, rng: numeric(world, n, rng),
    "kv_arithmetic": kv_arithmetic,
}


@torch.no_grad()
def exact_matches(model: Causal, batch: Batch, rows: int = 1000) -> torch.Tensor:
    """Return (n,) bool, True where greedy generation writes every answer token, <eos> included.

    One pass over the true answer decides this exactly. If each argmax equals the true token, greedy decoding sees the
    same prefix at every step and writes the answer. At the first argmax that differs, the answer is lost. A test
    compares the two.
    """
    verdicts = []
    for ids, labels in zip(batch.input_ids.split(rows), batch.labels.split(rows), strict=True):
        columns = torch.arange(ANSWER_START - 1, ids.shape[1] - 1)
        outputs = model(input_ids=ids[:, :-1], logits_to_keep=columns, use_cache=False, **reading(model))
        written = outputs.logits.argmax(dim=-1)
        targets = labels[:, ANSWER_START:]
        verdicts.append(((written == targets) | (targets == IGNORE)).all(dim=1))
    return torch.cat(verdicts)


@torch.no_grad()
def generate_answers(model: Causal, batch: Batch) -> torch.Tensor:
    """Return (n, answer columns) int64: the tokens that greedy `generate()` writes after the mark, PAD after <eos>."""
    prompt = batch.input_ids[:, :ANSWER_START]
    room = batch.input_ids.shape[1] - ANSWER_START
    written: torch.Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=room,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **reading(model),
    )[:, ANSWER_START:]
    return torch.nn.functional.pad(written, (0, room - written.shape[1]), value=PAD)


def accuracies(
    models: dict[str, Causal], world: World, pool: torch.Tensor, rows: int, seed: int
) -> dict[str, dict[str, float]]:
    """Return the percentage of exact answers by task and model; every model answers the same `rows` rows of a task."""
    table = {}
    for task, make in TASKS.items():
        batch = make(world, pool, rows, torch.Generator().manual_seed(seed))
        table[task] = {
            name: round(100 * exact_matches(model, batch).double().mean().item(), 2) for name, model in models.items()
        }
    return table


def examples(model: Causal, world: World, pool: torch.Tensor, seed: int, rows: int = 3) -> list[dict[str, str]]:
    """Return a few prompts as text, each with the answer of `generate()` and the gold answer."""
    shown = []
    for task, make in TASKS.items():
        batch = make(world, pool, rows, torch.Generator().manual_seed(seed))
        for ids, written in zip(batch.input_ids, generate_answers(model, batch), strict=True):
            prompt, truth = ids[:ANSWER_START], ids[ANSWER_START:]
            text = [world.decode([i for i in row.tolist() if i != PAD]) for row in (prompt, written, truth)]
            shown.append({"task": task, "prompt": text[0], "written": text[1], "expected": text[2]})
    return shown
