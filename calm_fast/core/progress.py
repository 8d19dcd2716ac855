"""Progress of long work: a bar on a terminal or in a notebook, a line every few seconds in a log file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO

SECONDS = 5.0  # between two lines, if the output is not a terminal
_LINE = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_CONTROL = re.compile(r"[\r\n]|\x1b\[A")  # how tqdm redraws a bar in place


class _Lines:
    """A text file for tqdm that gets every state of a bar as a line of its own."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.last = file, ""

    def write(self, text: str) -> None:
        line = _CONTROL.sub("", text).strip()
        if line and line != self.last:
            self.file.write(line + "\n")
            self.last = line

    def flush(self) -> None:
        self.file.flush()


def progress_bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> Any:
    """Return a tqdm bar over `iterable`, or one that update() advances.

    If standard error is neither a terminal nor a notebook (a redirected command, CI), the bar writes a line of text
    every five seconds instead of redrawing itself.

    shown: False gives a bar that writes nothing. options: arguments of ``tqdm.tqdm``, like total, desc and unit.
    """
    from tqdm.auto import tqdm

    shown = shown and sys.stderr is not None
    terminal = getattr(sys.stderr, "isatty", lambda: False)()  # a stream into a logger often has no isatty
    if shown and not (terminal or "ipykernel" in sys.modules):
        options |= {"file": _Lines(sys.stderr), "mininterval": SECONDS, "bar_format": _LINE}
    return tqdm(iterable, disable=not shown, **options)
