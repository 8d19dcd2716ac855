"""Generate intervals as two tokenizers produce them: synthetic words, split into pieces in two ways."""

from __future__ import annotations

import random

import torch


def _pieces(length: int, longest: int, rng: random.Random) -> list[int]:
    """Split a word of `length` characters into pieces of at most `longest`; short words stay whole."""
    cuts = []
    while length > 0:
        piece = length if length <= longest else rng.randint(max(1, longest // 2), longest)
        cuts.append(piece)
        length -= piece
    return cuts


def aligned_intervals(m: int, n: int, documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lo and hi of one packed sequence: anchor token i sees the augmenter tokens of its document up to its end.

    The text is random words, each after a space. The anchor splits them into pieces of up to 7 characters; the
    augmenter splits some of these pieces once more, so that it needs about n tokens. As in generation, the augmenter
    gets a word when it is complete: inside a word, hi stays at the word's start.

    Args:
        m: anchor tokens. n: augmenter tokens available. documents: number of documents, equally long in anchor tokens.
    Returns:
        lo (m,), hi (m,) int32, 0 <= lo <= hi <= n.
    """
    rng = random.Random(seed)
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14]
    weights = [3, 8, 15, 16, 13, 10, 9, 7, 6, 5, 3, 1]
    longest = 7
    split = max(0.0, n / m - 1.0)  # share of the anchor's pieces that the augmenter splits once more
    lo: list[int] = []
    hi: list[int] = []
    seen = start = document = 0
    while len(hi) < m:
        if document < documents and len(hi) >= document * m / documents:
            start, document = seen, document + 1
        ours = _pieces(rng.choices(lengths, weights)[0], longest, rng)
        theirs = sum(1 + (rng.random() < split) for _ in ours)
        for index in range(len(ours)):
            lo.append(start)
            hi.append(seen + theirs if index == len(ours) - 1 else seen)
        seen += theirs
    clamp = torch.tensor([lo[:m], hi[:m]], dtype=torch.int32).clamp(max=n)
    return clamp[0], clamp[1]
