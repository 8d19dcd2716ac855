"""Test one build against many torch versions: build the wheel once and run its compiled library on each of them.

    python tests/native/abi_matrix.py --torch 2.11.0 2.15.0      # creates an environment for each; gigabytes with CUDA
    python tests/native/abi_matrix.py --python envs/*/bin/python # uses existing environments

In each, the cases of `calm-fast verify` run with impl="native" against the float64 reference, for every op that the
library serves, and torch.compile traces dual_lora. The exit code is 1 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import sys
import torch
from calm_fast.core import native_library
from calm_fast.ops import OPS, dual_lora
from calm_fast.verify.run import Part, run_part

served = [op for op in OPS if native_library.obstacle(op, "cpu") is None]
assert served, native_library.obstacle("dual_lora", "cpu")
rows = [row for op in served for row in run_part(Part(op, "native", "cpu"))]
x, y, a, b, w = (torch.randn(*shape) for shape in ((3, 8), (3, 8), (2, 8), (8, 2), (8, 8)))
run = lambda impl: dual_lora(x, y, a, b, a, b, w, w, (w,), scaling=1.0, impl=impl)
torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")("native"), run("reference"))
failed = [row for row in rows if not row.ok]
print(torch.__version__, sys.version.split()[0], ", ".join(served), len(rows), len(failed), sep=" | ")
for row in failed:
    print("failed:", row)
sys.exit(bool(failed))
"""


def run(command: list[object], **options: Any) -> str:
    """Run a command and return its output; exit with its messages if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise SystemExit(
            f"{' '.join(map(str, command))}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"[-4000:]
        )
    return done.stdout


def environment(version: str, folder: Path) -> Path:
    """Create an environment with torch `version` in `folder`. Returns its Python."""
    print(f"[abi] installing torch {version}", file=sys.stderr, flush=True)
    run([sys.executable, "-m", "venv", folder])
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", f"torch=={version}", "numpy"])
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION", help="versions to install")
    parser.add_argument(
        "--python", nargs="*", default=[], type=Path, metavar="PYTHON", help="interpreters that have torch"
    )
    chosen, failures = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        run([sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", folder / "dist"], cwd=ROOT)
        (wheel,) = (folder / "dist").glob("*-cp310-abi3-*.whl")
        print(f"[abi] built {wheel.name} in {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        place = folder / "installed"
        run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", place, wheel])
        print("torch | Python | ops served | results | failed")
        pythons = [Path(sys.executable), *chosen.python]
        pythons += [environment(version, folder / f"torch-{version}") for version in chosen.torch]
        for python in pythons:
            # PYTHONPATH comes first, but the finder of an editable install comes before it: -S keeps that out
            site = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
            env = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{site}", "OMP_NUM_THREADS": "1"}
            done = subprocess.run([python, "-S", "-c", CHECK], cwd=folder, env=env, capture_output=True, text=True)
            failures += done.returncode != 0
            print(done.stdout.strip() or f"{python}: {done.stderr.strip().splitlines()[-1]}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
