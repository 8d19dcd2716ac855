"""Token ids of a text after a prompt: those that it has in the middle of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from calm_fast.hf.alignment.tokenizing import PieceTokenizer


class Continuation:
    """Tokenises texts that follow a prompt, whose own ids are fixed: it is read first, as in generation.

    The ids are those that follow the prompt's in the ids of prompt + text. Where a token would cross the boundary, or
    the prompt has no text of its own, the text is tokenised alone, without the dummy space that SentencePiece
    tokenizers put before a text; only tokenizers without a backend of the tokenizers library keep that space.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._pieces: PieceTokenizer | None = None

    def ids(self, text: str, prompt: str | None, prompt_ids: Sequence[int]) -> list[int]:
        """Return the ids of `text` after a prompt; prompt: its text, None = only its ids are known."""
        before = self._text(prompt_ids) if prompt is None else prompt
        if before is not None:
            joint, bare = self._plain(before + text), self._plain(before)
            if joint[: len(bare)] == bare:
                return joint[len(bare) :]
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return self._plain(text)
        if self._pieces is None:
            self._pieces = PieceTokenizer(self.tokenizer)
        if any(token in text for token in self.tokenizer.all_special_tokens):
            return self._pieces.marked(text)
        last = (before if before is not None else self._decoded(prompt_ids))[-1:]
        return self._pieces.encode(text, last)[0]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, prompt_ids: Sequence[int]) -> str | None:
        """Return a text that has these ids, the tokens that begin every text aside; None if there is none."""
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        start = next((n for n, token in enumerate(prompt_ids) if token not in special), len(prompt_ids))
        for ids in (list(prompt_ids), list(prompt_ids[start:])):
            text = self._decoded(ids)
            if text and self._plain(text) == ids:
                return text
        return None

    def _decoded(self, ids: Sequence[int]) -> str:
        if not hasattr(self.tokenizer, "decode"):
            return ""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
