"""A pytest plugin of gpu.sh: a process whose GPU context broke runs no further test.

After an illegal access every CUDA call of the process fails. Its tests would then fail at once, and as pytest-xdist
gives the next test to whoever is free, that one process would go through most of the rest. So it ends, xdist starts a
fresh one in its place, and the test that did it is the one that is blamed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


def broken() -> str | None:
    """What is wrong with this process's GPU context; None where all is well, or it has none."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()  # errors of kernels show up at the next synchronisation: here it is still their test
    except RuntimeError as failure:
        return str(failure).splitlines()[0]
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    if reason := broken():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # the reports so far are sent
        item.session.shouldstop = f"the GPU context broke in {item.nodeid}: {reason}"
