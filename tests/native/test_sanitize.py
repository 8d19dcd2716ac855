"""The sanitizer lanes report bugs that are put into a copy of the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # scripts, not a package

import mutate  # noqa: E402
import sanitize  # noqa: E402

CSRC = sanitize.ROOT / "csrc"
pytestmark = pytest.mark.slow
if why := sanitize.obstacle():
    pytest.skip(f"nothing can be sanitized here: {why}", allow_module_level=True)


def run_lane(name: str, csrc: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run one lane on vote alone. Return its exit code and output."""
    if name == "library":
        code = sanitize.library_lane(["vote"], csrc, lane_tests=False)
    else:
        code = sanitize.kernels_lane(["vote"], csrc)
    captured = capfd.readouterr()
    return code, captured.out + captured.err


def vote_only(folder: Path) -> Path:
    """Make a csrc/ with one op, which is built in seconds. Returns it."""
    for name in ("common", "vote", "emulation"):
        shutil.copytree(CSRC / name, folder / name)
    shutil.copy(CSRC / "bindings.cpp", folder)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "report"),
    [
        ("own = scores + q * k;", "own = scores + q * k + k;", "heap-buffer-overflow"),
        ("kSamplesPerThread / (k + 1) + 1", "kSamplesPerThread / k + 1", "division by zero"),
    ],
)
def test_a_bug_in_the_library_is_reported(old, new, report, tmp_path, capfd):
    csrc = vote_only(tmp_path / "csrc")
    source = csrc / "vote" / "vote_cpu.cpp"
    source.write_text(mutate.replace_once(source.read_text(), old, new).text)
    code, said = run_lane("library", csrc, capfd)
    assert code != 0 and report in said, said[-3000:]


def test_the_unchanged_library_passes_and_is_the_sanitized_one(tmp_path, capfd):
    code, said = run_lane("library", vote_only(tmp_path / "csrc"), capfd)
    assert code == 0, said[-3000:]
    assert "vote x native (cpu): 200 rows, 0 failed" in said
    assert f"{os.sep}site{os.sep}calm_fast{os.sep}_cpu.abi3.so" in said


def test_a_bug_in_the_emulation_is_reported(tmp_path, capfd):
    """An emulation that does not check bounds reads out of bounds, which only the sanitizer sees."""
    csrc = vote_only(tmp_path / "csrc")
    memory = csrc / "emulation" / "memory.hpp"
    blind = mutate.replace_once(memory.read_text(), "offset + int64_t(size) > int64_t(m->bytes)", "false")
    memory.write_text(blind.text)
    kernel = csrc / "vote" / "vote.cuh"
    wrong = mutate.replace_once(
        kernel.read_text(), "return a.scores32[q * n + i];", "return a.scores32[q * n + i + n];"
    )
    kernel.write_text(wrong.text)
    code, said = run_lane("kernels", csrc, capfd)
    assert code != 0 and "heap-buffer-overflow" in said, said[-3000:]


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    call = [sys.executable, str(Path(sanitize.__file__))]
    done = subprocess.run(call, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "not run: g++ is not on the PATH" in done.stdout
