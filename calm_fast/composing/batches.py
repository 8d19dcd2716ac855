"""How rows of ids become batches of a composition, and of one of its models alone."""

from __future__ import annotations

from typing import Any

from calm_fast.composing.scoring import Collate
from calm_fast.hf.alignment.collator import AlignedCollator


def collator(model: Any, tokenizer: Any) -> Collate:
    """Return the collator of a composition: rows of `Example.item` -> the arguments of its forward."""
    return AlignedCollator(model, tokenizer, padding_side="right")


def single_collator(tokenizer: Any) -> Collate:
    """Return the collator of one model: rows of `Example.item` -> input_ids, attention_mask, labels."""
    return AlignedCollator([], tokenizer, padding_side="right")
