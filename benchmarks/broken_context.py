"""A pytest plugin for gpu.sh: stop a process whose GPU context is broken.

After an illegal access every CUDA call of the process fails, so its remaining tests would fail at once. pytest-xdist
hands the next test to the first idle worker, so that one process would take most of the remaining tests with it. The
plugin ends the process instead: xdist starts a fresh one and blames the test that broke the context.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def broken() -> str | None:
    """Return the error of this process's GPU context, or None if the context works or does not exist."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()  # a kernel's error surfaces at the next synchronisation: do it before its test ends
    except RuntimeError as failure:
        return str(failure).splitlines()[0]
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    if reason := broken():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # all reports up to here have been sent
        item.session.shouldstop = f"the GPU context broke in {item.nodeid}: {reason}"
