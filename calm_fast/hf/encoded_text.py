"""What a bidirectional augmenter has read: the anchor's tokens in a cache, and the points at which it reads them anew.

A reading point is a column of the anchor's row. There the augmenter reads all tokens of the row up to and including
this column in full. The anchor's tokens from there on, up to the next point, read this encoding; those before the first
point read nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from calm_fast.hf.aligned_text import RowText

Span = tuple[int, int]  # lo <= j < hi among the slots of the connections


class EncodedText(RowText):
    """What one bidirectional augmenter has read, per row. rows hold the anchor's ids, None for padding.

    points: the reading points of every row. spans: the slots of the connections that hold the last one's encoding, for
    every row; None once it is not there any more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.points: list[list[int]] = []
        self.spans: list[Span] | None = None

    def reset(self) -> None:
        """Forget the text."""
        super().reset()
        self.points, self.spans = [], None

    def keep_first(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens of the anchor."""
        super().keep_first(tokens)
        kept = [[point for point in row if point < tokens] for row in self.points]
        if kept != self.points:
            self.points, self.spans = kept, None

    def select(self, indices: list[int]) -> None:
        """Make the rows those of `indices`."""
        super().select(indices)
        if self.points:
            self.points = [self.points[index].copy() for index in indices]
        if self.spans is not None:
            self.spans = [self.spans[index] for index in indices]

    def __copy__(self) -> EncodedText:
        twin = super().__copy__()
        twin.points = [row.copy() for row in self.points]
        return twin


def shown_tokens(
    before: Sequence[int | None],
    ids: Sequence[int],
    real: Sequence[bool] | None,
    ends: tuple[int, ...],
    stops: frozenset[int],
) -> list[int | None]:
    """Return the new tokens of a row, None for padding and for what follows an end token that the model chose.

    before: the row so far. ends: where its prompts end; tokens after the last one were chosen by the model.
    """
    past, generated = len(before), max(ends, default=0)
    ended = bool(stops) and any(token in stops for token in before[generated:])
    shown: list[int | None] = []
    for i, token in enumerate(ids):
        if past + i < generated:
            ended = False
        shown.append(None if ended or (real is not None and not real[i]) else token)
        ended = ended or (token in stops and past + i >= generated)
    return shown


def reading_points(
    before: Sequence[int], shown: Sequence[int | None], past: int, ends: tuple[int, ...], every_token: bool
) -> list[int]:
    """Return the reading points among the new columns of a row.

    before: its earlier points. shown: its new tokens, None for padding. past: number of its earlier columns. ends:
    where prompts end. every_token: from the first point on, every token is one.

    A prompt's point is its last real token, because this one's logits are for the first token after the prompt.
    """
    found = set()
    for end in ends:
        if past < end <= past + len(shown):
            column = end - 1
            while column > past and shown[column - past] is None:
                column -= 1
            found.add(column)
    if every_token:
        first = past if before else min(found, default=past + len(shown))
        found.update(past + i for i, token in enumerate(shown) if token is not None and past + i >= first)
    return sorted(found)
