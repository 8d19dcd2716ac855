"""A quiet end for a program whose output is no longer read, as in `calm-fast env | head -1`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """Wrap a whole program: if standard output has lost its reader, end with exit code 1 and no message.

    SIGPIPE stays ignored, which is how Python starts. Its default action would also kill the program when a worker
    process dies.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # otherwise Python flushes at exit and prints the error there
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drops what is still buffered
        sys.exit(1)
