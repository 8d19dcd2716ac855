"""Tiny compositions, data and settings for the tests of TRL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

from families import randomize  # noqa: E402
from texts import TEXTS, model_of, tokenizer  # noqa: E402

from calm_fast.hf import ComposedForCausalLM, compose  # noqa: E402

datasets.disable_progress_bars()
# cut at white space, where no token spans the cut
WORDS = [text.split(" ") for text in (*TEXTS[:2], *TEXTS[4:6])]
PARTS = [(" ".join(w[:2]), " " + " ".join(w[2:5]), " " + " ".join(w[3:7])) for w in WORDS]
PAIRS = [{"prompt": prompt, "chosen": one, "rejected": two} for prompt, one, two in PARTS]
COMPLETIONS = [{"prompt": prompt, "completion": one} for prompt, one, _ in PARTS]
GRADED = [{**row, "label": n % 2 == 0} for n, row in enumerate(COMPLETIONS)]
PROMPTS = [{"prompt": prompt} for prompt, _, _ in PARTS]
# one step of plain gradient descent with rate 1: what a weight loses is its gradient
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}


def tokens() -> Any:
    return tokenizer("bytes")


def composition(seed: int = 0) -> ComposedForCausalLM:
    parts = [model_of("llama", "bytes", seed + place, depth=2) for place in (0, 1)]
    return randomize(compose(parts[0], parts[1], [(-1, -1), (1, 1)], num_heads=4))


def settings(kind: Any, folder: Path, rows: int = 4, **options: Any) -> Any:
    defaults = {"logging_steps": 1, "per_device_train_batch_size": rows}
    return kind(output_dir=str(folder), **(STEP | QUIET | defaults | options))


def data(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows)


def weights(model: torch.nn.Module) -> torch.Tensor:
    """Return every weight that trains, as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def gradient_of(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `loss` in every weight that trains, as one vector."""
    loss.backward()
    found = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return found


def step_of(trainer: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Train one step; return the gradient that it took and what the trainer logged."""
    before = weights(trainer.model)
    trainer.train()
    return before - weights(trainer.model), next(entry for entry in trainer.state.log_history if "loss" in entry)


def ids_of(text: str, end: bool = True) -> list[int]:
    return tokens()(text)["input_ids"] + [2] * end


def log_probability(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return the log-probability of a completion, from the logits of its text alone."""
    ids = torch.tensor([prompt + completion])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


def close(one: torch.Tensor, two: torch.Tensor) -> None:
    """Compare float32 results of the same sums, added in another order over about 100 tokens and 32 features."""
    scale = float(two.abs().max())
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * scale)
