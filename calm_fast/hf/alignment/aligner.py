"""StreamAligner: an augmenter's token ids as an append-only function of the anchor's."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

from calm_fast.core.checks import bad_type, bad_value, describe
from calm_fast.hf.alignment.committing import ProbeRule, WhitespaceRule
from calm_fast.hf.alignment.detokenizing import Detokenizer, Reading
from calm_fast.hf.alignment.tokenizing import PieceTokenizer

WHERE = "StreamAligner"
COMMITS = {"whitespace": WhitespaceRule, "probe": ProbeRule}


class Alignment(NamedTuple):
    """All that a StreamAligner knows of the anchor's tokens so far. Values never change, so beams share them.

    held: text that is not committed. before: the last committed character, "" after a marker, None at the beginning.
    waiting: the anchor's tokens fed since the oldest of them that is held. started: the augmenter has its beginning.
    """

    reading: Reading
    held: str = ""
    before: str | None = None
    waiting: int = 0
    started: bool = False


class StreamAligner:
    """Token ids of an augmenter, defined as a deterministic, append-only function of the anchor's token ids.

    The ids of a prefix are a prefix of the ids, so the augmenter never tells an anchor token what follows it.

    Args:
        anchor_tokenizer, augmenter_tokenizer: fast tokenizers of transformers, or `tokenizers.Tokenizer`.
        commit: "probe" gives text to the augmenter as soon as no continuation can change its tokens; "whitespace" gives
            whole words, one token later in English and much later in languages without spaces.
        special: {special token of the anchor (string or id): text for the augmenter, in which its special tokens may
            stand}. Others are not shown to the augmenter. Text is committed before every one of them.
        max_lag: commit all text once the oldest held token is this many tokens old. None: no bound.
    Raises:
        ValueError, TypeError naming the argument.
    """

    def __init__(
        self,
        anchor_tokenizer: Any,
        augmenter_tokenizer: Any,
        commit: str = "probe",
        *,
        special: Mapping[str | int, str] | None = None,
        max_lag: int | None = None,
    ) -> None:
        if not isinstance(commit, str) or commit not in COMMITS:
            raise bad_value(WHERE, "commit", " or ".join(map(repr, COMMITS)), describe(commit))
        if max_lag is not None and (isinstance(max_lag, bool) or not isinstance(max_lag, Integral) or max_lag < 1):
            raise bad_value(WHERE, "max_lag", "a positive integer or None", describe(max_lag))
        self.anchor_tokenizer, self.augmenter_tokenizer = anchor_tokenizer, augmenter_tokenizer
        self.commit, self.max_lag = commit, None if max_lag is None else int(max_lag)
        self.detokenizer = Detokenizer(anchor_tokenizer, WHERE, "anchor_tokenizer")
        self.tokenizer = PieceTokenizer(augmenter_tokenizer, WHERE, "augmenter_tokenizer")
        self.rule = COMMITS[commit](self.tokenizer)
        self.special = self._special_texts(special)
        by_name = self.detokenizer.tokenizer.token_to_id
        self._markers = {by_name(name): self.tokenizer.marked(text) for name, text in self.special.items()}
        self._state = self.start()

    @property
    def beginning(self) -> list[int]:
        """The augmenter's ids that exist before the anchor's first token: those its tokenizer puts before a text."""
        return list(self.tokenizer.beginning)

    def settings(self) -> dict[str, Any]:
        """Return commit, special and max_lag as JSON values; `from_settings` takes them."""
        return {"commit": self.commit, "special": dict(self.special), "max_lag": self.max_lag}

    @classmethod
    def from_settings(
        cls, anchor_tokenizer: Any, augmenter_tokenizer: Any, settings: Mapping[str, Any]
    ) -> StreamAligner:
        """Return the aligner with these settings; those left out have their default."""
        if not isinstance(settings, Mapping):
            raise bad_type(WHERE, "settings", "a dict of commit, special and max_lag", settings)
        if unknown := sorted(set(settings) - {"commit", "special", "max_lag"}):
            raise bad_value(WHERE, "settings", "a dict of commit, special and max_lag", f"also {', '.join(unknown)}")
        return cls(anchor_tokenizer, augmenter_tokenizer, **settings)

    def start(self) -> Alignment:
        """Return the state before the first token."""
        return Alignment(self.detokenizer.start)

    def step(self, state: Alignment, b_id: int) -> tuple[Alignment, list[int]]:
        """Return the state after one more anchor token, and the augmenter ids that it adds."""
        if b_id in self.detokenizer.special:
            return self._mark(state, b_id)
        reading, text = self.detokenizer.step(state.reading, b_id)
        held = state.held + text
        ids: list[int] = []
        if not held and not reading.held:
            state = state._replace(reading=reading, waiting=0)
        else:
            ids, length = self.rule.commit(held, state.before)
            waiting = 1 if len(held) - length <= len(text) else state.waiting + 1
            before = held[length - 1] if length else state.before
            state = Alignment(reading, held[length:], before, waiting, state.started)
            if self.max_lag is not None and waiting > self.max_lag:
                state, more = self._commit_all(state)
                ids = ids + more
        return self._begun(state, ids)

    def finish(self, state: Alignment) -> tuple[Alignment, list[int]]:
        """Return the state after a flush, and the ids of all text that was held."""
        return self._begun(*self._commit_all(state))

    def _begun(self, state: Alignment, ids: list[int]) -> tuple[Alignment, list[int]]:
        return (state, ids) if state.started else (state._replace(started=True), self.tokenizer.beginning + ids)

    def _commit_all(self, state: Alignment) -> tuple[Alignment, list[int]]:
        reading, text = self.detokenizer.finish(state.reading)
        held = state.held + text
        ids = self.rule.flush(held, state.before) if held else []
        return Alignment(reading, "", held[-1] if held else state.before, 0, state.started), ids

    def _mark(self, state: Alignment, b_id: int) -> tuple[Alignment, list[int]]:
        """Return the state after a special token of the anchor, and the ids of what it stands for."""
        fresh = not state.started and not state.held
        state, ids = self.finish(state)
        marker = self._markers.get(b_id, [])
        if fresh and marker and self.tokenizer.beginning[: len(marker)] == marker:
            marker = []  # the anchor's beginning stands for the augmenter's, which is there already
        if state.before is not None or marker:
            state = state._replace(before="")
        return state, ids + marker

    def whole(self, b_ids: Iterable[int]) -> list[int]:
        """Return the augmenter's ids of a whole text, for one that reads it in full.

        They are what its tokenizer makes of the text, with the special tokens that it puts around one. The text is what
        the anchor's ids decode to, without special tokens, or with what `special` says for them, and without half a
        character at its end.
        """
        state, pieces, marked = self.detokenizer.start, [""], False
        ids: list[int] = []
        before: str | None = None
        for b_id in b_ids:
            marker = self._markers.get(b_id) if b_id in self.detokenizer.special else None
            if not marker:
                state, text = self.detokenizer.step(state, b_id)
                pieces.append(text)
                continue
            state, text = self.detokenizer.finish(state)
            ids += self.tokenizer.encode("".join([*pieces, text]), before)[0]
            if marked or ids or marker != self.tokenizer.beginning[: len(marker)]:
                ids += marker  # the anchor's beginning stands for the augmenter's
            pieces, marked, before = [], True, ""
        pieces.append(self.detokenizer.finish(state)[1])
        if not marked:
            return self.tokenizer.whole("".join(pieces))
        ids += self.tokenizer.encode("".join(pieces), before)[0]
        return [*self.tokenizer.beginning, *ids, *self.tokenizer.ending]

    def feed(self, b_id: int) -> list[int]:
        """Read one anchor token; return the augmenter ids that it adds, often none."""
        self._state, ids = self.step(self._state, _token_id("b_id", b_id))
        return ids

    def flush(self) -> list[int]:
        """Commit the held text, at the end of a prompt; return its ids. Half a character stays held."""
        self._state, ids = self.finish(self._state)
        return ids

    def reset(self) -> None:
        """Forget the tokens that `feed` has read."""
        self._state = self.start()

    def align(self, b_ids: Iterable[int], prompt_length: int | None = None) -> tuple[list[int], list[int]]:
        """Return the augmenter's ids for a row of anchor ids, and `hi`.

        prompt_length: flush after so many tokens, as generation does after its prompt. None: no flush.
        hi[i]: number of augmenter ids that exist once the anchor's tokens 0..i were read.
        """
        if isinstance(b_ids, (str, bytes)) or not isinstance(b_ids, Iterable):
            raise bad_type(WHERE, "b_ids", "token ids of the anchor", b_ids)
        b_ids = [_token_id("b_ids", b_id) for b_id in b_ids]
        if prompt_length is not None and not 0 <= prompt_length <= len(b_ids):
            raise bad_value(WHERE, "prompt_length", f"from 0 to {len(b_ids)} or None", str(prompt_length))
        state, ids, hi = self.start(), [], []
        for index, b_id in enumerate(b_ids, 1):
            state, new = self.step(state, b_id)
            ids += new
            if index == prompt_length:
                state, new = self.finish(state)
                ids += new
            hi.append(len(ids))
        return ids, hi

    def align_batch(
        self, rows: Sequence[Iterable[int]], prompt_lengths: Sequence[int | None] | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Return `align` of every row."""
        lengths = [None] * len(rows) if prompt_lengths is None else list(prompt_lengths)
        if len(lengths) != len(rows):
            raise bad_value(WHERE, "prompt_lengths", f"one per row ({len(rows)})", f"{len(lengths)} entries")
        return [self.align(row, length) for row, length in zip(rows, lengths, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_settings, (self.anchor_tokenizer, self.augmenter_tokenizer, self.settings())

    def _special_texts(self, special: Any) -> dict[str, str]:
        """Return the table of special tokens by name, after checking it."""
        if special is None:
            return {}
        expected = "a dict {special token of the anchor: text for the augmenter}"
        if not isinstance(special, Mapping):
            raise bad_type(WHERE, "special", expected, special)
        tokens = self.detokenizer.tokenizer.get_added_tokens_decoder()
        names = {tokens[i].content for i in self.detokenizer.special}
        found = {}
        for key, text in special.items():
            name = tokens[key].content if isinstance(key, int) and key in tokens else key
            if name not in names:
                raise bad_value(WHERE, "special", expected, f"the key {key!r}, which is no special token of the anchor")
            if not isinstance(text, str):
                raise bad_type(WHERE, f"special[{key!r}]", 'a string ("" for nothing)', text)
            found[name] = text
        return found


def _token_id(name: str, value: Any) -> int:
    """Return one id of argument `name` as an int."""
    try:
        found = operator.index(value)
    except TypeError:
        raise bad_type(WHERE, name, "a token id of the anchor, an integer", value) from None
    if found < 0:
        raise bad_value(WHERE, name, "a token id of the anchor, from 0 on", str(found))
    return found
