"""Which augmenters read the anchor's token ids, and which need an aligner, by the tokenizers of the parts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, PreTrainedModel

from calm_fast.core.checks import bad_value, describe
from calm_fast.core.token_ids import table_rows
from calm_fast.hf.references import commit

# files that decide which token an id is
FILES = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_MAIN = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # one of them must be there

Tokens = Mapping[int, str]  # token by id


class TokenizerFolder(NamedTuple):
    """A tokenizer that is loaded when it is needed."""

    path: str
    trust_remote_code: bool = False

    def load(self) -> Any:
        # False instead of None: transformers would ask the person at the terminal
        how = {"local_files_only": True, "trust_remote_code": self.trust_remote_code}
        return AutoTokenizer.from_pretrained(self.path, **how)


def loaded_tokenizer(source: Any) -> Any:
    """Return a tokenizer that a composition knows, loaded from its folder if need be; None if it cannot be loaded."""
    if not isinstance(source, TokenizerFolder):
        return source
    try:
        return source.load()
    except Exception:  # whatever AutoTokenizer raises
        return None


class Difference(NamedTuple):
    """Two tokenizers under which token ids mean other tokens.

    differing, compared: numbers of ids. example: one id with both its tokens. first: the smallest id that differs.
    """

    anchor: Any
    augmenter: Any
    differing: int
    compared: int
    example: str
    first: int

    def __str__(self) -> str:
        return f"differs in {self.differing} of {self.compared} ids ({self.example})"


def check_embedded(
    anchor: PreTrainedModel,
    augmenters: Sequence[PreTrainedModel],
    vocab_size: int | None,
    differences: Sequence[Difference | None],
    known: Sequence[Any],
) -> None:
    """Raise ValueError unless every augmenter embeds the ids that it reads.

    Without an aligner these are the ids of the anchor, or the first `vocab_size`. With one, anchor and augmenter must
    each embed the ids of their own tokenizer, except tokens added to the vocabulary, which few texts contain and the
    forward checks.
    differences: of the augmenters that read through an aligner, else None. known: the tokenizers, the anchor's first.
    """
    rows = table_rows("compose", "anchor", anchor)
    needed = rows if vocab_size is None else vocab_size
    for index, (augmenter, difference) in enumerate(zip(augmenters, differences, strict=True)):
        rows = table_rows("compose", "augmenters", augmenter)
        who = f"augmenter {index} ({type(augmenter).__name__}), which embeds {rows} token ids"
        if difference is not None:
            _check_own(anchor, "anchor", difference.anchor, "the anchor")
            _check_own(augmenter, "augmenters", difference.augmenter, f"augmenter {index}")
            continue
        if rows >= needed:
            continue
        same = "give the number of ids in use as `vocab_size`"
        if known[0] is None or known[index + 1] is None:
            do = (
                "If its tokenizer differs from the anchor's, pass both as tokenizers=[anchor's, augmenter's, ...], so "
                f"that it reads the same text in its own tokens. If the tokenizers are the same, {same}"
            )
        else:
            do = f"The tokenizers are the same: {same}"
        expected = f"models that embed the anchor's token ids, 0 to {needed - 1}"
        raise bad_value("compose", "augmenters", expected, f"{who}. {do}")


def _check_own(model: PreTrainedModel, argument: str, tokenizer: Any, owner: str) -> None:
    last, rows = max(_ordinary_ids(tokenizer), default=-1), table_rows("compose", argument, model)
    if last >= rows:
        expected = f"a model that embeds the ids of its own tokenizer, 0 to {last}"
        got = f"{owner} ({type(model).__name__}), which embeds {rows} token ids"
        raise bad_value("compose", argument, expected, f"{got}. Is `tokenizers` in the models' order?")


def _ordinary_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the vocabulary without the tokens added to it."""
    try:
        added = tokenizer.get_added_vocab()  # of transformers
    except AttributeError:
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}  # of the tokenizers library
    return {index for token, index in tokenizer.get_vocab().items() if token not in added}


def known_tokenizers(
    anchor: PreTrainedModel,
    augmenters: Sequence[PreTrainedModel],
    tokenizers: Any,
    model_kwargs: Mapping[str, Any],
) -> list[Any]:
    """Return the anchor's tokenizer and the augmenters': objects, TokenizerFolders, and None for those not known.

    tokenizers: the argument of compose(). None: those that lie in the models' folders or in the hub's local cache;
    nothing is downloaded.
    model_kwargs: cache_dir, revision and trust_remote_code among them hold for the tokenizers too.
    """
    remote_code = bool(model_kwargs.get("trust_remote_code"))
    if tokenizers is not None:
        return given_tokenizers("compose", tokenizers, len(augmenters), remote_code)
    folders = [_folder(model, dict(model_kwargs)) for model in (anchor, *augmenters)]
    return [None if folder is None else TokenizerFolder(folder, remote_code) for folder in folders]


