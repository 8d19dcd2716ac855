"""Text to token ids in pieces: each piece gets the ids that it has in the middle of a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, models

from calm_fast.core.checks import bad_value
from calm_fast.hf.alignment.detokenizing import backend


class PieceTokenizer:
    """Tokenises a text that comes in pieces.

    A piece that is not the first gets no beginning-of-text token and no dummy space before it, and keeps the spaces at
    its ends. A piece of WordPiece text that goes on in the middle of a word gets continuing (##) tokens. Text that
    looks like a special token stays text.
    """

    def __init__(self, tokenizer: Any, where: str = "PieceTokenizer", argument: str = "tokenizer") -> None:
        original = backend(where, argument, tokenizer)
        suffix = getattr(original.model, "end_of_word_suffix", None)
        self.whole_words = isinstance(original.model, (models.WordPiece, models.WordLevel)) or bool(suffix)
        self.with_specials = _variant(original, middle=True)
        self._first, self._middle = _variant(original, middle=False), _variant(original, middle=True)
        for plain in (self._first, self._middle):
            plain.encode_special_tokens = True
        self._inside = _inside_words(original) if isinstance(original.model, models.WordPiece) else None
        added = original.get_added_tokens_decoder().values()
        self.specials = tuple(token.content for token in added if token.special)
        split = original.pre_tokenizer
        self.splits = split is not None and len(split.pre_tokenize_str("a((b")) > 1
        self.beginning, self.ending = _surroundings(original, where, argument)
        self._original = original
        self._whole: Tokenizer | None = None  # made when a whole text is read

    @property
    def plain(self) -> Tokenizer:
        """The tokenizer of pieces in the middle of a text."""
        return self._middle

    def context(self, before: str | None) -> str | None:
        """Return what the ids of a piece depend on, of the text before it.

        before: its last character, "" after a marker, None if there is none.
        """
        return before if before is None or self._inside is not None else ""

    def encode(self, text: str, before: str | None) -> tuple[list[int], list[int | None]]:
        """Return the ids of `text`, and where in it each token ends: None inside a character. before: see `context`."""
        if before is None:
            encoding = self._first.encode(text, add_special_tokens=False)
        elif self._inside is not None and before and text and self._same_word(before, text[0]):
            return self._encode_inside(text)
        else:
            encoding = self._middle.encode(text, add_special_tokens=False)
        return encoding.ids, _ends(encoding.offsets, len(text))

    def _encode_inside(self, text: str) -> tuple[list[int], list[int | None]]:
        """Return the ids of `text`, which begins inside a word, and where they end."""
        assert self._inside is not None
        encoding = self._inside.encode(text, add_special_tokens=False)
        words = encoding.word_ids
        count = sum(word == words[0] for word in words)
        offsets, ids, length = encoding.offsets[:count], encoding.ids[:count], 0
        if count:
            length = offsets[-1][1]
        others = self._middle.encode(text[length:], add_special_tokens=False)
        offsets += [(start + length, end + length) for start, end in others.offsets]
        return ids + others.ids, _ends(offsets, len(text))

    def whole(self, text: str) -> list[int]:
        """Return the ids of a whole text, with the special tokens that the tokenizer puts around it."""
        if self._whole is None:
            self._whole = Tokenizer.from_str(self._original.to_str())
            self._whole.no_truncation()
            self._whole.no_padding()
            self._whole.encode_special_tokens = True
        return list(self._whole.encode(text).ids)

    def marked(self, text: str) -> list[int]:
        """Return the ids of `text`, in which the names of special tokens stand for these tokens."""
        return list(self.with_specials.encode(text, add_special_tokens=False).ids)

    def _same_word(self, before: str, after: str) -> bool:
        """Return True if the character `after` continues the word that `before` ends."""
        if before.isspace() or after.isspace():
            return False
        words = self._middle.encode(before + after, add_special_tokens=False).word_ids
        return len(set(words)) == 1

    def divisible(self, text: str, end: int) -> bool:
        """Return True if `text` may be divided at `end`, where a token ends.

        A pre-tokenizer (`splits`) must divide the rest as it divides the whole. It does at its own boundaries, and
        before a letter. Elsewhere it may not: "((f" is "((" and "f", but what remains of it after "(" is "(f".
        """
        if not self.splits or end >= len(text) or text[end].isalpha() and text[end - 1].isalpha():
            return True
        pieces = self._middle.pre_tokenizer.pre_tokenize_str(text)
        return any(start == end for _, (start, _) in pieces)

    def last_word(self, text: str) -> int:
        """Return where the word begins that `text` ends with, or its length if no word can go on there."""
        if not text or not self._same_word(text[-1], "a"):
            return len(text)
        encoding = self._middle.encode(text, add_special_tokens=False)
        if not encoding.word_ids:  # the normalizer drops all of it
            return 0
        last = encoding.word_ids.index(encoding.word_ids[-1])
        return int(encoding.offsets[last][0])


def _ends(offsets: list[tuple[int, int]], length: int) -> list[int | None]:
    """Return where the text of each token ends, and the next one's begins; None inside a character.

    offsets: (start, end) of the tokens. They leave out white space that is no token, and marks that were composed.
    """
    starts = [start for start, _ in offsets[1:]] + [length] if offsets else []
    return [start if end <= start else None for (_, end), start in zip(offsets, starts, strict=True)]


def stages(part: Any) -> dict[str, Any] | None:
    """Return the JSON description of a part of a tokenizer: its normalizer, pre-tokenizer or decoder."""
    return None if part is None else json.loads(part.__getstate__())


def _variant(original: Tokenizer, middle: bool, model: models.Model | None = None) -> Tokenizer:
    """Return the tokenizer for pieces of a text: the first, or one in the `middle`. It shares the model."""
    parts = {
        "normalizer": _changed(stages(original.normalizer), "normalizers", lambda stage: _normalizer(stage, middle)),
        "pre_tokenizer": stages(original.pre_tokenizer),
    }
    if middle:
        parts["pre_tokenizer"] = _changed(parts["pre_tokenizer"], "pretokenizers", _without_dummy_space)
    others = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": None}
    empty = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    built = Tokenizer.from_str(json.dumps(others | parts | {"added_tokens": [], "model": empty}))
    built.model = original.model if model is None else model
    if model is None:
        added = original.get_added_tokens_decoder()
        built.add_tokens([added[index] for index in sorted(added)])
        if built.get_added_tokens_decoder() != added:  # ids with gaps between them
            layout = json.loads(original.to_str()) | others | parts
            built = Tokenizer.from_str(json.dumps(layout))
    return built


def _changed(
    stage: dict[str, Any] | None, members: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """Return a stage with `change` made to it, or to each member of a sequence; None removes one."""
    if stage is None:
        return None
    if stage["type"] != "Sequence":
        return change(stage)
    inner = [_changed(member, members, change) for member in stage[members]]
    kept = [member for member in inner if member is not None]
    return dict(stage, **{members: kept}) if kept else None


def _normalizer(stage: dict[str, Any], middle: bool) -> dict[str, Any] | None:
    """Return a normalizer that keeps the spaces at the ends of a piece where other text follows or precedes it."""
    if stage["type"] == "Strip":
        return dict(stage, strip_right=False) if stage["strip_left"] and not middle else None
    return None if middle and stage["type"] == "Prepend" else stage


def _without_dummy_space(stage: dict[str, Any]) -> dict[str, Any]:
    if stage["type"] == "Metaspace":
        return dict(stage, prepend_scheme="never")
    return dict(stage, add_prefix_space=False) if "add_prefix_space" in stage else stage


def _inside_words(original: Tokenizer) -> Tokenizer:
    """Return a WordPiece tokenizer whose words begin with continuing tokens."""
    model, vocab = original.model, original.get_vocab(with_added_tokens=False)
    prefix = model.continuing_subword_prefix
    continuing = {token: index for token, index in vocab.items() if token.startswith(prefix)}
    words = {token.removeprefix(prefix): index for token, index in continuing.items() if token != prefix}
    unknown = {model.unk_token: vocab[model.unk_token]} if model.unk_token in vocab else {}
    inside = models.WordPiece(
        words | continuing | unknown,
        unk_token=model.unk_token,
        max_input_chars_per_word=model.max_input_chars_per_word,
        continuing_subword_prefix=prefix,
    )
    return _variant(original, middle=True, model=inside)


def _surroundings(tokenizer: Tokenizer, where: str, argument: str) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before every text, and those behind it."""
    marked, plain = (
        [i for i, real in zip(encoding.ids, encoding.attention_mask, strict=True) if real]  # some pad every text
        for encoding in (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    )
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return list(marked[:start]), list(marked[start + len(plain) :])
    expected = "a tokenizer that puts its special tokens around the text"
    raise bad_value(where, argument, expected, f"{marked} for 'a', whose own ids are {plain}")
