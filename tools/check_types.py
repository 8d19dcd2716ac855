"""Type-check calm_fast as users' checkers see it: `python -m tools.check_types`, or `make types`.

An installed calm_fast holds kernels/<op> as calm_fast.kernels.<op> and benchmarks as calm_fast.benchmarks (setup.py).
mypy finds packages by folder, so it gets a temporary folder of links with that layout. Its settings stand in
pyproject.toml under [tool.mypy].
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"calm_fast/kernels/": "kernels/", "calm_fast/benchmarks/": "benchmarks/"}


def link_tree(folder: Path, root: Path = ROOT) -> None:
    """Fill `folder` with the package as it is installed, every file a link to its source under `root`."""
    package = folder / "calm_fast"
    (package / "kernels").mkdir(parents=True)
    for entry in (root / "calm_fast").iterdir():
        if entry.name != "kernels":
            (package / entry.name).symlink_to(entry)
    (package / "kernels" / "__init__.py").symlink_to(root / "calm_fast" / "kernels" / "__init__.py")
    for init in (root / "kernels").glob("*/__init__.py"):
        (package / "kernels" / init.parent.name).symlink_to(init.parent)
    (package / "benchmarks").symlink_to(root / "benchmarks")


def source_path(line: str) -> str:
    """A line of mypy's output with the path of the source in the repository."""
    for linked, source in MAPPED.items():
        if line.startswith(linked) and not line.startswith("calm_fast/kernels/__init__"):
            return source + line.removeprefix(linked)
    return line


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        link_tree(Path(folder))
        call = [
            sys.executable, "-m", "mypy", "-p", "calm_fast",
            "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"),
        ]  # fmt: skip
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    print("\n".join(source_path(line) for line in done.stdout.splitlines()))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
