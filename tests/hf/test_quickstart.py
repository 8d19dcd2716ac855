"""The quickstart example runs and prints what it promises."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_quickstart_example_trains_generates_and_loads(forked, tmp_path: Path) -> None:
    run = forked.run(ROOT / "examples" / "compose_quickstart.py", cwd=tmp_path, path=ROOT)
    assert run.returncode == 0, run.stderr
    losses = [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    assert run.stdout.rstrip().endswith("loaded: the same logits")
