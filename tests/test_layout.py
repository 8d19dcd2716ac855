"""One op is one stem in every folder; sizes, names and stray text of the tree."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from calm_fast.ops import INTERNAL_OPS, OPS

ROOT = Path(__file__).resolve().parents[1]
# every op's room and the places that carry its name
ROOM = (
    "calm_fast/_ops/{op}/reference.py",
    "calm_fast/_ops/{op}/torch_impl.py",
    "calm_fast/_ops/{op}/api.py",
    "calm_fast/_ops/{op}/cases.py",
    "tests/ops/{op}/test_api.py",
    "docs/ops/{op}.md",
)
# the others work on the user's tensors alone: nothing for an nn.Module to hold
WITH_PARAMETERS = ("cross_attention", "dual_lora")
# longest file allowed, first matching folder wins
HARD_LINES = (("kernels/", 500), ("tests/", 500), ("", 400))
HARD_LINES_CUDA = 600
LEFTOVER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
MACHINE_PATH = re.compile(r"(?<![\w.$}/])/(?:home|root|Users|work|mnt|opt|data)/\w")
TEXT = {".py", ".md", ".toml", ".sh", ".cfg", ".in", ".yaml", ".yml", ".json", ".jsonl", ".cu", ".cuh", ".cpp", ""}
SKIPPED_FOLDERS = {
    ".git",
    ".venv",
    "build",
    "dist",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
    ".benchmarks",
}


def tracked_files() -> list[Path]:
    """Files under version control; where git or its folder is absent (an sdist), every source file of the tree."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        found = [ROOT / name for name in listed.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [p for p in ROOT.rglob("*") if not SKIPPED_FOLDERS & set(p.relative_to(ROOT).parts)]
    return [path for path in found if path.is_file() and path.suffix in TEXT]


FILES = tracked_files()
PYTHON = [path for path in FILES if path.suffix == ".py"]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_files_are_found():
    assert {"setup.py", "calm_fast/ops.py", "Makefile"} <= {relative(path) for path in FILES}


def test_every_op_has_its_room():
    wanted = [pattern.format(op=op) for op in (*OPS, *INTERNAL_OPS) for pattern in ROOM]
    missing = [name for name in wanted if not (ROOT / name).is_file()]
    assert not missing, f"missing: {', '.join(missing)}"


def test_ops_with_parameters_have_a_module():
    assert set(WITH_PARAMETERS) <= set(OPS)
    assert not [op for op in WITH_PARAMETERS if not (ROOT / "calm_fast" / "modules" / f"{op}.py").is_file()]


def test_every_op_has_a_fast_implementation_of_its_own():
    without = [op for op in OPS if not (ROOT / "kernels" / op).is_dir() and not (ROOT / "csrc" / op).is_dir()]
    assert not without, f"neither kernels/<op>/ nor csrc/<op>/: {', '.join(without)}"


def test_every_other_room_is_shared_by_two_ops():
    """A folder that is no op holds what at least two ops use; it is never an op that hides."""
    for folder, naming in (("calm_fast/_ops", "_ops.{}."), ("kernels", "kernels.{}."), ("csrc", '"{}/')):
        rooms = {path.parent.name for path in FILES if path.parent.parent == ROOT / folder}
        for room in sorted(rooms - {*OPS, *INTERNAL_OPS, "emulation"}):
            users = {
                op for op in OPS for path in FILES if f"/{op}/" in relative(path) and naming.format(room) in read(path)
            }
            assert len(users) >= 2, f"{folder}/{room} is no op and is used by {sorted(users) or 'none'}"


def lists_that_name(op: str) -> set[str]:
    """Python files of the package that hold the op's stem as an element of a list, tuple, dict or call."""
    naming = set()
    for path in PYTHON:
        if relative(path).startswith(("benchmarks/registry", "calm_fast/")):
            for node in ast.walk(ast.parse(read(path))):
                parts = getattr(node, "elts", None) or getattr(node, "keys", None) or []
                if any(isinstance(part, ast.Constant) and part.value == op for part in parts):
                    naming.add(relative(path))
    return naming


def test_ops_are_registered_in_exactly_two_lists():
    for op in OPS:
        assert lists_that_name(op) == {"calm_fast/ops.py", "benchmarks/registry.py"}, op


def test_every_op_has_a_readme_row():
    rows = [line for line in read(ROOT / "README.md").splitlines() if line.lstrip().startswith("|")]
    without = [op for op in OPS if not any(op in row for row in rows)]
    assert not without, f"README.md has no table row that names {', '.join(without)}"


def hard_limit(name: str, suffix: str) -> int | None:
    if suffix in (".cu", ".cuh"):
        return HARD_LINES_CUDA
    if suffix != ".py":
        return None
    return next(limit for folder, limit in HARD_LINES if name.startswith(folder))


def test_every_file_of_the_hf_folder_is_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.split("### The files of calm_fast/hf")[1].split("\n## ")[0]
    listed = re.findall(r"^\|[^|]*\| `(\w+\.py)` \|", table, re.MULTILINE)
    there = {path.name for path in (ROOT / "calm_fast" / "hf").glob("*.py")} - {"__init__.py"}
    assert sorted(listed) == sorted(there)


def test_no_file_is_longer_than_its_hard_limit():
    lengths = {path: len(read(path).splitlines()) for path in FILES}
    limits = {path: hard_limit(relative(path), path.suffix) for path in FILES}
    long = [
        f"{relative(p)}: {lengths[p]} lines, {limits[p]} allowed" for p in FILES if limits[p] and lengths[p] > limits[p]
    ]
    assert not long, "split: " + "; ".join(long)


@pytest.mark.parametrize("pattern", [LEFTOVER, MACHINE_PATH], ids=["leftover", "machine path"])
def test_no_stray_text(pattern):
    hits = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in FILES
        if path != Path(__file__).resolve()
        for number, line in enumerate(read(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_stray_text_patterns_see_what_they_should():
    assert LEFTOVER.search("# TO" + "DO: later") and not LEFTOVER.search("todolist")
    assert MACHINE_PATH.search("see /ho" + "me/someone/x") and MACHINE_PATH.search("'/wo" + "rk/main'")
    assert not MACHINE_PATH.search("../shared/data/x") and not MACHINE_PATH.search("$ROOT/data/x")


def test_kernels_container_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_conftest_only_under_tests():
    assert not [relative(p) for p in PYTHON if p.name == "conftest.py" and not relative(p).startswith("tests/")]
