"""Hooks on modules that several threads may be running."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return `hook`, a module's forward or pre-hook, so that it acts only in calls of the thread that makes it.

    In other threads' calls it returns None: torch then leaves their inputs and outputs as they are.
    """
    own = threading.get_ident()

    @functools.wraps(hook)
    def only_here(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == own else None

    return only_here
