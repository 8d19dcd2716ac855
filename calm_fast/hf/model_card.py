"""README.md of a saved composition: what it is made of, how to load it, whose licences hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from calm_fast._version import __version__
from calm_fast.core.files import write_text

FILE = "README.md"
# a card with this line is written anew by every save; any other is a person's
MARK = "<!-- Written by calm_fast. Remove this line to keep your own text: saving then leaves the file alone. -->"


def write_card(folder: str, content: Mapping[str, Any], parameters: int) -> None:
    """Write the card into `folder`, unless a card of somebody's own is there.

    content: the composition's config as it is saved. parameters: of the connections.
    """
    file = os.path.join(folder, FILE)
    if is_ours(file):
        write_text(file, card(content, parameters))


def is_ours(file: str) -> bool:
    """Return True if there is no `file` yet, or one that was written here and not made one's own."""
    if not os.path.lexists(file):
        return True
    try:
        with open(file, encoding="utf-8") as stream:
            return MARK in stream.read()
    except (OSError, UnicodeDecodeError):
        return False


_TEXT = """{front}

# A composition of frozen language models

{mark}

This repository holds the connections of a composition (CALM, arXiv 2401.02412), not the models that it is made of.
These are loaded from where the table says. They are frozen, and compared with what they were when the composition was
saved.

| part | model | revision | kind | reads |
|---|---|---|---|---|
{parts}

Connections, {parameters:,} parameters in {dtype} (augmenter layer -> anchor layer; -1 is the embedding output):

{connections}

## Load

```sh
pip install calm-fast
```

```python
import calm_fast  # tells transformers the model type; trust_remote_code is not needed
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("PATH OR HUB NAME OF THIS REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("PATH OR HUB NAME OF THIS REPOSITORY")
```

Without `import calm_fast`, transformers says that it does not know the model type `{model_type}`.

## Licence

The parts keep their own licences, and those hold for what the composition writes: see the models in the table. This
card names no licence for the connections; add yours as `license:` to the first lines.

Saved by calm_fast {version} as a {name}, file format {format_version}.
"""


def card(content: Mapping[str, Any], parameters: int) -> str:
    """Return the text of the card."""
    parts = [("anchor", content["anchor_path"], content["anchor_revision"], content["anchor_config"], "the text")]
    rows = zip(content["augmenter_paths"], content["augmenter_revisions"], content["augmenter_configs"], strict=True)
    for i, ((path, revision, config), reads) in enumerate(zip(rows, _readings(content), strict=True)):
        parts.append((f"augmenter {i}", path, revision, config, reads))
    pairs = (", ".join(f"{a} -> {b}" for a, b in pairs) for pairs in content["connections"])
    seq2seq = content["anchor_config"].get("is_encoder_decoder")
    return _TEXT.format(
        front=_front_matter([path for _, path, *_ in parts], not seq2seq),
        mark=MARK,
        parts="\n".join(_row(*part) for part in parts),
        parameters=parameters,
        dtype=content["composition_dtype"],
        connections="\n".join(f"- augmenter {i}: {text}" for i, text in enumerate(pairs)),
        auto="AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM",
        model_type=content["model_type"],
        version=__version__,
        name=content["architectures"][0],
        format_version=content["format_version"],
    )


def _front_matter(paths: list[str], causal: bool) -> str:
    """Return what the hub reads. Folders are no models on the hub and are left out."""
    hub = [path for path in dict.fromkeys(paths) if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)]
    lines = ["---", "library_name: transformers", "tags:", "- calm-fast", "- composition"]
    if hub:
        lines += ["base_model:", *(f"- {json.dumps(path)}" for path in hub)]
    return "\n".join([*lines, *(["pipeline_tag: text-generation"] if causal else []), "---"])


def _readings(content: Mapping[str, Any]) -> list[str]:
    """Return for every augmenter how it reads."""
    nothing = [None] * len(content["augmenter_paths"])
    aligned, full = content.get("alignment") or nothing, content.get("bidirectional") or nothing
    return [
        f"its text in full ({mode})" if mode else "the text in its own tokens" if settings else "the anchor's tokens"
        for settings, mode in zip(aligned, full, strict=True)
    ]


def _row(name: str, path: str, revision: str | None, config: Mapping[str, Any], reads: str) -> str:
    model = f"`{path}`" if path else "not known: pass it to `from_pretrained`"
    return f"| {name} | {model} | {revision or 'newest'} | {config['model_type']} | {reads} |"
