"""End a worker process at once when its parent is gone, whatever the worker is doing."""

from __future__ import annotations

import os
import select
import signal


def end_with_parent(reader: int) -> None:
    """Make the kernel end this process when nobody holds the writing end of a pipe; nothing may be written to it.

    A closed standard input is seen only between two tasks, and not by C code in the middle of one. Linux's signal for
    the death of a parent (PR_SET_PDEATHSIG) also comes when the thread that started this process ends. Where a system
    has no signal for the end of a pipe, standard input remains.

    Args:
        reader: file descriptor of the pipe's reading end.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # which ends the process
    fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([reader], [], [], 0)[0]:
        os._exit(0)  # the parent was gone before the signal was asked for
