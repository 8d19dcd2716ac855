"""The contract: what calm_fast takes from other packages, in under 90 seconds. `make contract` runs it per release."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("hf", "consistency"):  # their tiny models
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
