"""Extension of mkdocs.yml's mkdocstrings: docstrings as Markdown.

griffe parses `Args:`, but takes each line of `Returns:` and `Raises:` for an entry of its own, and wants blank lines
between sections. Ours are short text, so both become paragraphs. A "<" before a letter would begin an HTML tag, and
"] [" a link.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^(Args|Returns|Raises):$")
ESCAPED = re.compile(r"`[^`]*`|(<)(?=[A-Za-z/|])|(\])(?=\s?\[)")


def as_markdown(text: str) -> str:
    """Return the docstring `text` with its sections apart, and Returns and Raises as paragraphs."""
    lines: list[str] = []
    section: str | None = None
    for line in text.splitlines():
        found = SECTION.match(line)
        if found:
            section = found[1]
            lines += ["", line if section == "Args" else f"**{section}:**"]
            continue
        if section and line and not line.startswith(" "):
            section = None
            lines.append("")
        code = section is None and line.startswith("    ")
        line = line if code else ESCAPED.sub(lambda found: f"\\{found[0]}" if found[1] or found[2] else found[0], line)
        lines.append(line.strip() if section in ("Returns", "Raises") else line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
