"""One op is one stem in every folder; sizes, names and stray text of the tree."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from calm_fast.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
STEM_FILES = (
    "calm_fast/reference/{op}.py",
    "calm_fast/torch_impl/{op}.py",
    "calm_fast/ops/{op}.py",
    "calm_fast/verify/cases/{op}.py",
    "tests/ops/test_{op}*.py",
)
# the others work on the user's tensors alone: nothing for an nn.Module to hold
WITH_PARAMETERS = ("cross_attention", "dual_lora")
# longest file allowed, first matching folder wins
HARD_LINES = (("kernels/", 500), ("tests/", 500), ("", 400))
HARD_LINES_CUDA = 600
LEFTOVER = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
MACHINE_PATH = re.compile(r"(?<![\w.$}/])/(?:home|root|Users|work|mnt|opt|data)/\w")
TEXT = {".py", ".md", ".toml", ".sh", ".cfg", ".in", ".yaml", ".yml", ".json", ".jsonl", ".cu", ".cuh", ".cpp", ""}
SKIPPED_FOLDERS = {".git", ".venv", "build", "dist", "__pycache__", ".pytest_cache", ".ruff_cache", ".benchmarks"}


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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pattern", STEM_FILES)
def test_op_has_its_file_in_every_folder(op, pattern):
    assert list(ROOT.glob(pattern.format(op=op))), f"{pattern.format(op=op)} is missing"


@pytest.mark.parametrize("op", WITH_PARAMETERS)
def test_op_with_parameters_has_a_module(op):
    assert op in OPS
    assert (ROOT / "calm_fast" / "modules" / f"{op}.py").is_file()


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_fast_implementation_of_its_own(op):
    kernels = (ROOT / "kernels" / op).is_dir()
    native = (ROOT / "csrc" / op).is_dir()
    assert kernels or native, f"neither kernels/{op}/ nor csrc/{op}/"


@pytest.mark.parametrize("folder", ["reference", "torch_impl", "ops"])
def test_every_stem_is_a_registered_op(folder):
    """A file beside the registered stems must be shared code of at least two of them, never a hidden op."""
    tracked = {path for path in PYTHON if path.parent == ROOT / "calm_fast" / folder}
    stems = {path.stem for path in tracked} - {"__init__", *OPS}
    for stem in sorted(stems):
        users = [op for op in OPS if re.search(rf"\b{stem}\b", read(ROOT / "calm_fast" / folder / f"{op}.py"))]
        assert len(users) >= 2, f"calm_fast/{folder}/{stem}.py is no registered op and shared by {users or 'none'}"


def lists_that_name(op: str) -> set[str]:
    """Python files of the package that hold the op's stem as an element of a list, tuple, dict or call."""
    naming = set()
    for path in PYTHON:
        if relative(path).startswith(("calm_fast/ops/__init__", "benchmarks/registry", "calm_fast/")):
            for node in ast.walk(ast.parse(read(path))):
                parts = getattr(node, "elts", None) or getattr(node, "keys", None) or []
                if any(isinstance(part, ast.Constant) and part.value == op for part in parts):
                    naming.add(relative(path))
    return naming


@pytest.mark.parametrize("op", OPS)
def test_op_is_registered_in_exactly_two_lists(op):
    assert lists_that_name(op) == {"calm_fast/ops.py", "benchmarks/registry.py"}


@pytest.mark.parametrize("op", OPS)
def test_op_has_a_readme_row(op):
    rows = [line for line in read(ROOT / "README.md").splitlines() if line.lstrip().startswith("|")]
    assert any(op in row for row in rows), f"README.md has no table row that names {op}"


def hard_limit(name: str, suffix: str) -> int | None:
    if suffix in (".cu", ".cuh"):
        return HARD_LINES_CUDA
    if suffix != ".py":
        return None
    return next(limit for folder, limit in HARD_LINES if name.startswith(folder))


@pytest.mark.parametrize("path", [p for p in FILES if hard_limit(relative(p), p.suffix)], ids=relative)
def test_file_is_not_longer_than_its_hard_limit(path):
    lines, limit = len(read(path).splitlines()), hard_limit(relative(path), path.suffix)
    assert lines <= limit, f"{relative(path)} has {lines} lines, the limit is {limit}: split it"


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
