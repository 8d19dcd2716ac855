"""A saved composition of two saved models, and what tests of its files ask of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, prompts, randomize

from calm_fast.hf import ComposedForCausalLM, compose

SETTINGS: dict[str, Any] = {"num_heads": 2, "head_dim": 12, "num_kv_heads": 1, "post_norm": True, "bias": True}
PAIRS = [(-1, -1), (2, 1)]


def build(folder: Path) -> Path:
    """Save two models and a composition of them into `folder`, and return it."""
    FAMILIES["llama"].model(0).save_pretrained(folder / "anchor")
    FAMILIES["gpt2"].model(1, width=24, depth=4).save_pretrained(folder / "augmenter")
    rebuilt(folder).save_pretrained(folder / "composed")
    return folder


def rebuilt(folder: Path, **kwargs: Any) -> ComposedForCausalLM:
    """Compose the models of the folder again, without loading the composition."""
    composed = compose(folder / "anchor", str(folder / "augmenter"), PAIRS, **(SETTINGS | kwargs))
    return randomize(composed)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(prompts()).logits


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "composed" / "config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of the saved config, and return the composition's folder."""
    (folder / "composed" / "config.json").write_text(json.dumps(config_of(folder) | changes))
    return folder / "composed"
