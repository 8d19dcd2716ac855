"""Intervals as two tokenizers produce them: synthetic words, cut into pieces by two different cutters."""

from __future__ import annotations

import random

import torch


def _pieces(length: int, longest: int, rng: random.Random) -> list[int]:
    """Cut a word of `length` characters into pieces of at most `longest`; short words mostly stay whole."""
    cuts = []
    while length > 0:
        piece = length if length <= longest else rng.randint(max(1, longest // 2), longest)
        cuts.append(piece)
        length -= piece
    return cuts


def aligned_intervals(m: int, n: int, documents: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi of one packed sequence: anchor token i sees its document's augmenter tokens that end where it does.

    The text is random words (a space before each); the anchor cuts them into pieces of up to 7 characters, the
    augmenter into shorter ones, by a length chosen so that it needs about n tokens. As in generation, a word is
    passed on to the augmenter when it is complete: inside a word, hi stays at the word's start.

    Args:
        m: anchor tokens. n: augmenter tokens available. documents: of equal length in anchor tokens.
    Returns:
        lo (m,), hi (m,) int32, 0 <= lo <= hi <= n.
    """
    rng = random.Random(seed)
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14]
    weights = [3, 8, 15, 16, 13, 10, 9, 7, 6, 5, 3, 1]
    longest = 7
    split = max(0.0, n / m - 1.0)  # share of the anchor's pieces that the augmenter cuts once more
    lo, hi = [], []
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
