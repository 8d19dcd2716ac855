"""AlignedCollator: rows of text, chats or token ids to batches for a composition whose parts have own tokenizers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn

from calm_fast.core.chat_template import ARGUMENTS
from calm_fast.core.checks import bad_type, bad_value, check_bool, check_whole_text, describe
from calm_fast.core.token_ids import padding_id, prompt_ids
from calm_fast.hf.alignment.aligner import StreamAligner
from calm_fast.hf.alignment.tokenizing import PieceTokenizer
from calm_fast.hf.wrappers import inner_model

WHERE = "AlignedCollator"
IGNORED = -100  # label of a token that is not in the loss
_KINDS = "'input_ids', 'messages', 'prompt' and 'completion', or 'text'"


class Row(NamedTuple):
    """One document: the anchor's ids, their labels, and where its prompt ends (None if it has no prompt)."""

    ids: list[int]
    labels: list[int]
    prompt_length: int | None


class AlignedCollator:
    """Makes a batch of rows for `model(**batch)` and Trainer, with the augmenters' own tokens.

    A row is one of

        {"text": ...}
        {"prompt": ..., "completion": ...}
        {"messages": [...], "tools": [...]}                        by the chat template; tools may be left out
        {"input_ids": [...], "labels": [...], "prompt_length": n}  labels and prompt_length may be left out; tokens that
                                                                   an "attention_mask" hides are left out of the row

    The augmenters' ids and hi are those of `StreamAligner.align` with the prompt's length, so training sees what
    generation does.

    Args:
        model_or_aligners: a composition (its `aligners`), or a list with a StreamAligner or None for each augmenter.
            None: that augmenter reads the anchor's ids.
        tokenizer: the anchor's.
        max_length: rows are cut to so many anchor tokens.
        completion_only: the loss leaves out prompts; in chats, all but the last message.
        add_eos: end texts and completions with the end-of-text token of `tokenizer`, if it has one and they do not end
            with it. Ends that the tokenizer itself puts behind every text are left out.
        padding_side: "right" or "left"; default, the tokenizer's. Augmenters' rows are padded on the right.
        pad_to_multiple_of: of the anchor's tokens and of each augmenter's.
        chat_template_kwargs: variables for the chat template, such as {"enable_thinking": False}.
        packed: put all rows into one without padding. Positions restart at each, and no row reads another.
    Returns of a call:
        input_ids, labels (B, M) int64, attention_mask (B, M) or, if packed, position_ids (1, M); and if an augmenter
        has an aligner, lists with an entry per augmenter (None for one without): augmenter_input_ids,
        augmenter_attention_mask, augmenter_position_ids (B, N) int64, hi (and lo, if packed) (B, M) int32. If an
        augmenter is bidirectional, prompt_length (B,) int64, padding included: every row needs a prompt.
    Raises:
        ValueError, TypeError naming the argument or the row.
    """

    def __init__(
        self,
        model_or_aligners: Any,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        completion_only: bool = True,
        add_eos: bool = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        packed: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.aligners, self.bidirectional = _aligners(model_or_aligners)
        parts = _parts(model_or_aligners, len(self.aligners))
        if not callable(tokenizer):
            raise bad_type(WHERE, "tokenizer", "the anchor's tokenizer of transformers", tokenizer)
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise bad_value(WHERE, name, "a positive integer or None", describe(value))
        for name, flag in (("completion_only", completion_only), ("add_eos", add_eos), ("packed", packed)):
            check_bool(WHERE, name, flag)
        side = getattr(tokenizer, "padding_side", "right") if padding_side is None else padding_side
        if side not in ("right", "left"):
            raise bad_value(WHERE, "padding_side", "'right', 'left' or None", describe(padding_side))
        if packed and self.bidirectional:
            got = "True. Give each row a row of its own"
            raise bad_value(WHERE, "packed", "False for a bidirectional augmenter, which reads one prompt a row", got)
        if packed and pad_to_multiple_of is not None:
            raise bad_value(WHERE, "pad_to_multiple_of", "None for packed rows, which have no padding", "a number")
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
            raise bad_type(WHERE, "chat_template_kwargs", "a dict or None", chat_template_kwargs)
        if taken := sorted(ARGUMENTS & set(chat_template_kwargs or ())):
            expected = f"variables of the chat template, without {', '.join(taken)}, which is set here"
            raise bad_value(WHERE, "chat_template_kwargs", expected, repr(chat_template_kwargs))
        self.template_variables = dict(chat_template_kwargs or {})
        self.tokenizer, self.max_length = tokenizer, max_length
        self.completion_only, self.add_eos = completion_only, add_eos
        self.left, self.multiple, self.packed = side == "left", pad_to_multiple_of or 1, packed
        owners = [tokenizer, *(None if a is None else a.augmenter_tokenizer for a in self.aligners)]
        self._pads = [padding_id(owner, part) for owner, part in zip(owners, parts, strict=True)]
        self._pieces: PieceTokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pieces": None}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of `rows`."""
        if len(rows) == 0:
            raise bad_value(WHERE, "rows", "at least one row", "none")
        read = [self._cut(self.row(row)) for row in rows]
        if self.bidirectional and not all(row.prompt_length for row in read):
            got = "a row without one. Give 'prompt' and 'completion', or 'input_ids' with 'prompt_length'"
            raise bad_value(WHERE, "rows", "rows with a prompt, because an augmenter is bidirectional", got)
        aligned = [
            None
            if aligner is None
            else aligner.align_batch([row.ids for row in read], [row.prompt_length for row in read])
            for aligner in self.aligners
        ]
        return self._pack(read, aligned) if self.packed else self._pad(read, aligned)

    def row(self, row: Mapping[str, Any]) -> Row:
        """Return the ids, labels and prompt length of one row."""
        if not isinstance(row, Mapping):
            raise bad_type(WHERE, "rows", f"dicts with {_KINDS}", row)
        if "input_ids" in row:
            return self._given(row)
        if "messages" in row:
            return self._chat(row["messages"], row.get("tools"))
        if "prompt" in row and "completion" in row:
            return self._completed(row["prompt"], row["completion"])
        if "text" in row:
            ids = self._ended(self._opened(row["text"]))
            return Row(ids, ids, None)
        got = f"a row with {', '.join(map(repr, row)) or 'nothing'}"
        if not row:
            got += ". Trainer removes columns that forward does not know: pass remove_unused_columns=False"
        raise bad_value(WHERE, "rows", f"dicts with {_KINDS}", got)

    def _given(self, row: Mapping[str, Any]) -> Row:
        ids, length = _listed(row, "input_ids"), row.get("prompt_length")
        length = None if length is None else int(length)
        if length is not None and not 0 <= length <= len(ids):
            raise bad_value(WHERE, "prompt_length", f"from 0 to {len(ids)}, the row's tokens", str(length))
        for name in ("labels", "attention_mask"):
            if row.get(name) is not None and len(values := _listed(row, name)) != len(ids):
                raise bad_value(WHERE, name, f"one per token of the row ({len(ids)})", f"{len(values)} {name}")
        labels = None if row.get("labels") is None else _listed(row, "labels")
        if row.get("attention_mask") is not None:  # rows that come padded
            real = [i for i, kept in enumerate(_listed(row, "attention_mask")) if kept]
            length = None if length is None else sum(i < length for i in real)
            ids, labels = [ids[i] for i in real], None if labels is None else [labels[i] for i in real]
        return self._labelled(ids, length) if labels is None else Row(ids, labels, length)

    def _labelled(self, ids: list[int], prompt_length: int | None) -> Row:
        ignored = (prompt_length or 0) if self.completion_only else 0
        return Row(ids, [IGNORED] * ignored + ids[ignored:], prompt_length)

    def _completed(self, prompt: str, completion: str) -> Row:
        """Return prompt and completion, tokenised apart, because generation has the prompt alone."""
        ids = self._opened(prompt)
        return self._labelled(ids + self._ended(self._continued(completion, prompt)), len(ids))

    def _chat(self, messages: Any, tools: Any) -> Row:
        """Return a chat whose prompt is everything before the text of its last message."""
        variables = self.template_variables if tools is None else {**self.template_variables, "tools": tools}
        template = functools.partial(self.tokenizer.apply_chat_template, **variables)
        whole = template(messages, tokenize=False)
        check_whole_text(WHERE, "rows", whole)
        prompt = template(messages[:-1], tokenize=False, add_generation_prompt=True) if len(messages) > 1 else ""
        if not whole.startswith(prompt):
            got = "another one. Give the row as 'input_ids' with 'prompt_length'"
            raise bad_value(WHERE, "messages", "a chat whose template begins with the template of its prompt", got)
        ids = self._bare(prompt) if prompt else []
        together = self._bare(whole)
        if together[: len(ids)] == ids:
            return self._labelled(together, len(ids) if prompt else None)
        # a token crosses the end of the prompt, which generation does not see
        return self._labelled(ids + self._marked(whole[len(prompt) :]), len(ids))

    def _opened(self, text: Any) -> list[int]:
        """Return the ids of a text that goes on, as generation reads a prompt: its beginning once, and no end."""
        if not isinstance(text, str):
            raise bad_type(WHERE, "rows", "dicts of strings", text)
        check_whole_text(WHERE, "rows", text)
        return prompt_ids(self.tokenizer, text)

    def _bare(self, text: str) -> list[int]:
        """Return the ids of a text without the special tokens that its tokenizer adds."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _continued(self, text: Any, before: str) -> list[int]:
        """Return the ids of `text` after `before`: without the dummy space that some tokenizers begin a text with.

        The names of special tokens stand for these tokens, as they do in a prompt.
        """
        if not isinstance(text, str):
            raise bad_type(WHERE, "rows", "dicts of strings", text)
        check_whole_text(WHERE, "rows", text)
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return self._bare(text)
        pieces = self._piecewise()
        if any(name in text for name in pieces.specials):
            return pieces.marked(text)
        return pieces.encode(text, before[-1:] or None)[0]

    def _marked(self, text: str) -> list[int]:
        """Return the ids of `text` in the middle of a chat, in which special tokens may stand."""
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return self._bare(text)
        return self._piecewise().marked(text)

    def _piecewise(self) -> PieceTokenizer:
        if self._pieces is None:
            self._pieces = PieceTokenizer(self.tokenizer, WHERE, "tokenizer")
        return self._pieces

    def _ended(self, ids: list[int]) -> list[int]:
        """Return the ids with the end token behind them, if that is asked for and is not there."""
        end = getattr(self.tokenizer, "eos_token_id", None)
        return [*ids, end] if self.add_eos and end is not None and ids[-1:] != [end] else ids

    def _cut(self, row: Row) -> Row:
        if not row.ids:
            raise bad_value(WHERE, "rows", "rows of at least one token", "an empty row")
        if self.max_length is None or len(row.ids) <= self.max_length:
            return row
        length = None if row.prompt_length is None else min(row.prompt_length, self.max_length)
        cut = Row(row.ids[: self.max_length], row.labels[: self.max_length], length)
        if not any(label != IGNORED for label in cut.labels[1:]) and any(label != IGNORED for label in row.labels[1:]):
            warnings.warn(
                f"{WHERE}: `max_length` ({self.max_length}) cuts off all that is learned in a row of {len(row.ids)} "
                "tokens; raise it, shorten the prompts, or leave such rows out",
                stacklevel=3,
            )
        return cut

    def _pad(self, rows: list[Row], aligned: list[Any]) -> dict[str, Any]:
        """Return the rows of a batch, padded."""
        width = self._width([row.ids for row in rows])
        batch: dict[str, Any] = {
            "input_ids": self._stacked([row.ids for row in rows], width, self._pads[0]),
            "attention_mask": self._stacked([[1] * len(row.ids) for row in rows], width, 0),
            "labels": self._stacked([row.labels for row in rows], width, IGNORED),
        }
        if self.bidirectional:
            pads = [width - len(row.ids) if self.left else 0 for row in rows]
            ends = [pad + (row.prompt_length or 0) for pad, row in zip(pads, rows, strict=True)]
            batch["prompt_length"] = torch.tensor(ends)
        if any(found is not None for found in aligned):
            owns = [None if found is None else self._own(i, found, width) for i, found in enumerate(aligned)]
            for name in ("augmenter_input_ids", "augmenter_attention_mask", "augmenter_position_ids", "hi"):
                batch[name] = [None if own is None else own[name] for own in owns]
        return batch

    def _own(self, index: int, found: list[tuple[list[int], list[int]]], width: int) -> dict[str, torch.Tensor]:
        """Return the tensors of one augmenter's own tokens, padded on the right."""
        ids = [ids for ids, _ in found]
        own_width = self._width(ids)
        return {
            "augmenter_input_ids": _right([[*row] for row in ids], own_width, self._pads[index + 1]),
            "augmenter_attention_mask": _right([[1] * len(row) for row in ids], own_width, 0),
            "augmenter_position_ids": torch.arange(own_width).repeat(len(ids), 1),
            "hi": self._stacked([hi for _, hi in found], width, 0).to(torch.int32),
        }

    def _pack(self, rows: list[Row], aligned: list[Any]) -> dict[str, Any]:
        """Return all rows as one; the first label of a row belongs to no token before it."""
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[i for row in rows for i in row.ids]]),
            "position_ids": torch.tensor([[i for row in rows for i in range(len(row.ids))]]),
            "labels": torch.tensor([[i for row in rows for i in (IGNORED, *row.labels[1:])]]),
        }
        if any(found is not None for found in aligned):
            names = ("augmenter_input_ids", "augmenter_position_ids", "lo", "hi")
            batch |= {name: [None] * len(aligned) for name in (*names, "augmenter_attention_mask")}
            for index, found in enumerate(aligned):
                if found is not None:
                    for name, values in zip(names, _packed(found), strict=True):
                        dtype = torch.int32 if name in ("lo", "hi") else torch.int64
                        batch[name][index] = torch.tensor([values], dtype=dtype)
        return batch

    def _width(self, rows: list[list[int]]) -> int:
        return -(-max(map(len, rows)) // self.multiple) * self.multiple

    def _stacked(self, rows: list[list[int]], width: int, value: int) -> torch.Tensor:
        if self.left:
            return torch.tensor([[value] * (width - len(row)) + row for row in rows])
        return _right(rows, width, value)


def _listed(row: Mapping[str, Any], name: str) -> list[int]:
    """Return the integers of a field of a row."""
    values = row[name].tolist() if hasattr(row[name], "tolist") else row[name]
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, Integral) for value in values):
        raise bad_type(WHERE, name, "a list of integers for each row", row[name])
    return [int(value) for value in values]


