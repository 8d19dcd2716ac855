"""Token ids to text, one token at a time: the pieces join to exactly what the tokenizer's own decode gives."""

from __future__ import annotations

import codecs
import json
import random
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders

from calm_fast.core.checks import bad_type, bad_value

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ADVICE = "Pass a tokenizer whose decoder is ByteLevel, ByteFallback, Metaspace, WordPiece, BPEDecoder or none"


class Reading(NamedTuple):
    """What a Detokenizer remembers of the tokens it has read.

    held: bytes of a character, or of a run of byte tokens, that is not complete. owed: text that appears only if
    another token follows. strip: characters still to be taken off the beginning. begun: a token has been read.
    """

    held: bytes = b""
    owed: str = ""
    strip: int = 0
    begun: bool = False


def backend(where: str, name: str, tokenizer: Any) -> Tokenizer:
    """Return the `tokenizers.Tokenizer` inside argument `name` of `where`."""
    found = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(found, Tokenizer):
        expected = "a fast tokenizer (one with a `backend_tokenizer`; AutoTokenizer loads it from tokenizer.json)"
        raise bad_type(where, name, expected, tokenizer)
    return found


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Detokenizer:
    """The text that each token id adds, special tokens left out.

    Text is defined as decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False). A character whose
    bytes are not all there is held. So is a run of byte tokens (<0xE4>): one wrong byte in it replaces them all.

    Raises:
        ValueError: no rule says what one token adds to the text.
    """

    def __init__(self, tokenizer: Any, where: str = "Detokenizer", argument: str = "tokenizer") -> None:
        self.tokenizer = backend(where, argument, tokenizer)
        self.where, self.argument = where, argument
        self.special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        decoder = self.tokenizer.decoder
        self.start = Reading()
        self.per_token: list[Callable[[str, bool], str]] = []
        self.byte_level = self.byte_fallback = False
        self.suffix = ""
        fused = False
        for stage in _stages(None if decoder is None else json.loads(decoder.__getstate__())):
            fused = self._add(stage, fused)
        self.pieces: dict[int, str | bytes] = {}
        self._alphabet = byte_alphabet() if self.byte_level else {}
        self._prove()

    def _add(self, stage: dict[str, Any] | None, fused: bool) -> bool:
        """Add one stage of the decoder; return True once tokens are joined."""
        kind = "none" if stage is None else stage["type"]
        if kind == "Fuse":
            return True
        if kind == "Strip" and fused and stage["stop"] == 0 and stage["content"] == " ":  # type: ignore[index]
            self.start = self.start._replace(strip=self.start.strip + stage["start"])  # type: ignore[index]
        elif fused or self.byte_level:
            raise self._unknown(f"a {kind} after the tokens are joined")
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "ByteLevel":
            self.byte_level = True
        elif kind == "BPEDecoder":
            self.suffix = stage["suffix"]  # type: ignore[index]
        elif kind == "none":
            self.per_token.append(lambda token, first: token if first else " " + token)
        elif stage is not None and kind in ("Replace", "Metaspace", "WordPiece", "Strip"):
            self.per_token.append(_stage_rule(stage))
        else:
            raise self._unknown(kind)
        return fused

    def _unknown(self, what: str) -> ValueError:
        expected = "a tokenizer whose tokens can be turned into text one by one"
        return bad_value(self.where, self.argument, expected, f"a decoder with {what}. {_ADVICE}")

    def piece(self, token_id: int, first: bool = False) -> str | bytes:
        """Return what a token adds: text, or bytes. first: the text begins with this token."""
        if token_id in self.special or (token := self.tokenizer.id_to_token(token_id)) is None:
            return ""
        for rule in self.per_token:
            token = rule(token, first)
        if self.byte_level:
            if all(char in self._alphabet for char in token):
                return bytes(self._alphabet[char] for char in token)
            return token.encode()
        if self.byte_fallback and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token

    def skipped(self, token_id: int) -> bool:
        """Return True if a token adds nothing because it is special, or because the vocabulary has no such id."""
        return token_id in self.special or self.tokenizer.id_to_token(token_id) is None

    def step(self, state: Reading, token_id: int) -> tuple[Reading, str]:
        """Return the state after one more token, and the text that it completes."""
        if not state.begun:
            if self.skipped(token_id):
                return state, ""
            piece, state = self.piece(token_id, first=True), state._replace(begun=True)
        else:
            try:
                piece = self.pieces[token_id]
            except KeyError:
                piece = self.pieces[token_id] = self.piece(token_id)
        if not piece and (self.byte_level or self.suffix or self.skipped(token_id)):
            return state, ""
        if isinstance(piece, bytes):
            held = state.held + piece
            if self.byte_fallback:
                return state._replace(held=held), ""
            text, used = codecs.utf_8_decode(held, "replace", False)
            if used != len(held) or state.held:
                state = state._replace(held=held[used:])
            return state, text
        text = piece
        if state.held:  # a run of byte tokens has ended
            text = _fallback_text(state.held) + text
            state = state._replace(held=b"")
        if self.suffix:
            text, owed = state.owed + text.replace(self.suffix, " "), ""
            if piece.endswith(self.suffix):
                text, owed = text[:-1], " "
            state = state._replace(owed=owed)
        return (state, text) if not state.strip else self._stripped(state, text)

    def _stripped(self, state: Reading, text: str) -> tuple[Reading, str]:
        """Take the spaces off the beginning that the decoder takes off."""
        count = 0
        while count < min(state.strip, len(text)) and text[count] == " ":
            count += 1
        left = state.strip - count if count == len(text) else 0
        return state._replace(strip=left), text[count:]

    def finish(self, state: Reading) -> tuple[Reading, str]:
        """Return the state after a pause, and the held text whose characters are complete; half a character stays."""
        if not state.held or self.byte_level:
            return state, ""
        try:
            text, used = codecs.utf_8_decode(state.held, "strict", False)
        except UnicodeDecodeError:  # the run is spoiled; what it becomes depends on its length
            return state, ""
        state = state._replace(held=state.held[used:])
        return self._stripped(state, text) if state.strip and text else (state, text)

    def rest(self, state: Reading) -> str:
        """Return what decode shows for the bytes that are still held if no token follows."""
        if self.byte_level:
            return state.held.decode(errors="replace")
        return self._stripped(state, _fallback_text(state.held))[1] if state.held else ""

    def read(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, read one by one."""
        state, parts = self.start, []
        for token_id in ids:
            state, text = self.step(state, token_id)
            parts.append(text)
        return "".join(parts) + self.rest(state)

    def _prove(self) -> None:
        """Raise ValueError unless random ids give the text that the tokenizer's own decode gives."""
        size, source = self.tokenizer.get_vocab_size(with_added_tokens=True), random.Random(0)
        for length in (1, 2, 3, 8, 40, 40):
            ids = [source.randrange(size) for _ in range(length)]
            if self.read(ids) != self.tokenizer.decode(ids, skip_special_tokens=True):
                raise self._unknown(f"an unknown rule for the tokens {ids[:8]}")


def _stages(decoder: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """Return the stages of a decoder, in order."""
    if decoder is None or decoder["type"] != "Sequence":
        return [decoder]
    return [stage for inner in decoder["decoders"] for stage in _stages(inner)]


def _stage_rule(stage: dict[str, Any]) -> Callable[[str, bool], str]:
    """Return what one stage of a decoder makes of a token: (token, is it the first) -> text."""
    if stage["type"] == "Replace":
        pattern, content = stage["pattern"], stage["content"]
        if "String" in pattern:
            return lambda token, first: token.replace(pattern["String"], content)
        replace = decoders.Replace(Regex(pattern["Regex"]), content)
        return lambda token, first: replace.decode([token])
    if stage["type"] == "Strip":
        strip = decoders.Strip(stage["content"], stage["start"], stage["stop"])
        return lambda token, first: strip.decode([token])
    decoder: Any
    if stage["type"] == "Metaspace":
        decoder = decoders.Metaspace(stage["replacement"], stage["prepend_scheme"], stage["split"])
    else:
        decoder = decoders.WordPiece(stage["prefix"], stage["cleanup"])
    # after a token "a", which every one of these leaves as it is
    return lambda token, first: decoder.decode([token]) if first else decoder.decode(["a", token])[1:]


def _fallback_text(run: bytes) -> str:
    """Return the text of a run of byte tokens: one wrong byte replaces them all."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run)
