"""Token ids that a model can embed: a tokenizer may know more tokens than its model does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from calm_fast.core.checks import bad_value


def embedded_tokens(model: nn.Module) -> int | None:
    """Return the number of rows of the input embeddings of a transformers model, or None if they have no weight."""
    weight = getattr(model.get_input_embeddings(), "weight", None)  # type: ignore[operator]  # a transformers model
    return None if weight is None else int(weight.shape[0])


def table_rows(where: str, name: str, model: nn.Module) -> int:
    """Return the number of token ids that a model embeds. Raises ValueError, of argument `name`, without one table."""
    count = embedded_tokens(model)
    if count is None:
        kind = type(model.get_input_embeddings()).__name__  # type: ignore[operator]  # a transformers model
        expected = "a model with one table of token embeddings, which reads one token at a time"
        raise bad_value(where, name, expected, f"{type(model).__name__}, which embeds tokens with a {kind}")
    return count


def check_token_ids(where: str, name: str, ids: Sequence[int], model: nn.Module) -> None:
    """Raise ValueError unless `model` embeds every id, which no forward says clearly, least of all on a GPU."""
    count = embedded_tokens(model)
    if ids and count is not None and not 0 <= min(ids) <= max(ids) < count:
        outside = next(token for token in ids if not 0 <= token < count)
        verb = "give" if name == "tokenizer" else "hold"
        raise ValueError(
            f"{where}: `{name}` must {verb} token ids in [0, {count}), got {outside}, which {type(model).__name__} "
            "does not embed; use its own tokenizer, or model.resize_token_embeddings(len(tokenizer)) for added tokens"
        )


def begin_token(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Return the token that `tokenizer` puts before every text if `ids` begin with it, else an empty list."""
    names = ("bos_token_id", "cls_token_id")
    begins = {getattr(tokenizer, name, None) for name in names} - {None}
    return [ids[0]] if ids and ids[0] in begins else []


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text that goes on: the tokens that begin every text occur once, and no end token is added."""
    ids = list(tokenizer(text)["input_ids"])
    ends = {getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "sep")}
    if ids and ends.isdisjoint(ids) and ids[0] not in ids[1:]:
        return ids  # no end was added, and what stands before the text is there once
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    before = next((n for n in range(len(ids) - len(own) + 1) if ids[n : n + len(own)] == own), None)
    if before is None or not own:
        return ids[:-1] if len(ids) > 1 and ids[-1] in ends - {*own[-1:]} else ids
    begin, after = ids[:before], ids[before + len(own) :]
    if ends & {*after}:
        after = []  # T5's, BART's and BERT's tokenizers end every text
    if own[: len(begin)] == begin:
        begin = []  # a text that a chat template made has them already
    return begin + own + after


def last_tokens(tokenizer: Any, ids: Sequence[int], length: int) -> list[int]:
    """Return the end of a text, at most `length` ids, behind the token that begins every text, if there is one.

    Generation always has that token, and some models predict poorly without it.
    """
    if len(ids) <= length:
        return list(ids)
    begin = begin_token(tokenizer, ids)[:length]
    return begin + list(ids[len(ids) - length + len(begin) :])


def padding_id(tokenizer: Any, model: nn.Module | None = None, ends: Sequence[int] = ()) -> int:
    """Return an id to pad with: the tokenizer's, else the first of `ends`, its end token, or 0, that `model` embeds.

    Padding is masked, so any token of the model serves. A padding token that was added to the tokenizer alone does not.
    """
    count = None if model is None else embedded_tokens(model)
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    pad, eos = (token for token in named)
    for token in (pad, *ends, eos):
        if token is not None and (count is None or token < count):
            return int(token)
    return 0
