"""Model folders that the tests of this folder share; they are read only."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import byte_level, save_model, sentencepiece  # noqa: E402


@pytest.fixture(scope="session")
def anchor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor with a chat template."""
    return save_model(tmp_path_factory.mktemp("anchor"), byte_level(chat=True), 0)


@pytest.fixture(scope="session")
def sibling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An augmenter with the anchor's tokenizer."""
    return save_model(tmp_path_factory.mktemp("sibling"), byte_level(chat=True), 1, width=24, layers=3)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An augmenter with another tokenizer."""
    return save_model(tmp_path_factory.mktemp("stranger"), sentencepiece(), 2, width=16, layers=3)
