"""The contract with other packages, tested in under 90 seconds. `make contract` runs it for each release."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("hf", "consistency"):  # their tiny models
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / folder))
