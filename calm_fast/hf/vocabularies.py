"""Checks that token ids mean the same tokens for all parts, by the tokenizers given or beside the models."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedModel

from calm_fast.core.checks import bad_value, describe
from calm_fast.hf.references import commit

# files that decide which token an id is
FILES = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_MAIN = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # one of them must be there

Tokens = Mapping[int, str]  # token by id


def embedding_rows(model: PreTrainedModel) -> int:
    """Return the number of token ids that a model embeds."""
    weight = model.get_input_embeddings().weight
    return int(weight.shape[0])  # type: ignore[index]  # of an embedding


def check_embedded(anchor: PreTrainedModel, augmenters: Sequence[PreTrainedModel], vocab_size: int | None) -> None:
    """Raise ValueError unless every augmenter embeds the ids of the anchor, or the first `vocab_size`."""
    needed = embedding_rows(anchor) if vocab_size is None else vocab_size
    for index, augmenter in enumerate(augmenters):
        rows = embedding_rows(augmenter)
        if rows < needed:
            raise bad_value(
                "compose",
                "augmenters",
                f"models that embed the anchor's token ids, 0 to {needed - 1}",
                f"augmenter {index} ({type(augmenter).__name__}), which embeds {rows} token ids. If the tokenizers are "
                "the same, give the number of ids in use as `vocab_size`",
            )


def check_same_ids(
    anchor: PreTrainedModel,
    augmenters: Sequence[PreTrainedModel],
    tokenizers: Any,
    vocab_size: int | None,
    model_kwargs: Mapping[str, Any],
) -> None:
    """Raise ValueError unless every id of the anchor's tokenizer is the same token for every augmenter.

    tokenizers: one for the anchor and one per augmenter, each an object with get_vocab(), a folder, or None for not
    known. None: those that lie in the models' folders or in the hub's local cache; nothing is downloaded. A pair of
    which one is not known is not compared, nor are ids from `vocab_size` on or beyond the anchor's embedding.
    model_kwargs: cache_dir, revision and trust_remote_code among them hold for the tokenizers too.
    """
    explicit, remote_code = tokenizers is not None, bool(model_kwargs.get("trust_remote_code"))
    if explicit:
        found = _given(tokenizers, len(augmenters))
    else:
        found = [_folder(model, dict(model_kwargs)) for model in (anchor, *augmenters)]
    if found[0] is None:
        return
    bound = embedding_rows(anchor) if vocab_size is None else min(vocab_size, embedding_rows(anchor))
    own: Tokens | None = None
    for index, (model, other) in enumerate(zip(augmenters, found[1:], strict=True)):
        if other is None or _same_files(found[0], other):
            continue
        if own is None and (own := _tokens(found[0], "the anchor", explicit, remote_code)) is None:
            return
        theirs = _tokens(other, f"augmenter {index}", explicit, remote_code)
        if theirs is not None:
            _compare(own, theirs, bound, f"augmenter {index} ({type(model).__name__})")


def _given(tokenizers: Any, count: int) -> list[Any]:
    expected = f"a list of 1 + {count} tokenizers or folders (None for not known): the anchor's, then the augmenters'"
    if not isinstance(tokenizers, (list, tuple)):
        raise bad_value("compose", "tokenizers", expected, describe(tokenizers))
    if len(tokenizers) != 1 + count:
        raise bad_value("compose", "tokenizers", expected, f"{len(tokenizers)} entries")
    for one in tokenizers:
        known = one is None or isinstance(one, (str, os.PathLike)) or callable(getattr(one, "get_vocab", None))
        if not known:
            raise bad_value("compose", "tokenizers", expected, describe(one))
    return list(tokenizers)


def _folder(model: PreTrainedModel, hub: dict[str, Any]) -> str | None:
    """Return the local folder of the files that `model` was loaded from if a tokenizer lies there, else None.

    hub: the arguments of from_pretrained that located the model.
    """
    path = getattr(model, "name_or_path", "") or ""
    if os.path.isdir(path):
        return path if any(os.path.isfile(os.path.join(path, name)) for name in _MAIN) else None
    if not path or path.count("/") > 1 or os.path.isabs(path):
        return None
    revision = commit(model, hub)
    for name in _MAIN:
        try:
            cached = try_to_load_from_cache(path, name, cache_dir=hub.get("cache_dir"), revision=revision)
        except ValueError:  # not a name on the hub
            return None
        if isinstance(cached, str):
            return os.path.dirname(cached)
    return None


def _same_files(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if not isinstance(one, (str, os.PathLike)) or not isinstance(two, (str, os.PathLike)):
        return False
    first, second = Path(one), Path(two)
    if not (first.is_dir() and second.is_dir()):
        return False
    if first.samefile(second):
        return True
    return all(_content(first / name) == _content(second / name) for name in FILES)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _tokens(source: Any, owner: str, explicit: bool, remote_code: bool) -> Tokens | None:
    """Return the token of every id, or None, with a warning, for a tokenizer beside a model that cannot be loaded."""
    if isinstance(source, (str, os.PathLike)):
        try:
            # False instead of None: transformers would ask the person at the terminal
            how = {"local_files_only": True, "trust_remote_code": remote_code}
            source = AutoTokenizer.from_pretrained(os.fspath(source), **how)
        except Exception as problem:
            why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            if explicit:
                got = f"{os.fspath(source)!r}, {why}"
                raise bad_value("compose", "tokenizers", f"a tokenizer that loads, for {owner}", got) from problem
            warnings.warn(
                f"compose: the tokenizer of {owner} in {os.fspath(source)} cannot be loaded ({why}), so its ids are "
                "not compared. Pass `tokenizers`, or same_ids=True if they are the same",
                stacklevel=5,
            )
            return None
    return {index: token for token, index in source.get_vocab().items()}


def _compare(anchor: Tokens, augmenter: Tokens, bound: int, label: str) -> None:
    ids = sorted(i for i in anchor if i < bound)
    different = [i for i in ids if augmenter.get(i) != anchor[i]]
    if not different:
        return
    first = different[0]
    theirs = repr(augmenter[first]) if first in augmenter else "no token"
    fewer = f"pass vocab_size={first} if only smaller ids occur; or " if first > 0 else ""
    got = (
        f"{label}, whose tokenizer differs in {len(different)} of {len(ids)} ids (id {first} is {anchor[first]!r} for "
        f"the anchor and {theirs} for the augmenter). Take a model with the anchor's tokenizer; {fewer}pass "
        "same_ids=True to read the ids as they are"
    )
    raise bad_value("compose", "augmenters", "models for which token ids mean what they mean for the anchor", got)
