"""What a program does where the reader of its output has gone: `calm-fast env | head -1`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """Around a whole program: it ends with exit code 1 and no message where standard output has no reader any more.

    SIGPIPE stays ignored, as Python starts: its default would also kill the program where a worker process dies.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # else Python would do it at its end and complain there
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(1)
