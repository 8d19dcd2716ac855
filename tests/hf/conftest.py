"""Make the factories of this folder importable by its tests under --import-mode=importlib."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two saved base models, ``anchor`` and ``augmenter``, and ``composed``, a saved composition of them."""
    from saved import build

    return build(tmp_path)
