"""Commit rules: how much of the text so far has tokens that nothing can change any more."""

from __future__ import annotations

import re

from calm_fast.hf.alignment.surfaces import Surfaces, settled
from calm_fast.hf.alignment.tokenizing import PieceTokenizer

_WORD_ENDS = re.compile(r"(?<=\S)(?=\s)")
_REMEMBERED = 1 << 18  # texts whose ids are kept


class WhitespaceRule:
    """Commits text up to the last white space, which belongs to the next word.

    A run of white space stays together. It is no boundary where a token of the augmenter crosses its beginning, like
    ";\\n" in Llama 3. So the tokens on both sides are those of the whole text.
    """

    def __init__(self, tokenizer: PieceTokenizer) -> None:
        self.tokenizer = tokenizer
        self.surfaces = Surfaces(tokenizer)
        self._ids: dict[tuple[str, str | None], list[int]] = {}

    def commit(self, held: str, before: str | None) -> tuple[list[int], int]:
        """Return the ids of the held text that is committed, and its length.

        before: the last character committed, "" after a marker, None at the beginning of the text.
        """
        ids: list[int] = []
        start = 0
        for match in _WORD_ENDS.finditer(held):
            end = match.start()
            if held[end - 1 : end + 1] not in self.surfaces.crossings:
                ids += self.ids(held[start:end], before)
                start, before = end, held[end - 1]
        return ids, start

    def flush(self, held: str, before: str | None) -> list[int]:
        """Return the ids of all held text."""
        ids, start = self.commit(held, before)
        return ids + self.ids(held[start:], held[start - 1] if start else before) if start < len(held) else ids

    def ids(self, text: str, before: str | None) -> list[int]:
        """Return the ids of a text whose ends are boundaries of tokens."""
        key = (text, self.tokenizer.context(before))
        if (found := self._ids.get(key)) is None:
            if len(self._ids) >= _REMEMBERED:
                self._ids.clear()
            found = self._ids[key] = self.tokenizer.encode(text, before)[0]
        return found


class ProbeRule(WhitespaceRule):
    """Commits every token that no continuation of the text can change.

    In whatever way the text goes on, one token of it is the first to reach the end of what is there. It begins at a
    place from which some token of the vocabulary may reach the end. The tokens before it are those of the text up to
    that place, because BPE and unigram models tokenise a prefix that ends with a token as they would alone. So the
    tokens that all these prefixes have in common are certain.

    WordPiece and others (`whole_words`) look at a word as a whole. There, a word is committed once it has ended.
    """

    def __init__(self, tokenizer: PieceTokenizer) -> None:
        super().__init__(tokenizer)
        self._certain: dict[tuple[str, str | None], tuple[list[int], int]] = {}

    def commit(self, held: str, before: str | None) -> tuple[list[int], int]:
        ids, start = super().commit(held, before)
        rest = held[start:]
        if start:
            before = held[start - 1]
        if not rest:
            return ids, start
        key = (rest, self.tokenizer.context(before))
        if (found := self._certain.get(key)) is None:
            if len(self._certain) >= _REMEMBERED:
                self._certain.clear()
            found = self._certain[key] = self._find_certain(rest, before)
        return ids + found[0], start + found[1]

    def _find_certain(self, text: str, before: str | None) -> tuple[list[int], int]:
        """Return the ids that are certain, and the length of their text."""
        if self.surfaces.normalises:
            text = text[: settled(text)]
        if self.tokenizer.whole_words:
            end = self.tokenizer.last_word(text)
            return self.tokenizer.encode(text[:end], before)[0], end
        places = self.surfaces.open_places(text)
        if before is None and places[:1] != [0] and self.surfaces.begins_text(text):
            places = [0, *places]
        places.append(len(text))
        if places[0] == 0:
            return [], 0
        ids, ends = self.tokenizer.encode(text[: places[0]], before)
        count = len(ids)
        for place in places[1:]:
            if not count:
                break
            other = self.tokenizer.encode(text[:place], before)[0]
            count = next((i for i in range(count) if i >= len(other) or ids[i] != other[i]), count)
        # the text of a token that ends inside a character belongs to the next one
        while count and ((last := ends[count - 1]) is None or not self.tokenizer.divisible(text, last)):
            count -= 1
        return (ids[:count], ends[count - 1] or 0) if count else ([], 0)