def find_differences(
    anchor: PreTrainedModel,
    augmenters: Sequence[PreTrainedModel],
    known: Sequence[Any],
    vocab_size: int | None,
    explicit: bool,
) -> list[Difference | None]:
    """Return, per augmenter, how its tokenizer differs from the anchor's; None if it does not, or if one is not known.

    Every id of the anchor's tokenizer must be the same token for the augmenter, except ids from `vocab_size` on or
    beyond the anchor's embedding.
    known: as `known_tokenizers` returns them; loaded ones take the places of folders. explicit: the caller gave them,
    so one that does not load is an error, not a warning.
    """
    found: list[Difference | None] = [None] * len(augmenters)
    if known[0] is None:
        return found
    bound = table_rows("compose", "anchor", anchor)
    bound = bound if vocab_size is None else min(vocab_size, bound)
    own: Any = None
    for index, other in enumerate(known[1:]):
        if other is None or _same_files(known[0], other):
            continue
        if own is None and (own := _loaded(known[0], "the anchor", explicit)) is None:
            return found
        theirs = _loaded(other, f"augmenter {index}", explicit)
        if theirs is not None:
            found[index] = _difference(own, theirs, bound)
    return found


def announce(augmenter: str, difference: Difference) -> None:
    """Warn about an aligner between tokenizers that mostly agree: the user may not want one."""
    if 2 * difference.differing > difference.compared:
        return
    fewer = f"pass vocab_size={difference.first} if only smaller ids occur, or " if difference.first > 0 else ""
    warnings.warn(
        f"compose: the tokenizer of {augmenter} {difference}, so it reads the text through an aligner, as for any two "
        f"tokenizers. To read the anchor's ids instead, {fewer}pass same_ids=True",
        stacklevel=4,
    )


def given_tokenizers(function: str, tokenizers: Any, count: int, remote_code: bool) -> list[Any]:
    """Return the argument `tokenizers` of compose() or from_pretrained() as a list, after checking it."""
    expected = f"a list of 1 + {count} tokenizers or folders (None for not known): the anchor's, then the augmenters'"
    if not isinstance(tokenizers, (list, tuple)):
        raise bad_value(function, "tokenizers", expected, describe(tokenizers))
    if len(tokenizers) != 1 + count:
        raise bad_value(function, "tokenizers", expected, f"{len(tokenizers)} entries")
    found: list[Any] = []
    for one in tokenizers:
        if isinstance(one, (str, os.PathLike)):
            one = TokenizerFolder(os.fspath(one), remote_code)
        elif one is not None and not callable(getattr(one, "get_vocab", None)):
            raise bad_value(function, "tokenizers", expected, describe(one))
        found.append(one)
    return found


def holds_tokenizer(folder: str) -> bool:
    """Return True if the files of a tokenizer lie in a local folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _MAIN)


def _folder(model: PreTrainedModel, hub: dict[str, Any]) -> str | None:
    """Return the local folder of the files that `model` was loaded from if a tokenizer lies there, else None.

    hub: the arguments of from_pretrained that located the model.
    """
    path = getattr(model, "name_or_path", "") or ""
    if os.path.isdir(path):
        return path if holds_tokenizer(path) else None
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
    if not isinstance(one, TokenizerFolder) or not isinstance(two, TokenizerFolder):
        return False
    first, second = Path(one.path), Path(two.path)
    if not (first.is_dir() and second.is_dir()):
        return False
    if first.samefile(second):
        return True
    return all(_content(first / name) == _content(second / name) for name in FILES)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _loaded(source: Any, owner: str, explicit: bool) -> Any:
    """Return a tokenizer, or None, with a warning, for one beside a model that cannot be loaded."""
    if not isinstance(source, TokenizerFolder):
        return source
    try:
        return source.load()
    except Exception as problem:
        why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        if explicit:
            got = f"{source.path!r}, {why}"
            raise bad_value("compose", "tokenizers", f"a tokenizer that loads, for {owner}", got) from problem
        warnings.warn(
            f"compose: the tokenizer of {owner} in {source.path} cannot be loaded ({why}), so its ids are "
            "not compared. Pass `tokenizers`, or same_ids=True if they are the same",
            stacklevel=4,
        )
        return None


def _difference(anchor: Any, augmenter: Any, bound: int) -> Difference | None:
    own, theirs = (_by_id(tokenizer) for tokenizer in (anchor, augmenter))
    ids = sorted(i for i in own if i < bound)
    different = [i for i in ids if theirs.get(i) != own[i]]
    if not different:
        return None
    first = different[0]
    other = repr(theirs[first]) if first in theirs else "no token"
    example = f"id {first} is {own[first]!r} for the anchor and {other} for the augmenter"
    return Difference(anchor, augmenter, len(different), len(ids), example, first)


def _by_id(tokenizer: Any) -> Tokens:
    return {index: token for token, index in tokenizer.get_vocab().items()}
