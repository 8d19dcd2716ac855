"""The tokens of a vocabulary as strings: which of them may span a place in a text."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from functools import lru_cache

from calm_fast.hf.alignment.detokenizing import byte_alphabet
from calm_fast.hf.alignment.tokenizing import PieceTokenizer, stages

_ENDS_A_WORD = re.compile(r"\S(?=\s)")


class Surfaces:
    """The tokens of an augmenter as its model sees them: bytes as characters, spaces as U+2581, normalised."""

    def __init__(self, tokenizer: PieceTokenizer) -> None:
        plain = tokenizer.plain
        layout = str(stages(plain.pre_tokenizer))
        self._normalizer = plain.normalizer
        self._marked = "Metaspace" in layout
        self._bytes = {byte: char for char, byte in byte_alphabet().items()} if "ByteLevel" in layout else {}
        unicode_forms = ("NFC", "NFD", "NFKC", "NFKD", "Precompiled", "BertNormalizer")
        self.normalises = any(f"'{form}'" in str(stages(plain.normalizer)) for form in unicode_forms)
        special = {token.content for token in plain.get_added_tokens_decoder().values() if token.special}
        self.sorted = sorted({token for token in plain.get_vocab() if token not in special})
        self.crossings = self._crossings()

    def of(self, text: str) -> str:
        """Return `text` as the model sees it."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._marked:
            text = text.replace(" ", "\u2581")
        return "".join(self._bytes[byte] for byte in text.encode()) if self._bytes else text

    def _crossings(self) -> set[str]:
        """Return each pair of a character and a white space after it that lies inside some token."""
        byte_of = {char: byte for byte, char in self._bytes.items()}
        found = set()
        for token in self.sorted:
            text = token.replace("\u2581", " ")
            if byte_of and all(char in byte_of for char in token):
                text = bytes(byte_of[char] for char in token).decode(errors="replace")
            for match in _ENDS_A_WORD.finditer(text):
                found.add(text[match.start() : match.end() + 1])
        return found

    def _begins(self, surface: str) -> bool:
        """Return True if a token begins with `surface`."""
        at = bisect_left(self.sorted, surface)
        return at < len(self.sorted) and self.sorted[at].startswith(surface)

    def _is_token(self, surface: str) -> bool:
        at = bisect_left(self.sorted, surface)
        return at < len(self.sorted) and self.sorted[at] == surface

    def open_places(self, text: str) -> list[int]:
        """Return every place in `text` at which a token may begin that reaches the end of it, in order.

        In a byte-level vocabulary such a token may also begin inside a character. Then the beginning of the character
        is named, and every place from which a token may reach into the character.
        """
        found = set()
        for place in range(len(text)):
            surface = self.of(text[place:])
            if self._begins(surface):
                found.add(place)
            if self._bytes and text[place] > "\x7f":
                found |= self._inside(text, place, surface)
        return sorted(found)

    def begins_text(self, text: str) -> bool:
        """Return True if a token may begin with the dummy space before `text` and reach its end."""
        return self._begins("\u2581" + self.of(text))

    def _inside(self, text: str, place: int, surface: str) -> set[int]:
        """Return the open places for the tokens that begin inside the character at `place`."""
        found: set[int] = set()
        for part in range(1, len(text[place].encode())):
            if self._begins(surface[part:]):
                found.add(place)
                for before in range(max(0, place - 4), place):
                    if self._is_token(self.of(text[before:place]) + surface[:part]):
                        found.add(before)
        return found


@lru_cache(maxsize=1)
def _composing() -> frozenset[str]:
    """Return the characters that Unicode joins with a character after them."""
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(0x20000))
    first = {chr(int(pair[0], 16)) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    return frozenset(first)


def settled(text: str) -> int:
    """Return the length of the part of `text` whose Unicode normal form nothing that follows can change."""
    end = len(text)
    while end and unicodedata.combining(text[end - 1]):
        end -= 1
    if end and (end < len(text) or text[end - 1] in _composing() or "\u1100" <= text[end - 1] <= "\ud7a3"):
        end -= 1
    return end
