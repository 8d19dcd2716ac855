"""Install the newest of the extra `integrations` beside what is installed: `python -m tools.install_integrations`.

Everything that calm_fast and its tests require by name stays as it is, torch and triton first: these tests speak of the
same releases as the rest of the suite. A tool that cannot live with them makes this fail, with pip's message.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

EXTRA = "integrations"


def _asked(extra: str) -> list[Requirement]:
    found = [Requirement(text) for text in importlib.metadata.requires("calm-fast") or []]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]


def wanted() -> list[str]:
    """Return the requirements of the extra `integrations`, without markers."""
    plain = {str(r) for r in _asked("")}
    found = [r for r in _asked(EXTRA) if str(r) not in plain]
    return [f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}" for r in found]


def held() -> list[str]:
    """Return `name==version` of torch, triton and every requirement of calm_fast and its tests, as installed here."""
    asked = {canonicalize_name(Requirement(text).name) for text in wanted()}
    names = {canonicalize_name(r.name) for extra in ("", "test") for r in _asked(extra)} - asked
    lines = []
    for name in sorted(names):
        try:
            lines.append(f"{name}=={Version(importlib.metadata.version(name)).public}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return lines


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "held.txt")
        constraints.write_text("\n".join(held()) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        command += ["--upgrade", "--upgrade-strategy", "only-if-needed", "--constraint", str(constraints)]
        return subprocess.run([*command, *wanted()]).returncode


if __name__ == "__main__":
    sys.exit(main())
