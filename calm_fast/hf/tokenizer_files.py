"""Tokenizers of a saved composition: the anchor's lies in its folder, an augmenter's in a subfolder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from calm_fast.core.checks import bad_value
from calm_fast.core.files import atomic_path
from calm_fast.hf.alignment import StreamAligner
from calm_fast.hf.config import ComposedConfig
from calm_fast.hf.references import LOAD, SAVE
from calm_fast.hf.vocabularies import TokenizerFolder, given_tokenizers, holds_tokenizer

# its tokens tell tokenizers of one vocabulary apart: words, case, digits, runs of spaces, accents, CJK, an emoji
_PROBE = "The quick  Brown-fox can't jump 1234567 times.\n\tdef f(x): return naïve+ÅÖ 你好，世界 сегодня 👩‍🚀"


def subfolder(augmenter: int) -> str:
    """Return the name of the folder, inside a composition's, with the tokenizer of an augmenter."""
    return f"augmenter_{augmenter}_tokenizer"


def fingerprint(tokenizer: Any, size: int | None = None) -> str:
    """Return "size:checksum" of a tokenizer: the tokens of all ids below `size`, and the ids of a text.

    size: default, all ids. The fingerprint stays the same if tokens are added behind them, as for padding.
    """
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    size = 1 + tokens[-1][0] if size is None and tokens else size or 0
    tokens = [pair for pair in tokens if pair[0] < size]
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    ids = ids.ids if isinstance(tokenizer, Tokenizer) else ids
    content = json.dumps([tokens, list(ids)], separators=(",", ":"))
    return f"{size}:{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def alignment_fields(aligners: Sequence[StreamAligner | None], tokenizers: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of a ComposedConfig that say how augmenters read: none if all read the anchor's ids."""
    if not any(aligners):
        return {}
    used = [True, *(aligner is not None for aligner in aligners)]
    return {
        "alignment": [None if aligner is None else aligner.settings() for aligner in aligners],
        "tokenizer_fingerprints": [
            fingerprint(tokenizer) if needed else "" for tokenizer, needed in zip(tokenizers, used, strict=True)
        ],
    }


def save_tokenizers(folder: str, tokenizers: Sequence[Any], aligners: Sequence[StreamAligner | None]) -> None:
    """Write the anchor's tokenizer, if it is known, into `folder`, and those of aligned augmenters into subfolders.

    Every file is complete or not there. The fingerprints in config.json tell if the process was killed between two.
    """
    needed = [any(aligners), *(aligner is not None for aligner in aligners)]
    for index, (tokenizer, required) in enumerate(zip(tokenizers, needed, strict=True)):
        if tokenizer is None or (index > 0 and not required):
            continue
        target = os.path.join(folder, subfolder(index - 1)) if index else folder
        if isinstance(tokenizer, TokenizerFolder):
            if os.path.realpath(tokenizer.path) == os.path.realpath(target):
                continue
            try:
                tokenizer = tokenizer.load()
            except Exception as problem:
                why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
                warnings.warn(
                    f"{SAVE}: the anchor's tokenizer in {tokenizer.path} cannot be loaded ({why}), so it is not saved "
                    "with the composition",
                    stacklevel=3,
                )
                continue
        _save(tokenizer, target, templates=index == 0)


def _save(tokenizer: Any, target: str, templates: bool) -> None:
    """Write the files of a tokenizer. templates: chat templates too, as files; otherwise inside its config."""
    if isinstance(tokenizer, Tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if not hasattr(tokenizer, "save_pretrained"):
        return
    os.makedirs(target, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch, save_jinja_files=templates)
        for file in sorted(Path(scratch).rglob("*")):
            if file.is_file():
                place = Path(target) / file.relative_to(scratch)
                place.parent.mkdir(exist_ok=True)
                with atomic_path(place) as partial:
                    shutil.copyfile(file, partial)


def load_tokenizers(
    config: ComposedConfig, folder: str, given: Any, hub: Mapping[str, Any], remote_code: bool, check: bool
) -> tuple[list[Any], list[StreamAligner | None]]:
    """Return the tokenizers of a saved composition, the anchor's first, and the aligners of its augmenters.

    given: the argument `tokenizers` of from_pretrained. hub: the arguments that locate the composition.
    check: refuse other tokenizers than those that were saved.
    """
    count = len(config.augmenter_configs)
    tokenizers = [None] * (1 + count) if given is None else given_tokenizers(LOAD, given, count, remote_code)
    aligners: list[StreamAligner | None] = [None] * count
    if not any(config.alignment):
        own = os.path.join(folder, hub.get("subfolder") or "")
        if tokenizers[0] is None and os.path.isdir(own) and holds_tokenizer(own):
            tokenizers[0] = TokenizerFolder(own, remote_code)
        return tokenizers, aligners
    for index in range(1 + count):
        if index == 0 or config.alignment[index - 1] is not None:
            tokenizer = _load(tokenizers[index], index, folder, hub, remote_code)
            if check:
                _check_same(tokenizer, index, config.tokenizer_fingerprints[index])
            tokenizers[index] = tokenizer
    for index, settings in enumerate(config.alignment):
        if settings is not None:
            aligners[index] = StreamAligner.from_settings(tokenizers[0], tokenizers[index + 1], settings)
    return tokenizers, aligners


def _owner(index: int) -> str:
    return "the anchor" if index == 0 else f"augmenter {index - 1}"


def _load(source: Any, index: int, folder: str, hub: Mapping[str, Any], remote_code: bool) -> Any:
    """Return the tokenizer that was given, or the one in the composition's files."""
    given = source is not None
    if given and not isinstance(source, TokenizerFolder):
        return source
    inside = "/".join(part for part in (hub.get("subfolder") or "", subfolder(index - 1) if index else "") if part)
    try:
        if given:
            return source.load()
        if os.path.isdir(folder) and not holds_tokenizer(os.path.join(folder, inside)):
            raise OSError("no tokenizer lies there")
        where = {name: value for name, value in hub.items() if name != "subfolder"} | {"subfolder": inside}
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code, **where)
    except Exception as problem:
        why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        place = repr(source.path) if given else f"none that loads in {os.path.normpath(os.path.join(folder, inside))}"
        expected = f"a tokenizer that loads, for {_owner(index)}, whose composition reads two tokenizers"
        code = "" if remote_code else ", or trust_remote_code=True if you trust the code that it brings"
        do = f"Pass tokenizers=[anchor's, augmenter's, ...]{code}"
        raise bad_value(LOAD, "tokenizers", expected, f"{place} ({why}). {do}") from problem


def _check_same(tokenizer: Any, index: int, recorded: str) -> None:
    """Raise ValueError unless a tokenizer is the one with which the composition was saved."""
    size = recorded.partition(":")[0]
    if size.isdigit() and fingerprint(tokenizer, int(size)) != recorded:
        expected = f"the tokenizer with which the composition was saved, for {_owner(index)}"
        do = (
            "Save the composition again, pass tokenizers=[anchor's, augmenter's, ...], or accept this one with "
            "check_parts=False"
        )
        raise bad_value(LOAD, "tokenizers", expected, f"one with other tokens. {do}")
