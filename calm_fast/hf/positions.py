"""How long a text may be for every part of a composition that reads its tokens."""

from __future__ import annotations

from typing import Any

from calm_fast.hf.composition import Composition


def most_positions(model: Any) -> int | None:
    """Return the smallest max_position_embeddings of a transformers model, None if it has no limit.

    Of a composition, the anchor and the augmenters that read the anchor's tokens count. An augmenter with another
    tokenizer has as many tokens as it needs for the same text, which only the text tells, and a bidirectional one may
    read the prompt alone: neither counts.
    """
    configs = [model.config.get_text_config(decoder=True)]
    if isinstance(model, Composition):
        read = zip(model.augmenters, model.aligners, model.encoders, strict=True)
        shared: list[Any] = [part for part, aligner, encoder in read if aligner is None and encoder is None]
        configs += [part.config.get_text_config(decoder=True) for part in shared]
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