def _right(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(
        len(rows), width
    )


def _packed(found: list[tuple[list[int], list[int]]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return the ids, positions, lo and hi of an augmenter's rows, one after the other."""
    ids: list[int] = []
    positions: list[int] = []
    lo: list[int] = []
    hi: list[int] = []
    for own, seen in found:
        lo += [len(ids)] * len(seen)
        hi += [len(ids) + count for count in seen]
        positions += range(len(own))
        ids += own
    return ids, positions, lo, hi


def _parts(given: Any, count: int) -> list[nn.Module | None]:
    """Return the anchor and the augmenters of a composition; None for each where only aligners are given."""
    if not isinstance(given, nn.Module):
        return [None] * (1 + count)
    composed = inner_model(given)
    return [composed.anchor, *composed.augmenters]  # type: ignore[misc,list-item]  # of a ComposedForCausalLM


def _aligners(given: Any) -> tuple[list[StreamAligner | None], bool]:
    """Return the aligners of a composition, or a list of them, and whether an augmenter is bidirectional.

    The model itself makes the text of bidirectional augmenters, so theirs are left out.
    """
    if isinstance(given, nn.Module):
        found: Any = getattr(inner_model(given), "aligners", None)
        if found is None:
            expected = "a composition, or a list of aligners (None for an augmenter that reads the anchor's ids)"
            raise bad_type(WHERE, "model_or_aligners", expected, type(inner_model(given)).__name__)
        encoders: Any = inner_model(given).encoders
        streams = [None if encoder is not None else one for one, encoder in zip(found, encoders, strict=True)]
        return streams, any(encoder is not None for encoder in encoders)
    listed = [given] if isinstance(given, StreamAligner) else given
    if not isinstance(listed, (list, tuple)) or not all(a is None or isinstance(a, StreamAligner) for a in listed):
        expected = "a composition, or a list with a StreamAligner or None for each augmenter"
        raise bad_type(WHERE, "model_or_aligners", expected, given)
    return list(listed), False
