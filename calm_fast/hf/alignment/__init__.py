"""Anchor and augmenter with different tokenizers: aligned token ids and batches. docs/alignment.md explains."""

from __future__ import annotations

from calm_fast.hf.alignment.aligner import StreamAligner
from calm_fast.hf.alignment.collator import AlignedCollator

__all__ = ["AlignedCollator", "StreamAligner"]
