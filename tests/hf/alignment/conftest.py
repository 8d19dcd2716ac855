"""Make the factories of this folder and of tests/hf importable by its tests under --import-mode=importlib."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
